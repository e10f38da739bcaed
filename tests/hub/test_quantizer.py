"""Converted models through transformers' own from_pretrained and save_pretrained."""

import copy

import pytest
import torch
from conftest import ARCHITECTURES, tiny_model, tokens
from transformers import AutoModelForCausalLM
from transformers.quantizers.auto import AutoHfQuantizer

from rankgate import RankgateConfig, RankgateError, convert_
from rankgate.conversion.convert import converted_layers
from rankgate.hub.loading import dequantize_
from rankgate.methods import METHODS

SETTINGS = {
    "svd": {"rank": 0.5},
    "asvd": {"rank": 0.5},
    "gsi": {"rank": 0.25, "eps": 0.5},
    "lrq": {"rank": 4, "refine": 0.3, "rounds": 1},
    "int8": {},
    "int4": {},
    "sparse": {"keep": 0.5},
}


def opened(directory, architecture="llama", dtype=torch.float32, **settings):
    """A dense directory, and the model converted while it is loaded."""
    tiny_model(architecture, dtype).save_pretrained(directory / "dense")
    config = RankgateConfig(windows=tokens(16, 32, seed=1), **settings)
    return AutoModelForCausalLM.from_pretrained(directory / "dense", quantization_config=config)


def logits(model):
    with torch.no_grad():
        return model(input_ids=tokens(2, 20)).logits


@pytest.mark.parametrize("method", SETTINGS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_convert_on_loading_save_and_load_again(architecture, method, tmp_path):
    model = opened(tmp_path, architecture, method=method, **SETTINGS[method])
    names = [name for name, _ in converted_layers(model)]
    assert names
    model.save_pretrained(tmp_path / "out")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert [name for name, _ in converted_layers(again)] == names
    assert torch.equal(logits(again), logits(model))
    assert again.config.quantization_config.build() == METHODS[method](**SETTINGS[method])
    again.save_pretrained(tmp_path / "copy")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "copy")), logits(model))


def test_loading_converts_as_convert_does(tmp_path):
    model = opened(tmp_path, method="int8")
    dense = copy.deepcopy(AutoModelForCausalLM.from_pretrained(tmp_path / "dense"))
    convert_(dense, METHODS["int8"]())
    assert torch.equal(logits(model), logits(dense))


def test_shards_hold_every_tensor_once(tmp_path):
    model = opened(tmp_path, method="gsi", rank=0.25)
    model.save_pretrained(tmp_path / "out", max_shard_size="20KB")
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 1
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out")), logits(model))
    stored = sum(f.stat().st_size for f in (tmp_path / "out").glob("*.safetensors"))
    assert stored < 1.2 * sum(p.nbytes for p in model.parameters())


def test_no_converted_tensor_has_the_name_of_a_dense_one(tmp_path):
    model = opened(tmp_path, method="int8")
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "dense").state_dict()
    stored, _ = model.hf_quantizer.get_state_dict_and_metadata(model)
    for name, _ in converted_layers(model):
        assert f"{name}.weight" in dense and f"{name}.weight" not in stored


def test_layers_left_dense_and_layers_of_another_method(tmp_path):
    model = opened(
        tmp_path, method="int4", modules_to_not_convert=["o_proj"], overrides={"down_proj": {"name": "int8"}}
    )
    bits = {name.rpartition(".")[2]: layer.group.base.bits for name, layer in converted_layers(model)}
    assert bits == {"q_proj": 4, "k_proj": 4, "v_proj": 4, "gate_proj": 4, "up_proj": 4, "down_proj": 8}
    model.save_pretrained(tmp_path / "out")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out")), logits(model))


@pytest.mark.parametrize("method", SETTINGS)
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "opt"])
def test_dequantized_it_answers_as_with_all_gates_open(architecture, method, tmp_path):
    settings = {**SETTINGS[method], **({"eps": 0.0} if method == "gsi" else {})}
    settings |= {"refine": 1.0} if method == "lrq" else {"keep": 1.0} if method == "sparse" else {}
    model = opened(tmp_path, architecture, torch.float64, method=method, **settings)
    before = logits(model)
    dense = model.dequantize()
    assert not list(converted_layers(dense)) and not getattr(dense, "is_quantized", False)
    assert torch.allclose(logits(dense), before, rtol=1e-5, atol=1e-5)
    dense.save_pretrained(tmp_path / "out")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.allclose(logits(again), logits(dense), rtol=1e-6, atol=1e-6)


def test_tied_weights_stay_tied_when_dequantized(tmp_path):
    model = opened(tmp_path, "gpt2", method="int8")
    dequantize_(model)
    assert model.lm_head.weight is model.transformer.wte.weight


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_a_rounded_output_embedding_stays_rounded_when_dequantized(architecture, tmp_path):
    model = tiny_model(architecture)
    convert_(model, METHODS["int8"](), lm_head=True)
    before = logits(model)
    dequantize_(model)
    assert torch.allclose(logits(model), before, rtol=1e-3, atol=1e-3 * float(before.abs().max()))
    model.save_pretrained(tmp_path / "out")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out")), logits(model))


def test_weights_need_no_gradient_once_loaded(tmp_path):
    model = opened(tmp_path, method="lrq", **SETTINGS["lrq"])
    model.save_pretrained(tmp_path / "out")
    for one in (model, AutoModelForCausalLM.from_pretrained(tmp_path / "out")):
        assert not any(p.requires_grad for _, layer in converted_layers(one) for p in layer.parameters())


def test_what_transformers_asks():
    quantizer = AutoHfQuantizer.from_config(RankgateConfig("int4"))
    assert quantizer.is_serializable() and quantizer.is_compileable and quantizer.is_trainable


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"method": "int3"}, "'int3' is no method; use one of"),
        ({"method": "int4", "rank": 3}, "int4 does not take these settings"),
        ({"method": "int4", "overrides": {"nowhere": {"name": "int8"}}}, "'nowhere' is no linear of this model"),
        ({"method": "int4", "modules_to_not_convert": ["nowhere"]}, "'nowhere' is no linear of this model"),
    ],
)
def test_settings_that_cannot_be(settings, message, tmp_path):
    with pytest.raises(RankgateError, match=message):
        opened(tmp_path, **settings)


def test_without_windows_or_tokenizer_there_is_nothing_to_calibrate_on(tmp_path):
    tiny_model("llama").save_pretrained(tmp_path)
    with pytest.raises(RankgateError, match="windows="):
        AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=RankgateConfig("lrq"))
