"""Converted models through transformers' own from_pretrained and save_pretrained."""

import copy

import pytest
import torch
from conftest import ARCHITECTURES, tiny_model, tokens
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
from transformers.distributed import DistributedConfig
from transformers.quantizers.auto import AutoHfQuantizer

from rankgate import RankgateConfig, RankgateError, calibrate, convert_
from rankgate.conversion.convert import converted_layers, shared_part
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
    model.dequantize()
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


HOW = {
    "int8": (METHODS["int8"](), {}),
    "svd": (METHODS["svd"](rank=0.5, allow_larger=True), {}),
    "gsi": (METHODS["gsi"](rank=0.25, eps=0.3), {}),
    "a context basis": (METHODS["gsi"](rank=0.25, eps=0.3, basis="context", allow_larger=True), {}),
    "int8 and the head": (METHODS["int8"](), {"lm_head": True}),
    "overrides": (
        METHODS["int8"](),
        {
            "overrides": {
                "mlp": None,
                "mlp.down_proj": METHODS["int4"](),
                "layers.1.self_attn": METHODS["gsi"](rank=0.5, eps=0.3, basis="context", allow_larger=True),
                "lm_head": METHODS["int8"](),
            }
        },
    ),
}


@pytest.mark.parametrize("way", HOW)
def test_what_is_converted_in_memory_can_be_saved(way, tmp_path):
    model, (method, options) = tiny_model("llama"), HOW[way]
    stats = calibrate(model, tokens(16, 32, seed=1)) if method.needs_stats else None
    convert_(model, method, stats, **options)
    model.save_pretrained(tmp_path / "out")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert [name for name, _ in converted_layers(again)] == [name for name, _ in converted_layers(model)]
    assert torch.equal(logits(again), logits(model))


def test_parts_of_names_and_the_longest_one_decides():
    model, (method, options) = tiny_model("llama"), HOW["overrides"]
    reports = {report.name: report for report in convert_(model, method, **options)}
    assert reports["model.layers.0.mlp.gate_proj"].reason and not reports["model.layers.0.mlp.down_proj"].reason
    kinds = {name: type(shared_part(layer)).__name__ for name, layer in converted_layers(model)}
    assert kinds["model.layers.1.self_attn.q_proj"] == "ContextBasis"
    assert kinds["model.layers.0.self_attn.q_proj"] == kinds["lm_head"] == "QuantizedGroup"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [({"lm_head": METHODS["int4"]()}, "int8 only"), ({"no_proj": None}, "'no_proj' is no linear")],
)
def test_overrides_that_cannot_be(overrides, message):
    with pytest.raises(RankgateError, match=message):
        convert_(tiny_model("llama"), METHODS["int8"](), overrides=overrides)


@pytest.mark.parametrize("lost", ["model.norm.weight", "model.layers.1.mlp.down_proj.weight"])
@pytest.mark.parametrize("stored", ["dense", "out"])
def test_lost_weights_are_named_and_not_made_up(stored, lost, tmp_path):
    opened(tmp_path, method="int8").save_pretrained(tmp_path / "out")
    file = tmp_path / stored / "model.safetensors"
    tensors = load_file(file)
    dropped = [name for name in tensors if name.startswith(lost.removesuffix(".weight"))]
    save_file({name: tensor for name, tensor in tensors.items() if name not in dropped}, file, {"format": "pt"})
    config = {"quantization_config": RankgateConfig("int8")} if stored == "dense" else {}
    with pytest.raises(RankgateError, match=f"lacks weights, which would be random: {min(dropped)}"):
        AutoModelForCausalLM.from_pretrained(tmp_path / stored, **config)


def test_a_new_head_may_be_random_and_is_not_converted(tmp_path):
    model = opened(tmp_path, method="int8")
    model.save_pretrained(tmp_path / "out")
    for folder, config in (("out", {}), ("dense", {"quantization_config": RankgateConfig("int8")})):
        new = AutoModelForSequenceClassification.from_pretrained(tmp_path / folder, num_labels=3, **config)
        names = [name for name, _ in converted_layers(new)]
        assert len(names) == 14 and "score" not in names


def test_what_is_offloaded_is_refused(tmp_path):
    opened(tmp_path, method="int8").save_pretrained(tmp_path / "out")
    layers = {f"model.layers.{i}": place for i, place in enumerate(("cpu", "disk"))}
    places = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu", **layers}
    for folder, config in (("out", {}), ("dense", {"quantization_config": RankgateConfig("int8")})):
        with pytest.raises(RankgateError, match="offload"):
            AutoModelForCausalLM.from_pretrained(
                tmp_path / folder, device_map=places, offload_folder=tmp_path / "spilled", **config
            )


@pytest.mark.parametrize(
    ("stored", "wanted", "said"),
    [
        (True, DistributedConfig(fsdp_size=2), "tensor parallelism alone"),
        (True, DistributedConfig(tp_size=2, pp_size=2), "tensor parallelism alone"),
        (True, DistributedConfig(tp_size=2, tp_plan={"lm_head": "replicate"}), "their own plan"),
        (False, DistributedConfig(tp_size=2), "convert and save it before"),
    ],
    ids=str,
)
def test_other_ways_to_share_a_model_are_refused(stored, wanted, said, tmp_path):
    model = opened(tmp_path, method="int8")
    model.hf_quantizer.pre_quantized = stored
    model.config.distributed_config = wanted  # as from_pretrained leaves it there
    with pytest.raises(RankgateError, match=said):
        model.hf_quantizer.preprocess_model(model)
