"""How exact mode reads a text, by one model, and how long that takes.

A reader's text is what it has read so far. `forget` takes back its end, so that what was drafted in vain leaves no
trace.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any, Protocol, cast

import torch
from torch import Tensor
from transformers import DynamicCache, GenerationConfig, PreTrainedModel

from rankgate.decoding.loop import unsupported
from rankgate.decoding.steps import Steps
from rankgate.errors import RankgateError

USUAL = 2  # new tokens at most, if a draft took part in the round before


class Reader(Protocol):
    """A model, reading one text."""

    least: dict[int, float]
    """How long reading took at least, in seconds, by the number of tokens read at once: what else happens only adds."""

    @property
    def length(self) -> int:
        """Tokens read."""

    def read(self, ids: Tensor) -> Tensor:
        """Read what is new in `ids` (1, tokens), at once: logits (new, vocabulary), of the prompt only the last row."""

    def forget(self, length: int) -> None:
        """Forget all but the first `length` tokens."""


def follow(reader: Reader, ids: Tensor) -> Tensor:
    """Read what is new in `ids` token by token, as kernels for one token have it: the last logits (1, vocabulary).

    At the beginning, and after a pause, all but the last token at once.
    """
    if ids.shape[1] - reader.length > USUAL:
        reader.read(ids[:, :-1])
    for end in range(reader.length + 1, ids.shape[1] + 1):
        logits = reader.read(ids[:, :end])
    return logits


def open_reader(
    model: PreTrainedModel, ids: Tensor, config: GenerationConfig, kwargs: dict[str, Any], longest: int
) -> Reader:
    """By captured steps where `decode` would take them for this call of generate(), else by ordinary passes.

    longest: tokens up to which several at once are a captured step, too; see `Captured`.
    """
    return Ordinary(model, kwargs) if unsupported(model, ids, config, kwargs) else Captured(model, kwargs, longest)


class Ordinary:
    """By the model's forward."""

    def __init__(self, model: PreTrainedModel, kwargs: Mapping[str, Any]) -> None:
        self.least: dict[int, float] = {}
        self.length = 0
        self.model, self.kwargs = model, kwargs

    def read(self, ids: Tensor) -> Tensor:
        start, new, first = time.perf_counter(), ids.shape[1] - self.length, self.length == 0
        kwargs = {**self.kwargs}
        if kwargs.get("attention_mask") is not None:
            kwargs["attention_mask"] = torch.ones_like(ids)
        if kwargs.get("position_ids") is not None:
            kwargs["position_ids"] = torch.arange(ids.shape[1], device=ids.device)[None]
        if "logits_to_keep" in kwargs:
            kwargs["logits_to_keep"] = 1 if first else new
        prepare = cast(Any, self.model).prepare_inputs_for_generation
        inputs = prepare(ids, next_sequence_length=new, is_first_iteration=first, **kwargs)
        logits = _numbers(self.model(**{**inputs, "return_dict": True}).logits[0, -1 if first else -new :])
        self.length = ids.shape[1]
        if not first:
            _note(self.least, new, start)
        return logits

    def forget(self, length: int) -> None:
        if length < self.length:
            cast(DynamicCache, self.kwargs["past_key_values"]).crop(length - self.length)
            self.length = length


class Captured:
    """By captured steps over one token (see `steps`), and over `longest` of them wherever several are read.

    Those of them that are there for nothing cost little where the weights are what takes the time: on a GPU. More than
    `longest` at once, on a CPU more than one, are read by the model's forward.
    """

    def __init__(self, model: PreTrainedModel, kwargs: dict[str, Any], longest: int) -> None:
        self.least: dict[int, float] = {}
        self.model, self.kwargs, self.longest = model, kwargs, longest
        self.steps: Steps | None = None  # since the first time

    @property
    def length(self) -> int:
        return 0 if self.steps is None else self.steps.length

    def read(self, ids: Tensor) -> Tensor:
        start, news, threads = time.perf_counter(), ids[:, self.length :], torch.get_num_threads()
        if self.steps is None:
            place = {}
            if self.kwargs.get("position_ids") is not None:
                place["position_ids"] = torch.arange(ids.shape[1], device=ids.device)[None]
            self.steps = Steps(self.model, ids, {**self.kwargs, **place})
            return _numbers(self.steps.prompt())
        try:
            if news.shape[1] == 1:
                logits = _numbers(self.steps.next(news))
            elif news.shape[1] <= self.longest:
                logits = _numbers(self.steps.read_captured(news, self.longest))
            else:
                logits = _numbers(self.steps.read(news))
        finally:
            torch.set_num_threads(threads)
        _note(self.least, news.shape[1], start)
        return logits

    def forget(self, length: int) -> None:
        if self.steps is not None and length < self.steps.length:
            self.steps.rewind(length)


def _note(least: dict[int, float], tokens: int, start: float) -> None:
    least[tokens] = min(time.perf_counter() - start, least.get(tokens, float("inf")))


def _numbers(logits: Tensor) -> Tensor:
    """A float32 copy. Raises RankgateError if there is a NaN in it."""
    logits = logits.to(torch.float32, copy=True)
    if bool(logits.isnan().any()):
        raise RankgateError("a model gave scores that are not numbers; drafting and verifying need numbers")
    return logits
