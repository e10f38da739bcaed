"""Converted models in the formats of other engines, read back by the libraries that define these."""

import json

import gguf
import numpy as np
import pytest
import torch
from conftest import VOCAB, calibrated, tiny_model
from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from rankgate.cli import main
from rankgate.common.copies import twin
from rankgate.conversion.convert import convert_, converted_layers
from rankgate.errors import RankgateError
from rankgate.hub.checkpoint import Checkpoint
from rankgate.hub.export import compressed, lora
from rankgate.hub.export import gguf as gguf_export
from rankgate.hub.export.members import members
from rankgate.methods import Int4Config, Int8Config, LRQConfig, SVDConfig
from rankgate.quantized import GROUP_SIZES, LowRank, QuantizedMatrix

CONFIG = {"hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 2, "vocab_size": VOCAB}
METHODS = {
    "int4": (Int4Config(), {}),
    "int8": (Int8Config(), {}),
    "mixed": (Int4Config(), {"down_proj": Int8Config()}),
    "low rank": (LRQConfig(rank=8, refine=0.0), {}),
    "groups of 32": (LRQConfig(rank=0, refine=0.0, group_size=32), {}),
}


@pytest.fixture(scope="module")
def dense():
    torch.manual_seed(0)
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig(**CONFIG, **heads, tie_word_embeddings=True)).eval()


def converted(dense, name, tokenizer=None, **options):
    method, overrides = METHODS[name]
    model = twin(dense)
    layers = convert_(model, method, calibrated(dense, sensitivity=True), overrides=overrides, **options)
    return Checkpoint(model, tokenizer, method, layers, None)


@pytest.mark.parametrize("name", METHODS)
def test_compressed_tensors_opens_to_the_same_weights(dense, name, tokenizer, tmp_path):
    model = converted(dense, name).model
    found = compressed.write(model, tokenizer, tmp_path / "out", lora=True)
    opened = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.bfloat16)
    ids = torch.randint(5, 250, (1, 12), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        opened(ids)  # decompresses
    assert len(found) == 14
    for member in found:
        weight = opened.get_submodule(member.name).weight
        assert torch.equal(weight, member.base.dequantize(torch.bfloat16))


def test_codes_with_zeros():
    generator = torch.Generator().manual_seed(0)
    codes, scale = torch.randint(0, 16, (40, 128), generator=generator), torch.rand(40, 2, generator=generator)
    zero = torch.randint(0, 16, (40, 2), generator=generator).to(torch.int8)
    member = type("Member", (), {"base": QuantizedMatrix.pack(codes, scale, zero, 4), "name": "a"})
    packed = compressed.packed(member)
    shifts = 4 * torch.arange(8)
    assert torch.equal((packed["weight_packed"][..., None] >> shifts & 15).flatten(1), codes.to(torch.int32))
    unpacked = (packed["weight_zero_point"][:, None] >> shifts[:, None] & 15).flatten(0, 1)
    assert torch.equal(unpacked, zero.to(torch.int32))
    member.base.zero[3, 1] = -1
    with pytest.raises(RankgateError, match="outside of its 4-bit codes"):
        compressed.packed(member)


def test_an_adapter_adds_the_low_rank(dense, tokenizer, tmp_path):
    peft = pytest.importorskip("peft")
    checkpoint = converted(dense, "low rank")
    found = compressed.write(checkpoint.model, tokenizer, tmp_path / "out", lora=True)
    lora.write(found, "out", tmp_path / "out-lora")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    ids = torch.randint(5, 250, (1, 12), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        wanted, alone = checkpoint.model(ids).logits, base(ids).logits
        got = peft.PeftModel.from_pretrained(base, tmp_path / "out-lora")(ids).logits
    assert (got - wanted).norm() < 0.2 * (alone - wanted).norm()


def test_factors_of_an_adapter():
    generator = torch.Generator().manual_seed(0)
    A, B = (torch.randint(-127, 128, shape, generator=generator).to(torch.int8) for shape in ((9, 3), (3, 7)))
    low = LowRank(A, B, torch.tensor([1e-7, 3e-12, 0.0]))
    first, second = lora.factors(low, 5)
    assert first.shape == (5, 7)
    assert second.shape == (9, 5)
    torch.testing.assert_close(second @ first, low.dequantize(), rtol=1e-5, atol=1e-12)
    assert torch.equal(first, first.to(torch.bfloat16).float())


KINDS = {
    (4, False): GGMLQuantizationType.Q4_0,
    (8, False): GGMLQuantizationType.Q8_0,
    (4, True): GGMLQuantizationType.Q4_1,
}


@pytest.mark.parametrize("size", GROUP_SIZES)
@pytest.mark.parametrize(("bits", "zeros"), KINDS)
def test_blocks_of_gguf(bits, zeros, size):
    """Exact but for zeros: −s z is rounded to float16."""
    generator = torch.Generator().manual_seed(bits)
    low, high = (0, 16) if bits == 4 else (-128, 128)
    codes = torch.randint(low, high, (5, 160), generator=generator)
    groups = 3 * 64 // size
    scale = torch.randn(5, groups, generator=generator)
    zero = torch.randint(-20, 30, (5, groups), generator=generator).to(torch.int8) if zeros else None
    base = QuantizedMatrix.pack(codes, scale, zero, bits)
    order = torch.tensor([4, 0, 3, 1, 2])
    data, kind = gguf_export.blocks_of(base, order, "a")
    assert kind == KINDS[bits, zeros]
    got, wanted = torch.from_numpy(gguf.dequantize(data, kind)), base.dequantize()[order]
    limit = 2.0**-11 * 30 * base.scale.float().abs().max() if zeros else 0
    assert ((got - wanted).abs() <= limit).all()


def template(dense, file):
    """The dense model as llama.cpp's converter writes it: q and k with the halves of every head in turn."""
    writer = GGUFWriter(file, "llama")
    writer.add_block_count(2)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_array("tokenizer.ggml.tokens", ["a", "b"])
    table = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 2)
    for name, tensor in dense.state_dict().items():
        if name != "lm_head.weight":
            W = tensor.clone()
            for key, heads in (("q_proj", 4), ("k_proj", 2)):
                if key in name:
                    W = W.view(heads, 2, -1, W.shape[1]).transpose(1, 2).reshape(W.shape)
            stem, _, kind = name.rpartition(".")
            writer.add_tensor(f"{table.get_name(stem)}.{kind}", W.numpy())
    gguf_export._finish(writer)


def test_a_file_for_llama_cpp(dense, tmp_path):
    template(dense, tmp_path / "dense.gguf")
    model = converted(dense, "low rank", lm_head=True).model
    files = tmp_path / "out.gguf", tmp_path / "out-lora.gguf"
    written = gguf_export.write(model, tmp_path / "dense.gguf", *files)
    assert written.types == {"Q4_0": 14, "Q8_0": 1}
    reader, given = GGUFReader(files[0]), GGUFReader(tmp_path / "dense.gguf")
    assert reader.get_field("tokenizer.ggml.tokens").contents() == ["a", "b"]
    assert reader.get_field("general.file_type").contents() == 2
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    assert set(tensors) == {tensor.name for tensor in given.tensors} | {"output.weight"}
    assert np.array_equal(tensors["token_embd.weight"].data, given.tensors[0].data)
    adapter = {tensor.name: torch.tensor(tensor.data) for tensor in GGUFReader(files[1]).tensors}
    layers = dict(converted_layers(model))
    table = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 2)
    for member in members(model, lora=True):
        name = f"{table.get_name(member.name)}.weight"
        W = torch.from_numpy(gguf.dequantize(tensors[name].data, tensors[name].tensor_type))
        wanted = member.base.dequantize()
        if member.low_rank is not None:
            W, wanted = W + adapter[f"{name}.lora_b"] @ adapter[f"{name}.lora_a"], wanted + member.low_rank.dequantize()
        for key, heads in (("q_proj", 4), ("k_proj", 2)):
            if member.name.endswith(key):
                wanted = wanted.view(heads, 2, -1, wanted.shape[1]).transpose(1, 2).reshape(wanted.shape)
        torch.testing.assert_close(W, wanted, rtol=1e-5, atol=1e-6)
        assert layers[member.name].out_features == len(W)


