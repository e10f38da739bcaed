"""The fast loop on a GPU; skipped where there is none. The kernels themselves are in ops/test_gpu_kernels.py."""

import functools

import pytest
import torch
from conftest import tiny_model, tokens
from test_batch import LENGTHS, NEW, together, write
from test_decode import CAPTURED, METHODS, MODES, Recorder, both, captured, variant
from test_experts import MIXTURES, converted
from transformers import PreTrainedModel

from rankgate.attention.attend import AttentionConfig, select_tokens_
from rankgate.attention.strands import Heads
from rankgate.conversion.calibration import calibrate
from rankgate.conversion.convert import convert_
from rankgate.decoding import steps as module
from rankgate.decoding.batch import Batch
from rankgate.decoding.exact import LONGEST, Costs, exact_generate
from rankgate.decoding.loop import fast_generate
from rankgate.methods import Int8Config
from rankgate.ops.attention import STEP

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    pytest.mark.filterwarnings("ignore:.*without the fast path"),
]
VARIANTS = [(a, "dense") for a in sorted(CAPTURED)] + [("llama", m) for m in METHODS if m not in {"dense", "context"}]


def on_gpu(architecture: str, method: str) -> PreTrainedModel:
    return variant(architecture, method).to("cuda")


@pytest.mark.parametrize(("architecture", "method"), VARIANTS, ids=str)
def test_same_tokens(architecture: str, method: str):
    model = on_gpu(architecture, method)
    for mode in MODES:
        for length in (7, 1, 40):
            expected, got = both(model, tokens(1, length, seed=length).cuda(), **MODES[mode])
            assert torch.equal(expected, got)
    assert captured(model)


@pytest.mark.parametrize(("architecture", "method"), VARIANTS, ids=str)
def test_several_sequences(architecture: str, method: str):
    model, ids = on_gpu(architecture, method), tokens(3, 9).cuda()
    mask = torch.ones_like(ids)
    mask[0, :4] = mask[2, :1] = 0
    for given in (torch.ones_like(ids), mask):
        expected, got = both(model, ids, attention_mask=given)
        assert torch.equal(expected, got)
    assert module.captured(model, sequences=3) is not None


def test_fewer_keys_by_head():
    model = on_gpu("llama", "dense")
    every, options = Heads(None, None), {"max_new_tokens": 2 * STEP, "min_new_tokens": 2 * STEP}
    config = AttentionConfig(heads=((every, Heads(40, None)), (Heads(STEP, 0.9), Heads(3 * STEP, None))))
    for length in (3, STEP - 1, 3 * STEP + 5):
        with select_tokens_(model, config) as selection:
            expected, got = both(model, tokens(1, length, seed=length).cuda(), **options)
        assert torch.equal(expected, got)
        assert 0 < selection.share < 1
    assert captured(model)


@pytest.mark.parametrize("method", ["int8", "lrq"])
@pytest.mark.parametrize("name", MIXTURES)
def test_converted_experts(name: str, method: str):
    model = converted(name, method).to("cuda")
    for ids in (tokens(1, 9).cuda(), tokens(3, 5).cuda()):
        expected, got = both(model, ids)
        assert torch.equal(expected, got)
        assert module.captured(model, sequences=len(ids)) is not None


def test_one_graph_serves_every_sequence_and_length(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "CAPACITY", 8)
    model = on_gpu("llama", "lrq")
    for length, new in ((3, 30), (7, 2), (9, 9), (40, 60)):
        expected, got = both(model, tokens(1, length, seed=length).cuda(), max_new_tokens=new, min_new_tokens=new)
        assert torch.equal(expected, got)
        if length == 3:
            graph = module.captured(model)
    assert module.captured(model) is graph


def test_a_sequence_within_a_sequence():
    """A streamer that generates with the same model finds and leaves everything in order."""
    model, ids = on_gpu("llama", "dense"), tokens(1, 5).cuda()
    options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 12, "do_sample": False, "pad_token_id": 1}
    alone = fast_generate(model, ids, **options)

    class Nested(Recorder):
        def put(self, value):
            super().put(value)
            assert torch.equal(fast_generate(model, ids, **options), alone)

    assert torch.equal(fast_generate(model, ids, streamer=Nested(), **options), alone)


@pytest.mark.parametrize("method", ["dense", "lrq"])
def test_texts_of_a_batch_are_as_alone(method: str):
    model, batch = on_gpu("llama", method), Batch(4)
    calls = [
        functools.partial(write, model, tokens(1, n, seed=n).cuda(), new) for n, new in zip(LENGTHS, NEW, strict=True)
    ]
    for got, call in zip(together(batch, calls), calls, strict=True):
        assert torch.equal(got, call())


@pytest.mark.parametrize("architecture", sorted(CAPTURED))
def test_exact_mode_verifies_in_one_graph(architecture: str):
    model, draft = on_gpu(architecture, "dense"), on_gpu(architecture, "dense")
    convert_(draft, Int8Config())
    ids = tokens(1, 7).cuda()
    options = {"attention_mask": torch.ones_like(ids), "do_sample": False, "pad_token_id": 1}
    options |= {"max_new_tokens": 40, "min_new_tokens": 40}
    got, seen = exact_generate(model, draft, ids, costs=Costs(0.1), **options)
    assert torch.equal(got, model.generate(ids, **options))
    assert seen.accepted > 10
    assert None not in (module.captured(model, LONGEST + 1), module.captured(draft))


def test_statistics_are_those_of_the_cpu():
    here, there = (calibrate(tiny_model("llama").to(device), tokens(16, 32, seed=1)) for device in ("cpu", "cuda"))
    for a, b in zip(here.groups, there.groups, strict=True):
        assert b.C.device.type == "cpu"
        torch.testing.assert_close(a.C, b.C, rtol=1e-4, atol=1e-5)


def test_conversion_on_the_gpu():
    """Sensitivities are sampled differently there, so the models differ; they are equally close to the dense one.

    Read on the CPU: a prompt on a GPU has every channel open and comes nearer.
    """
    ids, errors = tokens(2, 30), []
    dense = tiny_model("llama")(ids).logits
    for device in ("cpu", "cuda"):
        converted = tiny_model("llama").to(device)
        convert_(converted, METHODS["lrq"], calibrate(converted, tokens(16, 32, seed=1), sensitivity=True))
        with torch.no_grad():
            errors.append(float((converted.cpu()(ids).logits - dense).norm()))
    assert 0.7 < errors[0] / errors[1] < 1.4
