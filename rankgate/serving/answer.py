"""One answer whose text arrives in pieces while it is generated: what `serve` and `chat` share."""

from __future__ import annotations

import contextlib
import functools
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedTokenizerBase

from rankgate.decoding.batch import Batch
from rankgate.decoding.loop import ONE_GREEDY, decode, fast_generate
from rankgate.errors import RankgateError
from rankgate.hub.opening import Opened
from rankgate.serving.likelihood import Scorer
from rankgate.serving.stream import Piece, Reason, Stop, TextStream

GREEDY_BELOW = 1e-5  # a temperature that chooses like 0, and that no logits overflow by
BOUNDLESS = 2048  # tokens of context where a model knows no limit


@dataclass(frozen=True)
class Sampling:
    """How to continue: at most `tokens` more, up to the first of the texts `stop` (at temperature 0 the most likely).

    min_p: probability, as a share of the greatest, that a token must have; top_k: so many most likely ones, 0: all.
    repetition_penalty: None: what the model's own generation_config says.
    seed: the same one gives the same answer; None: a new one each time.
    top: report log-probabilities (see `likelihood`), and so many of the most likely tokens; None: report none.
    echo: the answer's text begins with the prompt's, and so do its tokens.
    """

    tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float | None = None
    seed: int | None = None
    stop: tuple[str, ...] = ()
    top: int | None = None
    echo: bool = False


class Answered(NamedTuple):
    """reason: why it ended: EOS or a stop text, its length, or its reader; times: of the new tokens, EOS among them."""

    reason: Reason
    times: list[float]


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
    emit: Callable[[Piece], None],
    stopped: Callable[[], bool],
    batch: Batch,
) -> Answered:
    """Continue the tokens `prompt`, giving pieces of text to `emit`; `stopped` is asked after every token.

    batch: with whose other answers this one shares its steps.
    """
    model, tokenizer = opened.model, opened.tokenizer
    ids = torch.tensor([list(prompt)], device=model.device)
    ends = end_tokens(opened, sampling.stop)
    scorer = None if sampling.top is None else Scorer(tokenizer, sampling.top)
    stream = TextStream(tokenizer, sampling.stop, ends, emit, stopped, scorer)
    if sampling.echo:
        text, places = stream.read(prompt)
        with batch.alone() if scorer is not None else contextlib.nullcontext():
            emit(Piece(text, [] if scorer is None else scorer.prompt(model, ids, places, stopped)))
    generator = torch.Generator(model.device)
    generator.manual_seed(secrets.randbits(63) if sampling.seed is None else sampling.seed)
    loop = functools.partial(decode, batch=batch, generator=generator)
    try:
        if sampling.tokens == 0:
            stream.end()
            return Answered("length", [])
        fast_generate(
            model,
            ids,
            loop=loop if scorer is None else scorer.watching(loop),
            attention_mask=torch.ones_like(ids),
            max_new_tokens=sampling.tokens,
            streamer=stream,
            pad_token_id=tokenizer.pad_token_id or 0,
            **_options(sampling, ends),
        )
    except Stop as stop:
        return Answered(stop.reason, stream.times)
    return Answered("stop" if len(stream.times) < sampling.tokens else "length", stream.times)


def _options(sampling: Sampling, ends: set[int]) -> dict[str, Any]:
    """Of generate()."""
    how: dict[str, Any] = dict(ONE_GREEDY)
    if sampling.temperature >= GREEDY_BELOW:
        drawn = {"temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": sampling.top_k}
        how |= {"do_sample": True, **drawn, "min_p": sampling.min_p or None}
    if sampling.repetition_penalty is not None:
        how["repetition_penalty"] = sampling.repetition_penalty
    if ends:
        how["eos_token_id"] = sorted(ends)
    return how


def end_tokens(opened: Opened, stop: Sequence[str]) -> set[int]:
    """Tokens that end an answer: end of text to the model or its tokenizer, and stop texts that are special tokens."""
    tokenizer = opened.tokenizer
    eos: Any = getattr(opened.model.generation_config, "eos_token_id", None)  # one, several or none
    known = {*(eos if isinstance(eos, list) else [eos]), tokenizer.eos_token_id}
    special = {str(added): i for i, added in tokenizer.added_tokens_decoder.items() if added.special}
    return {*known, *(special[word] for word in stop if word in special)} - {None}
