import copy
import json
import subprocess
import sys

import pytest
import torch
from conftest import ARCHITECTURES, calibrated, tiny_model, tokens
from transformers import AutoModelForCausalLM

from rankgate.conversion.convert import convert_, converted_layers, shared_part
from rankgate.errors import RankgateError
from rankgate.hub import checkpoint
from rankgate.hub.checkpoint import Checkpoint, Provenance
from rankgate.methods import ASVDConfig, GSIConfig, Int4Config, LRQConfig, SparseConfig, SVDConfig
from rankgate.quantized import QuantizedHead

METHODS = (
    SVDConfig(energy=0.7, allow_larger=True),
    ASVDConfig(rank=0.25),
    GSIConfig(rank=0.25, eps=0.5),
    GSIConfig(rank=0.25, eps=0.5, basis="context"),
    LRQConfig(rank=4, refine=0.3, rounds=1, group_size=32),
    LRQConfig(bits=8, rank=0, refine=0.0, symmetric=False),
    Int4Config(),
    SparseConfig(keep=0.5),
)


def reloaded(architecture, dtype, directory):
    """As transformers opens it: what is not stored, such as GPT-J's table of positions, it may compute otherwise.

    Copied, because tensors in a mapped file may lie askew, and then products are rounded otherwise.
    """
    tiny_model(architecture, dtype).save_pretrained(directory)
    return copy.deepcopy(AutoModelForCausalLM.from_pretrained(directory))


def save(architecture, method, tokenizer, directory, dtype=torch.float32, lm_head=False):
    model = reloaded(architecture, dtype, directory.with_name("dense"))
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


OPEN = (
    "import sys; from transformers import AutoModelForCausalLM as Model; "
    "m, info = Model.from_pretrained(sys.argv[1], output_loading_info=True)"
)


def test_transformers_alone_is_not_silent(tokenizer, tmp_path):
    """It says that weights are missing, because none has the name of a dense one."""
    save("llama", METHODS[0], tokenizer, tmp_path / "out")
    done = subprocess.run([sys.executable, "-c", OPEN, tmp_path / "out"], capture_output=True, text=True, check=False)
    assert "rankgate" in done.stderr and "MISSING" in done.stderr and "q_proj.weight" in done.stderr


@pytest.mark.parametrize("first", ["import rankgate", "import transformers, torch, rankgate"])
def test_importing_rankgate_is_enough(first, tokenizer, tmp_path):
    save("llama", METHODS[0], tokenizer, tmp_path / "out")
    code = f"{first}; {OPEN}; assert not info['missing_keys'], info; assert m.quantization_method == 'rankgate'"
    done = subprocess.run([sys.executable, "-c", code, tmp_path / "out"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def damage_tensors(directory):
    file = directory / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def lose_tensors(directory):
    (directory / "model.safetensors").unlink()


def garble_manifest(directory):
    (directory / checkpoint.MANIFEST).write_text("{")


def edit(directory, change):
    file = directory / "config.json"
    config = json.loads(file.read_text())
    change(config["quantization_config"])
    file.write_text(json.dumps(config))


def change_shape(directory):
    edit(directory, lambda q: q["modules"][0].update(rank=q["modules"][0]["rank"] + 1))


def drop_layer(directory):
    edit(directory, lambda q: q["modules"].pop())


@pytest.mark.parametrize("harm", [damage_tensors, lose_tensors, garble_manifest, change_shape, drop_layer])
def test_damage_is_one_line(harm, tokenizer, tmp_path):
    save("llama", METHODS[1], tokenizer, tmp_path / "out")
    harm(tmp_path / "out")
    with pytest.raises(RankgateError, match="damaged, convert it again: ") as caught:
        checkpoint.load(tmp_path / "out")
    assert "\n" not in str(caught.value)


def test_another_format_is_named(tokenizer, tmp_path):
    save("llama", METHODS[1], tokenizer, tmp_path / "out")
    edit(tmp_path / "out", lambda q: q.update(format=99))
    with pytest.raises(RankgateError, match="format 99"):
        checkpoint.load(tmp_path / "out")


def test_what_transformers_saved_opens_without_provenance(tokenizer, tmp_path):
    saved = save("llama", METHODS[1], tokenizer, tmp_path / "out")
    (tmp_path / "out" / checkpoint.MANIFEST).unlink()
    loaded = checkpoint.load(tmp_path / "out")
    assert loaded.provenance is None and loaded.method == saved.method
    with pytest.raises(RankgateError, match="--against MODEL"):
        checkpoint.source_of(tmp_path / "out")
    loaded.save(tmp_path / "copy")
    assert not (tmp_path / "copy" / checkpoint.MANIFEST).exists()
