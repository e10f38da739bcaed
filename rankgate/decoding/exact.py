"""Exact mode: the converted model drafts, the dense model verifies, and the text is the dense model's.

    draft       the converted model writes some tokens ahead, one after the other
    verify      the dense model reads them all in one pass, which costs little more than reading one: the weights are
                what takes the time
    accept      a drafted x with probability min(1, p(x) / q(x)), p the dense model's distribution, q the draft's, both
                after generate()'s logits processors; at the first refusal a token from the positive part of p − q, and
                after a run without one another token from p (Leviathan, Kalman and Matias, 2023)

What is promised. Sampling: every token has the distribution of the dense model, whatever the draft is; not the tokens
that the dense model would have drawn from the same seed. Greedy: the text of dense greedy decoding. Both hold up to
rounding: a pass over several tokens may round otherwise than one over a single token, so where the best two scores lie
within that of each other the other one may be taken, as with another version of a library, and the texts part there. In
float32 that is rare (`benchmarks/exact.py` counts it); in bfloat16, whose scores often tie, it must be expected.
Logits processors and stopping criteria see every token in turn; processors that keep a state of their own would see
drafted tokens, too, and must not.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import FloatTensor, LongTensor, Tensor
from transformers import DynamicCache, GenerationConfig, LogitsProcessorList, PreTrainedModel, StoppingCriteriaList
from transformers.generation.configuration_utils import GenerationMode
from transformers.generation.streamers import BaseStreamer

from rankgate.attention.attend import selection_of
from rankgate.decoding.loop import fast_generate, is_empty
from rankgate.decoding.readers import Reader, follow, open_reader
from rankgate.errors import RankgateError

LONGEST = 16  # run of drafted tokens
FIRST = 4  # length of a run while little is known
TRIALS = 3  # runs of that length; the first may compile kernels
PAUSE = 64  # tokens without a draft once drafting does not pay; after each next time twice as many
PLAIN = 2  # dense passes over one token, to know their time
PADDED = {"cuda"}  # where a pass over LONGEST + 1 tokens takes no longer than one over a few
FORGET = 0.98  # weight of a verdict for each one that follows: about the last fifty count


@dataclass
class Statistics:
    """What happened to the drafts of one text."""

    new_tokens: int = 0
    drafted: int = 0
    checked: int = 0  # drafted tokens that were accepted or refused; what follows a refusal, or the end, is neither
    accepted: int = 0
    runs: int = 0  # verifications of at least one drafted token
    dense_passes: int = 0  # verifications, steps without a draft, and the prompt
    pauses: int = 0  # how often drafting was left for some time because it did not pay

    @property
    def acceptance(self) -> float | None:
        return self.accepted / self.checked if self.checked else None

    @property
    def mean_accepted(self) -> float | None:
        """Drafted tokens accepted per verification."""
        return self.accepted / self.runs if self.runs else None

    def record(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {**vars(self), "acceptance": self.acceptance, "mean_accepted": self.mean_accepted}


def describe(record: Mapping[str, Any]) -> str:
    """A `Statistics.record` in words."""
    passes = f"{record['dense_passes']} dense passes for {record['new_tokens']} tokens"
    if not record["runs"]:
        return f"nothing drafted, {passes}"
    times = f"{record['pauses']} time{'s' * (record['pauses'] > 1)}"
    paused = f", drafting paused {times} because it did not pay" if record["pauses"] else ""
    return (
        f"acceptance {record['acceptance']:.3f}, {record['mean_accepted']:.2f} drafted tokens accepted per "
        f"verification, {passes}{paused}"
    )


@dataclass(frozen=True)
class Costs:
    """Time of a draft's step, and of a dense pass over several tokens, however many; one over a single token is 1."""

    draft: float
    several: float = 1.0

    def __post_init__(self) -> None:
        if not (0 <= self.draft < float("inf") and 0 < self.several < float("inf")):
            raise RankgateError(f"costs of {self.draft} and {self.several} are out of range; they are times")


def best_length(acceptance: float, costs: Costs) -> int:
    """The length 0…LONGEST of drafted runs that gives the most tokens per time; 0: plain steps are at least as fast.

    With n drafted tokens, each accepted with probability a if the one before was, a round gives 1 + a + … + aⁿ tokens.
    It takes n steps of the draft, one more to catch up if all were accepted, and a dense pass.
    """

    def rate(n: int) -> float:
        tokens = sum(acceptance**i for i in range(n + 1))
        return tokens / ((n + acceptance**n) * costs.draft + costs.several) if n else 1.0

    return max(range(LONGEST + 1), key=rate)


