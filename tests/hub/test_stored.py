"""Members of groups on disk, and models that the format before this one stored."""

import json

import pytest
import torch
from conftest import ARCHITECTURES, calibrated, tiny_model, tokens
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from rankgate import RankgateError, convert_
from rankgate.conversion.convert import converted_layers
from rankgate.core import GroupedLinear
from rankgate.hub import stored
from rankgate.hub.config import FORMAT, STACKED
from rankgate.methods import GSIConfig, LRQConfig, SparseConfig, SVDConfig
from rankgate.quantized import GROUP, LowRank, QuantizedGroup

METHODS = (
    LRQConfig(rank=4, refine=0.3, rounds=1),
    LRQConfig(bits=8, rank=0, refine=0.0, symmetric=False),
    GSIConfig(rank=0.25, eps=0.5),
    SVDConfig(rank=0.5),
    SparseConfig(keep=0.5),
)


def converted(architecture, method, lm_head=False):
    model = tiny_model(architecture, torch.bfloat16)
    convert_(model, method, calibrated(model, sensitivity=method.needs_sensitivity), lm_head=lm_head)
    return model


def edit(directory, change):
    config = json.loads((directory / "config.json").read_text())
    change(config["quantization_config"])
    (directory / "config.json").write_text(json.dumps(config))


def save_stacked(model, directory):
    """As format 4 did: parameters of a group as they are in memory, under the name of its first member."""
    model.save_pretrained(directory)
    kept = {name: tensor for name, tensor in model.state_dict().items() if name not in model.all_tied_weights_keys}
    save_file(kept, directory / "model.safetensors", metadata={"format": "pt"})
    edit(directory, lambda settings: settings.update(format=STACKED))


@pytest.mark.parametrize("method", METHODS, ids=lambda m: m.name)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_what_the_format_before_stored_opens_and_is_stored_anew(architecture, method, tmp_path):
    model, ids = converted(architecture, method, lm_head=True), tokens(2, 20)
    save_stacked(model, tmp_path / "old")
    old = AutoModelForCausalLM.from_pretrained(tmp_path / "old")
    old.save_pretrained(tmp_path / "new")
    new = AutoModelForCausalLM.from_pretrained(tmp_path / "new")
    with torch.no_grad():
        assert torch.equal(old(ids).logits, new(ids).logits)
    for (name, a), (other, b) in zip(old.named_parameters(), new.named_parameters(), strict=True):
        assert name == other and a.dtype == b.dtype and torch.equal(a, b)
    settings = json.loads((tmp_path / "new" / "config.json").read_text())["quantization_config"]
    assert settings["format"] == FORMAT


def test_every_member_has_its_rows_under_its_own_name(tmp_path):
    model = converted("llama", METHODS[0])
    model.save_pretrained(tmp_path / "out")
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    for name, layer in converted_layers(model):
        group, rows = layer.group, slice(layer.start, layer.stop)
        own = {key.removeprefix(f"{name}."): tensor for key, tensor in tensors.items() if key.startswith(f"{name}.")}
        assert all("." not in key for key in own)
        codes = stored.unpack(own["weight_packed"], 4).unflatten(-1, (-1, GROUP)).float() - 8
        W = (codes * own["weight_scale"].float()[..., None]).flatten(-2)[:, : group.n]
        assert torch.equal(W, group.base.dequantize()[rows])
        E = stored.unpack(own["refinement_packed"], 4)[:, : group.n]
        assert torch.equal(E, group.refinement.unpack()[rows])
        if group.low_rank is not None:
            factors = own["low_rank_A"], own["low_rank_B"], own["low_rank_scale"]
            assert torch.equal(LowRank(*factors).dequantize(), group.low_rank.dequantize()[rows])


@pytest.mark.parametrize("bits", [4, 8])
def test_packing_is_undone(bits):
    codes = torch.randint(0, 16, (3, 128), dtype=torch.uint8)
    if bits == 8:
        codes = torch.randint(-128, 128, (3, 128), dtype=torch.int8)
    words = stored.pack(codes, bits)
    assert words.shape == (3, 4 * bits) and words.dtype == torch.int32
    assert torch.equal(stored.unpack(words, bits), codes)
    low = words[:, 0] & (2**bits - 1)
    assert torch.equal(low, codes[:, 0].int() + (128 if bits == 8 else 0))


def test_a_group_without_one_of_its_members(tmp_path):
    model = converted("llama", METHODS[0])
    model.save_pretrained(tmp_path / "out")
    edit(tmp_path / "out", lambda settings: settings["modules"].pop(1))
    with pytest.raises(RankgateError, match="damaged"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "out")


def test_groups_are_whole_after_loading(tmp_path):
    converted("llama", METHODS[0]).save_pretrained(tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    layers = [layer for _, layer in converted_layers(model)]
    assert all(isinstance(layer, GroupedLinear) and isinstance(layer.group, QuantizedGroup) for layer in layers)
    assert not any(isinstance(module, stored.StoredLinear) for module in model.modules())


def test_packed_codes_in_files_are_the_same(monkeypatch, tmp_path):
    model = converted("llama", METHODS[0])
    for folder, limit in (("memory", stored.IN_MEMORY), ("files", 0)):
        monkeypatch.setattr(stored, "IN_MEMORY", limit)
        model.save_pretrained(tmp_path / folder)
    a, b = (load_file(tmp_path / folder / "model.safetensors") for folder in ("memory", "files"))
    assert a.keys() == b.keys() and all(torch.equal(tensor, b[name]) for name, tensor in a.items())
