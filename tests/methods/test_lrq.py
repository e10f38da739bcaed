"""`lrq` and the quantised baselines in whole models: exact limits, gates, and what is refused."""

import copy
import itertools
import weakref

import pytest
import torch
from conftest import ARCHITECTURES, calibrated, tiny_model, tokens

from rankgate.common.copies import twin
from rankgate.conversion.calibration import calibrate
from rankgate.conversion.convert import convert_, converted_layers
from rankgate.conversion.evaluation import evaluate
from rankgate.conversion.groups import read_linear
from rankgate.errors import RankgateError
from rankgate.methods import GSIConfig, Int4Config, Int8Config, LRQConfig, SparseConfig
from rankgate.quantized import QuantizedGroup, QuantizedHead

DTYPES = (torch.float32, torch.bfloat16)
CLOSE = LRQConfig(bits=8, rank=8, refine=1.0, rounds=1)


def convert(dense, method, **options):
    model = twin(dense)
    reports = convert_(model, method, calibrated(dense, sensitivity=method.needs_sensitivity), **options)
    return model, reports


def dense_weight(model, name):
    return read_linear(name, model.get_submodule(name)).W


def logits(model, length=24):
    with torch.no_grad():
        return model(input_ids=tokens(2, length)).logits.double()


def distance(model, dense):
    expected = logits(dense)
    return ((logits(model) - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_open_gates_on_8_bits_are_close_to_dense(architecture, dtype):
    """The plane rounds what 8 bits leave to 4 bits more: 2⁻¹² of a range, where bfloat16 itself has 2⁻⁹."""
    dense = tiny_model(architecture, dtype)
    model, reports = convert(dense, CLOSE)
    assert sum(not report.reason for report in reports) >= 4
    exact = copy.deepcopy(dense).double()
    if dtype == torch.bfloat16:
        assert distance(model, exact) <= 2 * distance(dense, exact)
    else:
        assert distance(model, exact) <= 2e-3


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_weights_are_those_of_the_stored_parts(architecture):
    """With open gates the layer is Q + A B + E; each part brings it closer to W where outputs matter."""
    dense = tiny_model(architecture)
    for method, parts in (
        (LRQConfig(rank=8, refine=0.0), 2),
        (LRQConfig(rank=0, refine=1.0), 2),
        (LRQConfig(rank=8, refine=1.0, symmetric=False), 3),
    ):
        model, _ = convert(dense, method)
        used = 0
        for name, layer in converted_layers(model):
            assert isinstance(layer.group, QuantizedGroup)
            stored = [part for part in (layer.group.base, layer.group.low_rank, layer.group.refinement) if part]
            used = max(used, len(stored))
            W = sum(part.dequantize() for part in stored)[layer.start : layer.stop]
            x = torch.randn(30, layer.in_features)
            y = layer.group.reference(x)[:, layer.start : layer.stop]  # kernels round x
            torch.testing.assert_close(y, x @ W.T, rtol=1e-4, atol=1e-4)
            original = dense_weight(dense, name)
            assert (W - original).norm() <= 0.2 * original.norm()
        assert used == parts


@pytest.mark.parametrize("refine", [0.05, 0.5])
def test_gates_read_the_fraction_of_the_calibration_text(refine):
    dense = tiny_model("llama")
    windows = tokens(8, 32)  # 256 tokens: all of them are sampled
    model = twin(dense)
    stats = calibrate(dense, windows, sensitivity=True)
    convert_(model, LRQConfig(rank=0, refine=refine), stats)
    read = total = 0.0
    for group in stats.groups:
        quantized = model.get_submodule(group.members[0]).group
        size = quantized.base.m * quantized.base.n
        read += quantized.refinement.gate(group.sample.float()).float().mean().item() * size
        total += size
    assert read / total == pytest.approx(refine, abs=0.005)
    result = evaluate(dense, model, windows)  # the same text, but what quantised layers see of it
    assert result.fire_rate == pytest.approx(refine, abs=0.05)
    assert set(result.fire_rates) == {group.members[0] for group in stats.groups}


def test_the_sparse_baseline_reads_what_it_keeps_in_every_group():
    dense = tiny_model("llama")
    windows = tokens(8, 32)
    model = twin(dense)
    stats = calibrate(dense, windows)
    convert_(model, SparseConfig(keep=0.25), stats)
    for group in stats.groups:
        read = model.get_submodule(group.members[0]).gate(group.sample.float()).float().mean().item()
        assert read == pytest.approx(0.25, abs=0.005)
    assert len(evaluate(dense, model, windows).fire_rates) == len(stats.groups)
    first = model.model.layers[0].mlp.gate_proj
    assert first.gate is model.model.layers[0].mlp.up_proj.gate
    assert first.W.data_ptr() == dense.model.layers[0].mlp.gate_proj.weight.data_ptr()


def test_every_part_pays():
    dense = tiny_model("llama")
    methods = (
        Int4Config(),
        LRQConfig(rank=0, refine=0.0),
        LRQConfig(rank=8, refine=0.0),
        LRQConfig(rank=8, refine=0.5),
        LRQConfig(bits=8, rank=0, refine=0.0),
    )
    windows = tokens(16, 32, seed=1)
    losses = [evaluate(dense, convert(dense, method)[0], windows).kl_mean for method in methods]
    assert all(better < worse for worse, better in itertools.pairwise(losses))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_int8_rounds_to_nearest(architecture, dtype):
    dense = tiny_model(architecture, dtype)
    model, reports = convert(dense, Int8Config(), lm_head=True)
    assert distance(model, copy.deepcopy(dense).double()) <= 0.03
    for name, layer in converted_layers(model):
        W = dense_weight(dense, name).float()
        step = W.abs().amax() / 128
        stored = layer.group.base.dequantize()[layer.start : layer.stop]
        assert (stored - W).abs().max() <= 16 * step  # a shrunken range clips the largest weights
        assert (stored - W).square().mean().sqrt() <= step
    assert [r.name for r in reports][-1] == "lm_head" and not reports[-1].reason


def test_a_cast_leaves_what_is_stored():
    model = tiny_model("llama", torch.bfloat16)
    convert_(model, LRQConfig(rank=8, refine=0.3, rounds=1), calibrated(model, sensitivity=True))
    before, expected = model.state_dict(), model(input_ids=tokens(1, 9)).logits
    logits = model.half().float()(input_ids=tokens(1, 9)).logits
    assert (logits - expected).norm() < 0.05 * expected.norm()
    after = model.state_dict()
    stored = [name for name in before if ".group." in name]
    assert stored and all(after[name].dtype == before[name].dtype for name in stored)
    assert all(torch.equal(after[name], before[name]) for name in stored)


@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_the_input_embedding_keeps_its_dense_weight(architecture):
    dense = tiny_model(architecture)
    embedding = dense.get_input_embeddings().weight.clone()
    model, _ = convert(dense, Int4Config(), lm_head=True)
    assert torch.equal(model.get_input_embeddings().weight, embedding)
    assert isinstance(model.get_output_embeddings(), QuantizedHead)
    assert isinstance(dense.get_output_embeddings(), torch.nn.Linear)
    ids = model.generate(input_ids=tokens(2, 5), attention_mask=torch.ones(2, 5), max_new_tokens=4, do_sample=False)
    assert ids.shape == (2, 9)


@pytest.mark.parametrize("method", [LRQConfig(rank=0, refine=0.0), GSIConfig(rank=0.25)], ids=lambda m: m.name)
def test_dense_weights_go_as_soon_as_they_are_replaced(method):
    model = tiny_model("llama")
    stats = calibrated(model, sensitivity=True)
    weights = {name: weakref.ref(model.get_submodule(name).weight) for group in stats.groups for name in group.members}
    alive = []
    original = type(method).rewrite

    def rewrite(self, groups, kept):
        for rewrites in original(self, groups, kept):
            alive.append(sum(ref() is not None for ref in weights.values()))
            yield rewrites

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(method), "rewrite", rewrite)
        convert_(model, method, stats)
    assert alive[0] == len(weights) and alive[-1] <= 4
    assert all(ref() is None for ref in weights.values())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"bits": 5}, "5 bits are not supported"),
        ({"rank": -1}, "rank -1"),
        ({"rank": 0.25}, "rank 0.25"),
        ({"refine": 2.0}, "refine 2.0"),
        ({"refine": -0.1}, "refine -0.1"),
        ({"refine": float("nan")}, "refine nan"),
        ({"rounds": 0}, "0 rounds"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(RankgateError, match=message):
        LRQConfig(**settings)


def test_statistics_must_be_there_and_know_the_sensitivity():
    model = tiny_model("llama")
    with pytest.raises(RankgateError, match="needs calibration"):
        convert_(model, LRQConfig())
    with pytest.raises(RankgateError, match="sensitivity=True"):
        convert_(model, LRQConfig(), calibrated(model))
    assert not list(converted_layers(model))


def test_consumed_statistics_make_the_same_model_and_hold_no_second_moments():
    dense = tiny_model("llama")
    stats = calibrated(dense, sensitivity=True)
    kept, consumed = twin(dense), twin(dense)
    convert_(kept, LRQConfig(rank=8, refine=0.2), stats)
    assert all(group.C.numel() for group in stats.groups)
    convert_(consumed, LRQConfig(rank=8, refine=0.2), stats, consume=True)
    assert torch.equal(logits(consumed), logits(kept))
    assert not any(group.C.numel() for group in stats.groups)
