"""Texts that share steps: each is the one that its thread would write alone."""

import functools
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from conftest import tiny_model, tokens
from test_decode import CAPTURED, Recorder, captured, variant
from transformers import DynamicCache

from rankgate import RankgateError
from rankgate.decoding import batch as module
from rankgate.decoding.batch import Batch, Text
from rankgate.decoding.loop import decode, fast_generate
from rankgate.decoding.steps import Steps

LENGTHS, NEW = (1, 7, 30, 12, 3, 19), (20, 33, 8, 40, 11, 26)


def write(model, ids, new, batch=None, seed=None, streamer=None, **how):
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    return fast_generate(
        model,
        ids,
        loop=functools.partial(decode, batch=batch, generator=generator),
        attention_mask=torch.ones_like(ids),
        max_new_tokens=new,
        min_new_tokens=new,
        pad_token_id=1,
        streamer=streamer,
        **{"do_sample": seed is not None, **how},
    )


def together(batch, calls):
    with ThreadPoolExecutor(len(calls)) as pool:
        return [done.result() for done in [pool.submit(call, batch=batch) for call in calls]]


@torch.no_grad()
def assert_same(model, got, alone, close):
    """The same text, up to a token whose logit is within ``close`` of the best (kernels for one token and for several
    round activations by other rules).
    """
    if not torch.equal(got, alone):
        at = int((got != alone)[0].nonzero()[0])
        logits = model(alone[:, :at]).logits[0, -1]
        assert abs(float(logits[got[0, at]] - logits[alone[0, at]])) < close


VARIANTS = [(a, "dense") for a in sorted(CAPTURED)] + [("llama", "lrq"), ("llama", "gsi"), ("llama", "sparse")]


@pytest.mark.parametrize(("architecture", "method"), VARIANTS, ids=str)
def test_each_text_is_as_alone(architecture, method):
    model = variant(architecture, method)
    prompts = [tokens(1, length, seed=length) for length in LENGTHS]
    calls = [functools.partial(write, model, ids, new) for ids, new in zip(prompts, NEW, strict=True)]
    for most in (1, 4, 8):
        batch = Batch(most)
        for got, call in zip(together(batch, calls), calls, strict=True):
            assert_same(model, got, call(), close=1e-2 if method == "lrq" else 0.0)
        assert not batch.texts and batch.begun is None
    assert captured(model)


def test_samples_are_those_of_the_seed():
    model, ids = tiny_model("llama"), tokens(1, 5)
    calls = [functools.partial(write, model, ids, 20, seed=seed, temperature=1.5) for seed in range(4)]
    alone = [call() for call in calls]
    assert len({tuple(text[0].tolist()) for text in alone}) == 4
    for got, text in zip(together(Batch(4), calls), alone, strict=True):
        assert torch.equal(got, text)


def test_a_cache_grows_and_moves_with_its_texts(monkeypatch):
    monkeypatch.setattr(module, "CAPACITY", 8)
    model, prompts = tiny_model("llama"), [tokens(1, n, seed=n) for n in (3, 60, 9)]
    calls = [functools.partial(write, model, ids, 30) for ids in prompts]
    batch = Batch(4)
    for got, call in zip(together(batch, calls), calls, strict=True):
        assert torch.equal(got, call())
    assert torch.equal(write(model, tokens(1, 100), 28, batch), write(model, tokens(1, 100), 28))
    assert batch.capacity == 128


class Gone(Recorder):
    """A streamer that fails at its third token."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def put(self, value):
        self.count += 1
        if self.count == 4:
            raise KeyError("a reader that went away")
        super().put(value)


def test_a_text_that_ends_by_an_error_leaves_the_others():
    model, ids, batch = tiny_model("llama"), tokens(1, 5), Batch(4)
    with ThreadPoolExecutor(3) as pool:
        others = [pool.submit(write, model, ids, 25, batch) for _ in "ab"]
        with pytest.raises(KeyError):
            write(model, ids, 25, batch, streamer=Gone())
        assert all(torch.equal(other.result(), write(model, ids, 25)) for other in others)
    assert not batch.texts


def test_a_step_that_fails_tells_every_text(monkeypatch):
    model, ids, batch = tiny_model("llama"), tokens(1, 5), Batch(2)
    write(model, ids, 3, batch)

    def broken(*_):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(batch, "step", broken)
    with pytest.raises(RankgateError, match="the step failed: out of memory"):
        write(model, ids, 3, batch)
    assert not batch.texts
    assert torch.equal(write(model, ids, 9, batch), write(model, ids, 9))


@pytest.mark.filterwarnings("ignore:.*without the fast path")
def test_what_cannot_be_captured_is_written_in_turn():
    model = tiny_model("mamba")
    calls = [functools.partial(write, model, tokens(1, n, seed=n), 10) for n in (4, 9)]
    for got, call in zip(together(Batch(2), calls), calls, strict=True):
        assert torch.equal(got, call())


def test_a_text_takes_the_row_of_one_that_left_before_their_first_step():
    model, batch = tiny_model("llama"), Batch(4)

    def begun(batch):
        cache = DynamicCache(config=model.config)
        kwargs = {"past_key_values": cache, "use_cache": True, "position_ids": torch.arange(5)[None]}
        ids = tokens(1, 5, seed=2)
        text = Text(batch, model, ids, kwargs) if batch is not None else Steps(model, ids, kwargs)
        text.prompt()
        return text.begin(tokens(1, 1))

    with torch.no_grad():
        first, second = begun(batch), begun(batch)
        first.cancel()
        assert torch.allclose(second.result(), begun(None).result(), atol=1e-5)
        second.cancel()