class Pace:
    """How many tokens to draft next, by what was accepted and how long it took so far."""

    def __init__(self, dense: Reader, draft: Reader, costs: Costs | None, statistics: Statistics) -> None:
        self.dense, self.draft, self.given, self.statistics = dense, draft, costs, statistics
        self.accepted = self.refused = 0.0
        self.runs = 0  # since the start, or the last pause
        self.rest = 0 if costs else PLAIN + 1  # dense passes, the prompt among them, before the next run
        self.pause = PAUSE

    def note(self, drafted: int, accepted: int, *, refused: bool) -> None:
        """A dense pass is through: the first of the drafted tokens were accepted, and then one refused or not."""
        seen = self.statistics
        seen.dense_passes += 1
        seen.runs += drafted > 0
        seen.drafted += drafted
        seen.accepted += accepted
        seen.checked += accepted + refused
        fade = FORGET ** (accepted + refused)
        self.accepted, self.refused = self.accepted * fade + accepted, self.refused * fade + refused
        self.runs += drafted > 0
        self.rest -= self.rest > 0

    def next(self) -> int:
        if self.rest:
            return 0
        if self.runs < TRIALS:
            return FIRST
        best = best_length(self.hoped(), self.given or self.measured())
        if best == 0:
            self.statistics.pauses += 1
            self.rest, self.pause = self.pause, 2 * self.pause
            self.runs, self.accepted, self.refused = 0, 0.0, 0.0
        return best

    def hoped(self) -> float:
        """What acceptance may be: its mean and one standard deviation, by what was seen and a uniform prior.

        With the mean alone, a draft whose first tokens happen to be refused would not be seen again for some time.
        """
        count = self.accepted + self.refused
        mean = (self.accepted + 1) / (count + 2)
        return mean + math.sqrt(mean * (1 - mean) / (count + 3))

    def measured(self) -> Costs:
        """From the least times so far."""
        several = min(seconds for tokens, seconds in self.dense.least.items() if tokens > 1)
        return Costs(self.draft.least[1] / self.dense.least[1], several / self.dense.least[1])


class Exact:
    """A loop for generate(): `dense.generate(..., custom_generate=Exact(draft))`; then `statistics` is of that text.

    draft: the converted model, on the device of the dense one and with its vocabulary; see `hub.opening.open_pair`.
    costs: by default measured. With given ones the same seed draws the same text again.
    """

    def __init__(self, draft: PreTrainedModel, costs: Costs | None = None) -> None:
        self.draft, self.costs = draft, costs
        self.statistics = Statistics()

    @torch.no_grad()
    def __call__(
        self,
        model: PreTrainedModel,
        input_ids: Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        synced_gpus: bool = False,
        streamer: BaseStreamer | None = None,
        **model_kwargs: Any,
    ) -> Tensor:
        """The prompt and what follows it (1, tokens); generate() calls this, see there.

        Raises RankgateError for what exact mode does not have: more than one sequence, beams, padding, caches other
        than the plain dynamic one, dictionaries as results; and for a draft that is not of the model's kind.
        """
        _check(model, self.draft, input_ids, generation_config, model_kwargs)
        self.statistics = statistics = Statistics()
        longest = LONGEST + 1 if model.device.type in PADDED else 1
        dense = open_reader(model, input_ids, generation_config, model_kwargs, longest)
        own = {**model_kwargs, "past_key_values": DynamicCache(config=self.draft.config)}
        draft = open_reader(self.draft, input_ids, generation_config, own, 1)
        pace = Pace(dense, draft, self.costs, statistics)
        choice = _Choice(logits_processor, bool(generation_config.do_sample))
        ids, done = input_ids, False
        while not done:
            room = cast(int, generation_config.max_length) - ids.shape[1] - 1
            ahead, beliefs = ids, []
            for _ in range(min(pace.next(), room) if dense.length else 0):
                beliefs.append(choice.probabilities(ahead, follow(draft, ahead)))
                ahead = torch.cat([ahead, choice.draw(beliefs[-1])], dim=-1)
            accepted, drafted = 0, True
            for token, drafted in _verified(choice, ids, ahead, beliefs, dense.read(ahead)):
                accepted += drafted
                ids = torch.cat([ids, token], dim=-1)
                if streamer is not None:
                    streamer.put(token[0].cpu())
                done = bool(stopping_criteria(cast(LongTensor, ids), cast(Any, None)).all())
                if done:
                    break
            pace.note(len(beliefs), accepted, refused=not drafted and accepted < len(beliefs))
            for reader in (dense, draft):
                reader.forget(ids.shape[1] - 1)
        statistics.new_tokens = ids.shape[1] - input_ids.shape[1]
        if streamer is not None:
            streamer.end()
        return ids


