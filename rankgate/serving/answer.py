"""One answer whose text arrives in pieces while it is generated: what `serve` and `chat` share."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase
from transformers.generation.streamers import BaseStreamer

from rankgate.decoding.loop import ONE_GREEDY, fast_generate
from rankgate.errors import RankgateError
from rankgate.hub.opening import Opened

GREEDY_BELOW = 1e-5  # a temperature that chooses like 0, and that no logits overflow by
BOUNDLESS = 2048  # tokens of context where a model knows no limit
UNREADABLE = 8  # tokens in a row that are no whole character, after which none is expected any more

Reason = Literal["stop", "length", "cancelled"]


@dataclass(frozen=True)
class Sampling:
    """How to continue: at most `tokens` more, up to the first of the texts `stop` (at temperature 0 the most likely).

    seed: the same one gives the same answer; None: a new one each time.
    """

    tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()


def context_length(opened: Opened, asked: int | None = None) -> int:
    """Tokens that a prompt and its answer may have together: `asked`, or all that the model has positions for.

    Raises RankgateError if it has fewer than `asked`.
    """
    limit = opened.positions
    if asked is not None and limit is not None and asked > limit:
        raise RankgateError(f"a context of {asked} is longer than the {limit} positions of {opened.name}")
    return asked or limit or BOUNDLESS


def chat_tokens(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]]) -> list[int]:
    """The conversation as the model was trained to see it, up to where its answer begins.

    Raises RankgateError if the tokenizer has no chat template, or if that refuses these messages.
    """
    if tokenizer.chat_template is None:
        raise RankgateError("this model's tokenizer has no chat template; use completions (rankgate generate)")
    try:
        encoded: Any = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)
    except Exception as error:  # the template is a program that came with the model
        raise RankgateError(f"the model's chat template refuses these messages: {error}") from error
    ids: list[int] = encoded["input_ids"]
    return ids


def answer(
    opened: Opened,
    prompt: Sequence[int],
    sampling: Sampling,
    emit: Callable[[str], None],
    stopped: Callable[[], bool],
) -> tuple[Reason, int]:
    """Continue the tokens `prompt`, giving pieces of text to `emit`; `stopped` is asked after every token.

    Returns why it ended (EOS or a stop text, `sampling.tokens`, or `stopped`) and the number of new tokens, EOS among
    them. Seeds torch's global random numbers.
    """
    model, tokenizer = opened.model, opened.tokenizer
    ids = torch.tensor([list(prompt)], device=model.device)
    ends = end_tokens(opened, sampling.stop)
    stream = _TextStream(tokenizer, sampling.stop, ends, emit, stopped)
    how: dict[str, Any] = dict(ONE_GREEDY)
    if sampling.temperature >= GREEDY_BELOW:
        how |= {"do_sample": True, "temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": 0}
    if ends:
        how["eos_token_id"] = sorted(ends)
    torch.manual_seed(secrets.randbits(63) if sampling.seed is None else sampling.seed)
    try:
        fast_generate(
            model,
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=sampling.tokens,
            streamer=stream,
            pad_token_id=tokenizer.pad_token_id or 0,
            **how,
        )
    except _Stop as stop:
        return stop.reason, stream.count
    return "stop" if stream.count < sampling.tokens else "length", stream.count


def end_tokens(opened: Opened, stop: Sequence[str]) -> set[int]:
    """Tokens that end an answer: end of text to the model or its tokenizer, and stop texts that are special tokens."""
    tokenizer = opened.tokenizer
    eos: Any = getattr(opened.model.generation_config, "eos_token_id", None)  # one, several or none
    known = {*(eos if isinstance(eos, list) else [eos]), tokenizer.eos_token_id}
    special = {str(added): i for i, added in tokenizer.added_tokens_decoder.items() if added.special}
    return {*known, *(special[word] for word in stop if word in special)} - {None}


class _Stop(Exception):
    """Leaves generate() from within a streamer, at once, whichever loop is running."""

    def __init__(self, reason: Reason) -> None:
        self.reason = reason


class _TextStream(BaseStreamer):
    """Tokens in, text out as soon as it is certain: whole characters, and nothing that may begin a stop text."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        stop: tuple[str, ...],
        ends: set[int],
        emit: Callable[[str], None],
        stopped: Callable[[], bool],
    ) -> None:
        self.tokenizer, self.stop, self.ends, self.emit, self.stopped = tokenizer, stop, ends, emit, stopped
        self.ids: list[int] = []
        self.count = 0  # of all new tokens, that which ends the answer among them
        self.in_prompt = True
        self.start = self.read = 0  # ids[:read] have become text; those from `start` on decide how the next one is read
        self.held = ""  # text that may be the beginning of a stop text

    def put(self, value: Tensor) -> None:
        if self.stopped():
            raise _Stop("cancelled")
        if self.in_prompt:  # generate() shows it first
            self.in_prompt = False
            return
        (token,) = value.flatten().tolist()
        self.count += 1
        if token in self.ends:
            self.end()
            raise _Stop("stop")
        self.ids.append(token)
        new = self._unread()
        unfinished = new.endswith("\N{REPLACEMENT CHARACTER}")  # may become a character yet
        if not unfinished or len(self.ids) - self.read >= UNREADABLE:
            self.start, self.read = self.read, len(self.ids)
            self._pass_on(new)

    def end(self) -> None:
        """The rest, of a text that was not stopped."""
        self._pass_on(self._unread())
        if self.held:
            self.emit(self.held)

    def _unread(self) -> str:
        """The text of the tokens that have not become text yet."""
        return self._decoded(self.ids[self.start :])[len(self._decoded(self.ids[self.start : self.read])) :]

    def _decoded(self, ids: list[int]) -> str:
        text: Any = self.tokenizer.decode(ids, skip_special_tokens=True)
        return str(text)

    def _pass_on(self, new: str) -> None:
        text = self.held + new
        found = [at for word in self.stop if (at := text.find(word)) >= 0]
        certain = min(found) if found else len(text) - _possible(text, self.stop)
        if certain:
            self.emit(text[:certain])
        self.held = text[certain:]
        if found:
            raise _Stop("stop")


def _possible(text: str, stop: tuple[str, ...]) -> int:
    """How many characters at the end of `text` may be the beginning of a stop text."""
    lengths = [n for word in stop for n in range(1, min(len(word), len(text) + 1)) if text.endswith(word[:n])]
    return max(lengths, default=0)
