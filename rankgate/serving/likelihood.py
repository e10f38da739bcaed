"""Log-probabilities of tokens: the model's own, log softmax of its logits as they are.

What comes after the logits, repetition penalties, temperature, top-k and top-p, changes what is drawn, not what is
reported: at every temperature the figures say what the model thinks.
"""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import LongTensor, Tensor
from transformers import LogitsProcessor, LogitsProcessorList, PreTrainedModel, PreTrainedTokenizerBase
from transformers.convert_slow_tokenizer import bytes_to_unicode

from rankgate.errors import RankgateError

ROWS = 256  # tokens of a prompt whose logits are held at once
UNLIKELY = -9999.0  # what OpenAI's API has for impossible tokens; JSON has no infinity


@dataclass(frozen=True)
class Candidate:
    """A token by its text, `bytes:\\xc3` where it has none of its own; its bytes if they are known; log-probability."""

    token: str
    bytes: list[int] | None
    logprob: float | None  # None: nothing comes before it


@dataclass(frozen=True)
class Scored(Candidate):
    """The token that stands at character `at` of a text, and the most likely ones there, best first."""

    at: int
    top: list[Candidate]


class Scorer(LogitsProcessor):
    """Watches generate() choose tokens. top: how many of the most likely ones are reported beside the chosen one."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, top: int) -> None:
        self.top = top
        self.spelled = functools.cache(functools.partial(spelling, tokenizer))
        self.seen: _Rows | None = None

    def __call__(self, input_ids: LongTensor, scores: Any) -> Any:
        self.seen = _Rows(scores, self.top)
        return scores

    def watching(self, loop: Callable[..., Any]) -> Callable[..., Any]:
        """A loop of generate() that shows scores to this one before any other processor."""

        def watched(model: PreTrainedModel, ids: Tensor, logits_processor: LogitsProcessorList, **how: Any) -> Any:
            return loop(model, ids, LogitsProcessorList([self, *logits_processor]), **how)

        return watched

    def chosen(self, token: int, at: int) -> Scored:
        """What was seen last, of which generate() took `token`."""
        assert self.seen is not None
        return next(self._scored(self.seen, [token], [at]))

    def prompt(
        self, model: PreTrainedModel, ids: Tensor, places: list[int], stopped: Callable[[], bool]
    ) -> list[Scored]:
        """The tokens `ids` (1, tokens) at `places` of their text; fewer when `stopped`. Reads the model once."""
        tokens = ids[0].tolist()
        done = [Scored(*self.spelled(tokens[0]), None, places[0], [])]
        with torch.no_grad():
            for logits in _logits(model, ids):
                if stopped():
                    break
                one, end = len(done), len(done) + len(logits)
                done += self._scored(_Rows(logits, self.top), tokens[one:end], places[one:end])
        return done

    def _scored(self, rows: _Rows, tokens: list[int], places: list[int]) -> Iterator[Scored]:
        """A token each of the first rows."""
        for token, at, own, best in zip(tokens, places, *rows.read(tokens), strict=True):
            top = [Candidate(*self.spelled(i), value) for i, value in best]
            yield Scored(*self.spelled(token), own, at, top)


class _Rows:
    """Log-probabilities (tokens, vocabulary) from logits, of which the best are known."""

    def __init__(self, logits: Tensor, top: int) -> None:
        self.all = logits.float().log_softmax(-1)
        self.best = self.all.topk(min(top, logits.shape[-1]))

    def read(self, tokens: list[int]) -> tuple[list[float], list[list[tuple[int, float]]]]:
        """Log-probability of a token each of the first rows; the best ones there."""
        count = len(tokens)
        own = self.all[torch.arange(count), torch.tensor(tokens, dtype=torch.long)]
        if own.isnan().any():
            raise RankgateError("the model's logits are not finite")
        values, ids = (t[:count].tolist() for t in (self.best.values.clamp(min=UNLIKELY), self.best.indices))
        return own.clamp(min=UNLIKELY).tolist(), [list(zip(*row, strict=True)) for row in zip(ids, values, strict=True)]


def _logits(model: PreTrainedModel, ids: Tensor) -> Iterator[Tensor]:
    """Logits (≤ ROWS, vocabulary) after the tokens `ids`; a model without keys and values reads them all at once."""
    if ids.shape[1] <= ROWS or "past_key_values" not in inspect.signature(model.forward).parameters:
        yield from model(input_ids=ids, use_cache=False).logits[0].split(ROWS)
        return
    past = None
    for chunk in ids.split(ROWS, dim=1):
        read = model(input_ids=chunk, past_key_values=past, use_cache=True)
        past = read.past_key_values
        yield read.logits[0]


def spelling(tokenizer: PreTrainedTokenizerBase, token: int) -> tuple[str, list[int] | None]:
    """The text of a token and its bytes, as if it stood within a text: the space that it begins with belongs to it."""

    def decoded(ids: list[int]) -> str:
        return str(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))

    text = decoded([token, token])[len(decoded([token])) :]
    if "\N{REPLACEMENT CHARACTER}" not in text:
        return text, list(text.encode())
    known = _part_of_a_character(str(tokenizer.convert_ids_to_tokens(token)))
    return (text, None) if known is None else ("bytes:" + "".join(f"\\x{b:02x}" for b in known), known)


def _part_of_a_character(name: str) -> list[int] | None:
    """Bytes by the two ways that vocabularies write them: <0xC3>, or a printable character for each."""
    if found := re.fullmatch("<0x([0-9A-F]{2})>", name):
        return [int(found[1], 16)]
    codes = {character: byte for byte, character in bytes_to_unicode().items()}
    return [codes[c] for c in name] if all(c in codes for c in name) else None
