"""Attention to fewer keys by head in captured steps: the same tokens, and share of keys, as with the model's own."""

from __future__ import annotations

import pytest
import torch
from conftest import tokens
from test_decode import captured, variant

from rankgate.attention import held
from rankgate.attention.attend import AttentionConfig, select_tokens_
from rankgate.attention.strands import Heads
from rankgate.decoding import steps
from rankgate.decoding.exact import exact_generate
from rankgate.decoding.loop import decode
from rankgate.errors import RankgateError
from rankgate.ops import attention as windows
from rankgate.ops.attention import attend_held_reference
from rankgate.ops.cpu.attention import attend, attend_held

ALL = Heads(None, None)
KINDS = {  # of the two key heads of each of two layers
    "all": ((ALL, ALL), (ALL, ALL)),
    "windows": ((Heads(3, None), Heads(3, None)), (Heads(6, None), Heads(20, None))),
    "representatives": ((Heads(5, 0.9), Heads(1, 0.9)), (Heads(8, 0.7), Heads(5, 1.0))),
    "each": ((ALL, Heads(6, None)), (Heads(4, 0.9), ALL)),
}

OPTIONS = {"max_new_tokens": 40, "min_new_tokens": 40, "pad_token_id": 1, "do_sample": False}


@pytest.fixture(autouse=True)
def windows_move_often(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(windows, "STEP", 4)


@pytest.mark.parametrize("method", ["dense", "lrq"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
def test_same_tokens_and_share_as_generate(architecture: str, kind: str, method: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(steps, "CAPACITY", 16)
    monkeypatch.setattr(held, "KEPT", 4)
    model, config = variant(architecture, method), AttentionConfig(heads=KINDS[kind], sinks=3)
    for length in (1, 2, 5, 8, 23, 40):  # fewer than sinks, than windows, and more
        found = []
        for custom in ({}, {"custom_generate": decode}):
            with select_tokens_(model, config) as selection:
                found.append((model.generate(tokens(1, length, seed=length), **OPTIONS, **custom), selection.share))
                assert not custom or captured(model)
        (expected, share), (got, read) = found
        assert torch.equal(expected, got)
        assert read == pytest.approx(share, rel=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize(("heads", "width", "value_width"), [(9, 64, 64), (3, 5, 7), (6, 33, 16)])
@pytest.mark.parametrize("position", [2, 3, 10, 11, 12, 60])
def test_the_kernel_is_its_definition(dtype: torch.dtype, heads: int, width: int, value_width: int, position: int):
    generator = torch.Generator().manual_seed(position)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    # one that reads all, a short window after sinks, a longer one after representatives, in a ring that is not full
    rows = torch.tensor([[0, 0, 0, 64, windows.ALWAYS, 0], [64, 2, 66, 8, 3, 2], [74, 30, 110, 16, 12, 2]])
    q, k, v = random(1, heads, 1, width), random(1, 3, 1, width), random(1, 3, 1, value_width)
    keys, values, bias = random(126, width), random(126, value_width), torch.rand(126, generator=generator) * 4
    at = torch.tensor([[position]])
    plain_keys, plain_values = keys.clone(), values.clone()
    plain = attend_held_reference(q, k, v, plain_keys, plain_values, bias, rows, at, 0.3)
    exact = attend_held_reference(*(t.double() for t in (q, k, v, keys, values, bias)), rows, at, 0.3)
    got = attend_held(q, k, v, keys, values, bias, rows, at, 0.3)
    assert got.shape == (1, 1, heads, value_width)
    assert got.dtype == dtype
    assert torch.equal(keys, plain_keys)
    assert torch.equal(values, plain_values)
    assert (got - exact).norm() <= 2 * (plain - exact).norm() + 1e-6 * exact.norm()


def test_what_is_not_held_is_never_read():
    rows = torch.tensor([[0, 3, 8, 8, 3, 2]])
    keys, values, bias = torch.full((16, 4), torch.nan), torch.full((16, 4), torch.nan), torch.full((16,), torch.nan)
    for t in (0, 1, 2, *(8 + t % 8 for t in range(5, 10))):  # query 9 is in the step from 8 on
        keys[t] = values[t] = bias[t] = 1
    new = torch.ones(1, 1, 1, 4)
    for call in (attend_held, attend_held_reference):
        got = call(new, new, new, keys.clone(), values.clone(), bias, rows, torch.tensor([[9]]), 0.5)
        torch.testing.assert_close(got, new)


def test_all_heads_reading_all_is_dense_attention():
    torch.manual_seed(0)
    new, cache = [torch.randn(1, heads, 1, 8) for heads in (4, 2, 2)], [torch.randn(1, 2, 64, 8) for _ in "kv"]
    position = torch.tensor([[37]])
    expected = attend(*new, *(t.clone() for t in cache), position, 0.3)
    torch.testing.assert_close(attend_held(*new, *held.as_rows(*cache), position, 0.3), expected)


@pytest.mark.parametrize("config", [AttentionConfig(), AttentionConfig("paper"), AttentionConfig(heads=KINDS["each"])])
def test_what_is_not_captured_is_left_to_the_model(config: AttentionConfig):
    model, ids = variant("llama", "dense"), tokens(1 if config.heads is None else 2, 12)
    with select_tokens_(model, config):
        expected = model.generate(ids, **OPTIONS)
        with pytest.warns(UserWarning, match="fast path: attention to"):
            got = model.generate(ids, **OPTIONS, custom_generate=decode)
    assert torch.equal(expected, got)


def test_exact_mode_is_refused():
    model, draft = variant("llama", "dense"), variant("llama", "lrq")
    with select_tokens_(draft, AttentionConfig(heads=KINDS["all"])), pytest.raises(RankgateError, match="fewer keys"):
        exact_generate(model, draft, tokens(1, 5), **OPTIONS)


def test_other_hooks_are_still_a_reason():
    model = variant("llama", "dense")
    model.model.layers[0].register_forward_hook(lambda *_: None)
    with select_tokens_(model, AttentionConfig(heads=KINDS["all"])), pytest.warns(UserWarning, match="hooks"):
        model.generate(tokens(1, 5), **OPTIONS, custom_generate=decode)
