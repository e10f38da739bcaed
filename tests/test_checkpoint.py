import json

import pytest
import torch
from conftest import ARCHITECTURES, calibrated, tiny_model, tokens

from rankgate import checkpoint
from rankgate.checkpoint import Checkpoint, Provenance
from rankgate.convert import convert_, converted_layers, shared_part
from rankgate.errors import RankgateError
from rankgate.methods import ASVDConfig, GSIConfig, Int4Config, LRQConfig, SparseConfig, SVDConfig
from rankgate.quantized import QuantizedHead

METHODS = (
    SVDConfig(energy=0.7, allow_larger=True),
    ASVDConfig(rank=0.25),
    GSIConfig(rank=0.25, eps=0.5),
    GSIConfig(rank=0.25, eps=0.5, basis="context"),
    LRQConfig(rank=4, refine=0.3, rounds=1),
    LRQConfig(bits=8, rank=0, refine=0.0, symmetric=False),
    Int4Config(),
    SparseConfig(keep=0.5),
)


def save(architecture, method, tokenizer, directory, dtype=torch.float32, lm_head=False):
    model = tiny_model(architecture, dtype)
    stats = calibrated(model, sensitivity=method.needs_sensitivity)
    layers = convert_(model, method, stats, lm_head=lm_head)
    origin = Provenance("somewhere", "abc", "some text", 512, torch.tensor([5, -7]))
    saved = Checkpoint(model, tokenizer, method, layers, origin)
    saved.save(directory)
    return saved


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("method", METHODS, ids=lambda m: f"{m.name}-{getattr(m, 'basis', getattr(m, 'bits', ''))}")
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_loaded_model_is_bit_identical(architecture, method, dtype, tokenizer, tmp_path):
    saved = save(architecture, method, tokenizer, tmp_path / "out", dtype)
    loaded = checkpoint.load(tmp_path / "out")
    ids = tokens(2, 20)
    with torch.no_grad():
        assert torch.equal(loaded.model(input_ids=ids).logits, saved.model(input_ids=ids).logits)
    assert loaded.method == method and loaded.layers == saved.layers
    assert torch.equal(loaded.provenance.hashes, saved.provenance.hashes)
    assert loaded.tokenizer("text").input_ids == tokenizer("text").input_ids
    assert loaded.model.dtype == dtype
    groups = [len({shared_part(layer) for _, layer in converted_layers(m)}) for m in (saved.model, loaded.model)]
    assert groups[0] == groups[1]
    for (name, a), (other, b) in zip(saved.model.named_parameters(), loaded.model.named_parameters(), strict=True):
        assert name == other and a.dtype == b.dtype and torch.equal(a, b)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_converted_output_embedding_is_kept(architecture, tokenizer, tmp_path):
    saved = save(architecture, Int4Config(), tokenizer, tmp_path / "out", lm_head=True)
    loaded = checkpoint.load(tmp_path / "out")
    assert isinstance(loaded.model.get_output_embeddings(), QuantizedHead)
    with torch.no_grad():
        outputs = [model(input_ids=tokens(2, 20)).logits for model in (saved.model, loaded.model)]
    assert torch.equal(*outputs)


def test_transformers_alone_refuses_the_directory(tokenizer, tmp_path):
    from transformers import AutoModelForCausalLM

    save("llama", METHODS[0], tokenizer, tmp_path / "out")
    with pytest.raises(OSError, match="no file named"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "out")


def damage_tensors(directory):
    file = directory / checkpoint.TENSORS
    file.write_bytes(file.read_bytes()[:-100])


def lose_tensors(directory):
    (directory / checkpoint.TENSORS).unlink()


def garble_manifest(directory):
    (directory / checkpoint.MANIFEST).write_text("{")


def change_shape(directory):
    manifest = json.loads((directory / checkpoint.MANIFEST).read_text())
    manifest["modules"][0]["rank"] += 1
    (directory / checkpoint.MANIFEST).write_text(json.dumps(manifest))


def drop_layer(directory):
    manifest = json.loads((directory / checkpoint.MANIFEST).read_text())
    manifest["modules"].pop()
    (directory / checkpoint.MANIFEST).write_text(json.dumps(manifest))


@pytest.mark.parametrize("harm", [damage_tensors, lose_tensors, garble_manifest, change_shape, drop_layer])
def test_damage_is_one_line(harm, tokenizer, tmp_path):
    save("llama", METHODS[1], tokenizer, tmp_path / "out")
    harm(tmp_path / "out")
    with pytest.raises(RankgateError, match="damaged, convert it again: ") as caught:
        checkpoint.load(tmp_path / "out")
    assert "\n" not in str(caught.value)


def test_another_format_is_named(tokenizer, tmp_path):
    save("llama", METHODS[1], tokenizer, tmp_path / "out")
    (tmp_path / "out" / checkpoint.MANIFEST).write_text('{"format": "rankgate-model-99"}')
    with pytest.raises(RankgateError, match="rankgate-model-99"):
        checkpoint.load(tmp_path / "out")
