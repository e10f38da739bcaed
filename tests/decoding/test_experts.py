"""Experts of a mixture as linears of their own: the same numbers, converted, captured, stored, counted."""

import pytest
import torch
import transformers
from conftest import VOCAB, tokens
from test_decode import both, captured
from transformers import AutoModelForCausalLM

from rankgate import GSIConfig, Int8Config, LRQConfig, SVDConfig, calibrate, convert_, twin
from rankgate.conversion.convert import converted_layers
from rankgate.conversion.gates import record_gates
from rankgate.conversion.reads import weight_reads
from rankgate.decoding import steps
from rankgate.experts import Experts, experts_of, unstack_, unstacked
from rankgate.hub.checkpoint import RankgateQuantizer
from rankgate.methods.quantize import nearest
from rankgate.quantized import QuantizedGroup

pytestmark = pytest.mark.filterwarnings("ignore:.*without the fast path")
SIZES = {"vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "pad_token_id": 1}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128, "num_experts_per_tok": 2}
MIXTURES = {
    "Mixtral": {"num_local_experts": 6},
    "Qwen3Moe": {"num_experts": 6, "moe_intermediate_size": 24, "head_dim": 8},
    "GptOss": {"num_local_experts": 6, "head_dim": 8, "sliding_window": 8},
}
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"))]
METHODS = {"int8": Int8Config(), "lrq": LRQConfig(rank=8, rounds=1), "gsi": GSIConfig(rank=8), "svd": SVDConfig(rank=8)}


def mixture(name):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(getattr(transformers, f"{name}Config")(**SIZES, **HEADS, **MIXTURES[name]))
    with torch.no_grad():
        for leaf, weight in model.named_parameters():
            if "norm" not in leaf:
                weight.add_(torch.randn(weight.shape) * 0.1)
    return model.eval()


def converted(name, method):
    model = mixture(name)
    convert_(model, METHODS[method], calibrate(model, tokens(16, 32, seed=1), sensitivity=True))
    return model


def logits(model, ids):
    with torch.no_grad():
        return model(ids).logits


@pytest.mark.parametrize("name", MIXTURES)
def test_the_same_numbers_on_the_same_memory(name):
    model, ids = mixture(name), tokens(2, 20)
    memory = {p.untyped_storage().data_ptr() for p in model.parameters()}
    apart = unstacked(model)
    assert not experts_of(model) and len(experts_of(apart)) == 2
    assert torch.allclose(logits(apart, ids), logits(model, ids), atol=1e-5)
    held = {p.untyped_storage().data_ptr() for p in apart.parameters()}
    assert held <= memory or MIXTURES[name] == MIXTURES["GptOss"]  # which is stored the other way round
    assert unstacked(apart) is apart


def test_each_expert_is_calibrated_on_its_own_tokens():
    model, windows = mixture("Mixtral"), tokens(16, 32, seed=1)
    apart, seen = unstacked(model), {}
    for name, module in apart.named_modules():
        if name.endswith("gate_up_proj"):
            module.register_forward_pre_hook(lambda _, args, name=name: seen.setdefault(name, []).append(args[0]))
    logits(apart, windows)
    stats = {group.members: group for group in calibrate(model, windows).groups}
    assert len(seen) == 12 and not experts_of(model)
    for name, parts in seen.items():
        x = torch.cat(parts)
        group = stats[name,]
        assert group.tokens == len(x) >= 32
        assert torch.allclose(group.C, x.T @ x / len(x), atol=1e-5)


def test_an_expert_that_saw_few_tokens_borrows_from_the_others(caplog):
    model = mixture("Mixtral")
    for layer in model.model.layers:
        layer.mlp.gate.weight.data[0] = -100 * layer.mlp.gate.weight.data[1]  # hardly ever chosen
        layer.mlp.gate.weight.data[1:] *= 0.01
    stats = calibrate(model, tokens(4, 16, seed=1), sensitivity=True)
    assert "saw few tokens" in caplog.text
    for group in stats.groups:
        assert group.tokens >= 32 and torch.isfinite(group.C).all() and group.C.diagonal().sum() > 0
    convert_(model, METHODS["lrq"], stats)
    assert torch.isfinite(logits(model, tokens(1, 9))).all()


@pytest.mark.parametrize("method", ["int8", "lrq"])
@pytest.mark.parametrize("name", MIXTURES)
def test_captured_steps_write_the_same_text(name, method):
    model = converted(name, method)
    for ids in (tokens(1, 9), tokens(3, 5)):
        expected, got = both(model, ids)
        assert torch.equal(expected, got)
        assert steps.captured(model, sequences=len(ids)) is not None


@pytest.mark.parametrize("method", ["gsi", "svd"])
def test_experts_with_subspaces_in_captured_steps(method):
    model = converted("Qwen3Moe", method)
    for ids in (tokens(1, 9), tokens(3, 5)):
        expected, got = both(model, ids)
        assert torch.equal(expected, got)
        assert steps.captured(model, sequences=len(ids)) is not None


def test_each_row_by_the_subspace_of_its_expert():
    torch.manual_seed(0)
    B, A, W = ([torch.randn(shape) for _ in range(3)] for shape in ((4, 9), (7, 4), (7, 9)))
    x, chosen = torch.randn(4, 9), torch.tensor([2, 0, 0, 1])
    for eps, full in ((None, []), (0.0, W), (1e9, W)):
        expected = [(W[e] if eps == 0 else A[e] @ B[e]) @ row for row, e in zip(x, chosen.tolist(), strict=True)]
        y = torch.ops.rankgate.chosen_gated(x, chosen, B, A, full, eps)
        assert torch.allclose(y, torch.stack(expected), atol=1e-5)


def test_experts_beside_dense_ones_are_left_to_the_model():
    model = mixture("Mixtral")
    convert_(model, Int8Config(), overrides={"experts.1": None})
    with pytest.warns(UserWarning, match="experts that stay dense"):
        expected, got = both(model, tokens(1, 9))
    assert torch.equal(expected, got) and not captured(model)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("method", ["int8", "lrq"])
def test_a_step_reads_no_other_experts(method, device):
    """Scales of the others are not finite."""
    model, ids = converted("Mixtral", method).to(device), tokens(1, 9).to(device)
    both(model, ids)
    capture = steps.captured(model)
    chosen = {}
    for name, experts in experts_of(model).items():
        experts.register_forward_pre_hook(
            lambda _, args, name=name: chosen.update({name: {*args[1].flatten().tolist()}})
        )
    buffers = [torch.zeros(1, 2, 16, 8, device=device) for _ in range(4)]
    expected = logits(model, ids[:, :1])[0]
    for name, experts in experts_of(model).items():
        assert len(chosen[name]) == 2
        for number, expert in enumerate(experts):
            if number not in chosen[name]:
                expert["down_proj"].group.base.scale.fill_(torch.nan)
    got = capture(ids[:, :1], torch.zeros_like(ids[:, :1]), buffers)
    assert torch.allclose(got, expected, atol=1e-2 * float(expected.abs().max()))


def test_products_by_tables_of_unlike_ranks():
    torch.manual_seed(0)
    weights = [torch.randn(70, 130) for _ in range(3)]
    groups = [QuantizedGroup(nearest(W, bits=bits), None, None) for W, bits in zip(weights, (4, 8, 4), strict=True)]
    tables, chosen = torch.tensor([group.table() for group in groups]), torch.tensor([2, 0, 1, 1])
    x = torch.randn(4, 130)
    y = torch.ops.rankgate.chosen_linear(x, tables, chosen, 70)
    expected = torch.stack([groups[e](row) for row, e in zip(x, chosen.tolist(), strict=True)])
    assert torch.equal(y, expected)


def test_reads_are_those_of_the_chosen():
    model = converted("Mixtral", "int8")
    with record_gates(model) as gates:
        logits(model, tokens(1, 9))
    reads = weight_reads(model, gates)
    attention, expert = 2 * (2 * 32 * 32 + 2 * 16 * 32), 3 * 32 * 48
    assert reads.weights == attention + 2 * 2 * expert
    assert reads.dense == 4 * reads.weights


@pytest.mark.parametrize("others", [{"experts": None}, {"experts.1": None, "down_proj": Int8Config()}])
def test_experts_that_stay_dense_are_stored(others, tmp_path):
    model, ids = mixture("Mixtral"), tokens(1, 9)
    convert_(model, Int8Config(), overrides=others)
    dense = [
        name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear) and "experts" in name
    ]
    assert dense and list(converted_layers(model))
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(loaded, ids), logits(model, ids))


def test_a_mixture_that_was_stored_with_stacks_opens(tmp_path):
    """As conversions before did: whose configuration names no experts."""
    model, ids = mixture("Mixtral"), tokens(1, 9)
    whole = twin(model)
    convert_(model, Int8Config(), overrides={"mlp": None})
    for layer, dense in zip(model.model.layers, whole.model.layers, strict=True):
        layer.mlp.experts = dense.mlp.experts
    model.config.quantization_config.experts = []
    assert isinstance(model.hf_quantizer, RankgateQuantizer)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert not experts_of(loaded)
    assert torch.equal(logits(loaded, ids), logits(model, ids))


def test_what_transformers_does_not_compute_from_stacks_stays():
    model = mixture("Mixtral")
    del model.model.layers[0].mlp.experts.down_proj
    unstack_(model)
    assert [isinstance(layer.mlp.experts, Experts) for layer in model.model.layers] == [False, True]