def exact_generate(
    model: PreTrainedModel, draft: PreTrainedModel, input_ids: Tensor, *, costs: Costs | None = None, **kwargs: Any
) -> tuple[Tensor, Statistics]:
    """`model.generate(input_ids, **kwargs)` in exact mode, streamers included."""
    loop = Exact(draft, costs)
    return fast_generate(model, input_ids, loop=loop, **kwargs), loop.statistics


class _Choice:
    """How generate() chooses a token: greedily, which is a distribution on one token here, or by sampling."""

    def __init__(self, process: LogitsProcessorList, sample: bool) -> None:
        self.process, self.sample = process, sample

    def probabilities(self, ids: Tensor, logits: Tensor) -> Tensor:
        """Of the token after `ids` (1, tokens), from its logits (1, vocabulary)."""
        scores = self.process(cast(LongTensor, ids), cast(FloatTensor, logits))
        if self.sample:
            return scores.softmax(dim=-1)
        return torch.zeros_like(scores).scatter_(1, scores.argmax(dim=-1, keepdim=True), 1)

    def draw(self, probabilities: Tensor) -> Tensor:
        """A token (1, 1)."""
        if self.sample:
            return torch.multinomial(probabilities, num_samples=1)
        return probabilities.argmax(dim=-1, keepdim=True)

    def accepts(self, p: Tensor, q: Tensor, token: Tensor) -> bool:
        """Whether `token`, drawn from q, may stand for one that is drawn from p."""
        ratio = float(p[0, token[0, 0]] / q[0, token[0, 0]])
        return ratio >= 1 or (self.sample and float(torch.rand(())) < ratio)


def _verified(
    choice: _Choice, ids: Tensor, ahead: Tensor, beliefs: list[Tensor], logits: Tensor
) -> Iterator[tuple[Tensor, bool]]:
    """The tokens (1, 1) that follow `ids`, and whether they were drafted; the one that was not is the last.

    ahead: `ids` and what was drafted, from the distributions `beliefs`; logits: the dense model's, and one row more.
    """
    for q, row in zip([*beliefs, None], logits, strict=True):
        p = choice.probabilities(ids, row[None])
        if q is not None:
            token = ahead[:, ids.shape[1] : ids.shape[1] + 1]
            if choice.accepts(p, q, token):
                ids = torch.cat([ids, token], dim=-1)
                yield token, True
                continue
            excess = (p - q).clamp_min(0)
            p = excess if bool(excess.any()) else p  # nothing but rounding tells them apart
        yield choice.draw(p), False
        return


def _check(
    model: PreTrainedModel, draft: PreTrainedModel, ids: Tensor, config: GenerationConfig, kwargs: Mapping[str, Any]
) -> None:
    """Raise RankgateError for what exact mode does not have."""
    cache, mask = kwargs.get("past_key_values"), kwargs.get("attention_mask")
    reasons = {
        "beams, or other ways of searching": config.get_generation_mode()
        not in {GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE},
        "several answers": config.num_return_sequences != 1,
        "more than one sequence": ids.shape[0] != 1,
        "padding": mask is not None and (mask.shape != ids.shape or not bool((mask == 1).all())),
        "an encoder": model.config.is_encoder_decoder,
        "attention to fewer keys, which lets go of what a refused draft would need again": any(
            selection_of(m) is not None for m in (model, draft)
        ),
        "a dictionary as result": config.return_dict_in_generate,
        "a cache other than a plain, empty, dynamic one": type(cache) is not DynamicCache
        or not all(is_empty(layer) for layer in cache.layers)
        or not kwargs.get("use_cache"),
    }
    for reason, holds in reasons.items():
        if holds:
            raise RankgateError(f"exact mode does not have {reason}; call generate() without it")
    if type(draft) is not type(model) or draft.config.vocab_size != model.config.vocab_size:
        raise RankgateError("the draft is not a conversion of this dense model: architecture or vocabulary differ")
    if draft.device != model.device:
        raise RankgateError(f"the draft is on {draft.device}, the dense model on {model.device}; move one of them")
