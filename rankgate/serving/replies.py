"""OpenAI's completions API: how answers look, whole or in chunks. Nothing here knows of a server."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from rankgate.serving.answer import Answered
from rankgate.serving.engine import Said
from rankgate.serving.likelihood import Candidate, Scored
from rankgate.serving.stream import Piece


@dataclass(frozen=True)
class Reply:
    """The JSON of one request's answers. prompts: their tokens; scored: whether log-probabilities were asked for."""

    model: str
    chat: bool
    prompts: list[int]
    scored: bool
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    created: int = field(default_factory=lambda: int(time.time()))

    def whole(self, said: list[Said]) -> dict[str, Any]:
        choices = [self._whole_choice(i, [s.what for s in said if s.index == i]) for i in range(len(self.prompts))]
        return {**self._frame(choices), "usage": self._usage(said)}

    def opening(self) -> list[dict[str, Any]]:
        """Chunks before the first text."""
        return [self._chunk(0, {"delta": {"role": "assistant", "content": ""}})] if self.chat else []

    def chunk(self, said: Said) -> dict[str, Any]:
        piece = said.what
        if isinstance(piece, Piece):
            content = {"delta": {"content": piece}} if self.chat else {"text": piece}
            return self._chunk(said.index, content, self._logprobs(piece.tokens) if piece.tokens else None)
        return self._chunk(said.index, {"delta": {}} if self.chat else {"text": ""}, reason=piece.reason)

    def usage(self, said: list[Said]) -> dict[str, Any]:
        """The chunk after the last one."""
        return {**self._frame([], chunk=True), "usage": self._usage(said)}

    def _whole_choice(self, index: int, said: list[Piece | Answered]) -> dict[str, Any]:
        pieces = [piece for piece in said if isinstance(piece, Piece)]
        text = "".join(pieces)
        (reason,) = (end.reason for end in said if isinstance(end, Answered))
        logprobs = self._logprobs([token for piece in pieces for token in piece.tokens]) if self.scored else None
        content = {"message": {"role": "assistant", "content": text}} if self.chat else {"text": text}
        return _choice(index, content, logprobs, reason)

    def _logprobs(self, tokens: Sequence[Scored]) -> dict[str, Any]:
        if self.chat:
            return {"content": [{**_entry(t), "top_logprobs": [*map(_entry, t.top)]} for t in tokens], "refusal": None}
        return {
            "tokens": [t.token for t in tokens],
            "token_logprobs": [t.logprob for t in tokens],
            "top_logprobs": [None if t.logprob is None else _by_text([*t.top, t]) for t in tokens],
            "text_offset": [t.at for t in tokens],
        }

    def _chunk(
        self, index: int, content: dict[str, Any], logprobs: dict[str, Any] | None = None, reason: str | None = None
    ) -> dict[str, Any]:
        return self._frame([_choice(index, content, logprobs, reason)], chunk=True)

    def _frame(self, choices: list[dict[str, Any]], *, chunk: bool = False) -> dict[str, Any]:
        kind = f"chat.completion{'.chunk' if chunk else ''}" if self.chat else "text_completion"
        name = f"{'chatcmpl' if self.chat else 'cmpl'}-{self.id}"
        return {"id": name, "object": kind, "created": self.created, "model": self.model, "choices": choices}

    def _usage(self, said: list[Said]) -> dict[str, int]:
        prompt = sum(self.prompts)
        new = sum(len(s.what.times) for s in said if isinstance(s.what, Answered))
        return {"prompt_tokens": prompt, "completion_tokens": new, "total_tokens": prompt + new}


def _choice(index: int, content: dict[str, Any], logprobs: dict[str, Any] | None, reason: str | None) -> dict[str, Any]:
    return {"index": index, **content, "logprobs": logprobs, "finish_reason": reason}


def _entry(candidate: Candidate) -> dict[str, Any]:
    return {"token": candidate.token, "logprob": candidate.logprob, "bytes": candidate.bytes}


def _by_text(candidates: list[Candidate]) -> dict[str, float | None]:
    """Of tokens with the same text the first, which is the likeliest."""
    found: dict[str, float | None] = {}
    for candidate in candidates:
        found.setdefault(candidate.token, candidate.logprob)
    return found