def test_a_template_of_another_model(dense, tmp_path):
    torch.manual_seed(1)
    template(LlamaForCausalLM(dense.config).eval(), tmp_path / "other.gguf")
    with pytest.raises(RankgateError, match="is another one in the template"):
        gguf_export.write(converted(dense, "int4").model, tmp_path / "other.gguf", tmp_path / "out.gguf", None)


def test_what_no_format_has(dense):
    refined, low, other = (twin(dense) for _ in range(3))
    stats = calibrated(dense, sensitivity=True)
    convert_(refined, LRQConfig(rank=0, refine=0.1), stats)
    convert_(low, LRQConfig(rank=8, refine=0.0), stats)
    convert_(other, SVDConfig(rank=0.5, allow_larger=True), stats)
    for model, reason in ((refined, "--refine 0"), (low, "pass --lora"), (other, "not quantised"), (dense, "nothing")):
        with pytest.raises(RankgateError, match=reason):
            members(model, lora=False)


def test_transposed_layers_are_refused(tokenizer, tmp_path):
    dense = tiny_model("gpt2", torch.float32)
    model = twin(dense)
    convert_(model, Int4Config(), calibrated(dense))
    with pytest.raises(RankgateError, match="Conv1D"):
        compressed.write(model, tokenizer, tmp_path / "out", lora=False)
    assert not (tmp_path / "out").exists()


def test_the_command(dense, tokenizer, tmp_path, capsys):
    converted(dense, "low rank", tokenizer).save(tmp_path / "model")
    template(dense, tmp_path / "dense.gguf")
    command = ["export", str(tmp_path / "model"), "-o", str(tmp_path / "out"), "--format", "compressed-tensors"]
    assert main(command) == 2
    assert "pass --lora" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert main([*command, "--lora", "--json"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["types"] == {"W4A16": 14}
    assert "base_model_relation: quantized" in (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert load_file(tmp_path / "out-lora" / "adapter_model.safetensors")
    command[-1:] = ["gguf", "--lora"]
    assert main(command) == 2
    assert "give -o" in capsys.readouterr().err
    command[3] += ".gguf"
    assert main(command) == 2
    assert "--template" in capsys.readouterr().err
    assert main([*command, "--template", str(tmp_path / "dense.gguf")]) == 0
    assert "14 layers as Q4_0" in capsys.readouterr().out
    assert sorted(path.name for path in tmp_path.glob("*.gguf")) == ["dense.gguf", "out-lora.gguf", "out.gguf"]
    assert main(["export", str(tmp_path), "-o", "x", "--format", "gguf"]) == 2
    assert "not a converted model" in capsys.readouterr().err
