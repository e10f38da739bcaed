"""Tokens in, text out as soon as it is certain."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, Literal, Self

from torch import Tensor
from transformers import PreTrainedTokenizerBase
from transformers.generation.streamers import BaseStreamer

from rankgate.serving.likelihood import Scored, Scorer

UNREADABLE = 8  # tokens in a row that are no whole character, after which none is expected any more

Reason = Literal["stop", "length", "cancelled"]


class Piece(str):
    """Some of an answer's text, which knows the tokens that begin in it if they were asked for."""

    tokens: Sequence[Scored]

    def __new__(cls, text: str, tokens: Sequence[Scored] = ()) -> Self:
        piece = super().__new__(cls, text)
        piece.tokens = tokens
        return piece


class Stop(Exception):
    """Leaves generate() from within a streamer, at once, whichever loop is running."""

    def __init__(self, reason: Reason) -> None:
        self.reason = reason


class Reader:
    """Tokens in, whole characters out."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self.ids: list[int] = []
        self.start = self.read = 0  # ids[:read] have become text; those from `start` on decide how the next one is read

    def add(self, token: int) -> str:
        """The text that is certain now."""
        self.ids.append(token)
        new = self.rest()
        if new.endswith("\N{REPLACEMENT CHARACTER}") and len(self.ids) - self.read < UNREADABLE:
            return ""  # may become a character yet
        self.start, self.read = self.read, len(self.ids)
        return new

    def rest(self) -> str:
        """The text of the tokens that have not become text yet."""
        return self._decoded(self.ids[self.start :])[len(self._decoded(self.ids[self.start : self.read])) :]

    def _decoded(self, ids: list[int]) -> str:
        text: Any = self.tokenizer.decode(ids, skip_special_tokens=True)
        return str(text)


class TextStream(BaseStreamer):
    """Emits whole characters, and nothing that may begin a stop text.

    ends: tokens that end the answer; times: of its tokens, the one that ended it among them, in seconds.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        stop: tuple[str, ...],
        ends: set[int],
        emit: Callable[[Piece], None],
        stopped: Callable[[], bool],
        scorer: Scorer | None = None,
    ) -> None:
        self.stop, self.ends, self.emit, self.stopped, self.scorer = stop, ends, emit, stopped, scorer
        self.reader = Reader(tokenizer)
        self.times: list[float] = []
        self.in_prompt = True
        self.held = ""  # text that may be the beginning of a stop text
        self.length = 0  # characters, held ones included
        self.waiting: list[Scored] = []  # tokens of text that was not passed on

    def read(self, prompt: Sequence[int]) -> tuple[str, list[int]]:
        """The text of the prompt, which the answer goes on with, and where its tokens begin."""
        text, places = "", []
        for token in prompt:
            places.append(len(text))
            text += self.reader.add(token)
        self.length = len(text)
        return text, places

    def put(self, value: Tensor) -> None:
        if self.stopped():
            raise Stop("cancelled")
        if self.in_prompt:  # generate() shows it first
            self.in_prompt = False
            return
        (token,) = value.flatten().tolist()
        self.times.append(time.perf_counter())
        if self.scorer is not None:
            self.waiting.append(self.scorer.chosen(token, self.length))
        if token in self.ends:
            self.end()
            raise Stop("stop")
        self._pass_on(self.reader.add(token))

    def end(self) -> None:
        """The rest, of a text that was not stopped."""
        self._pass_on(self.reader.rest())
        if self.held or self.waiting:
            self.emit(Piece(self.held, self.waiting))

    def _pass_on(self, new: str) -> None:
        text = self.held + new
        self.length += len(new)
        found = [at for word in self.stop if (at := text.find(word)) >= 0]
        certain = min(found) if found else len(text) - possible(text, self.stop)
        self.held = text[certain:]
        if certain:
            passed = self.length - len(self.held)
            count = sum(scored.at < passed for scored in self.waiting)  # they are in order
            self.emit(Piece(text[:certain], self.waiting[:count]))
            del self.waiting[:count]
        if found:
            raise Stop("stop")


def possible(text: str, stop: tuple[str, ...]) -> int:
    """How many characters at the end of `text` may be the beginning of a stop text."""
    lengths = [n for word in stop for n in range(1, min(len(word), len(text) + 1)) if text.endswith(word[:n])]
    return max(lengths, default=0)
