"""What a conversion cost in quality: dense and converted on the same tokens, with the arithmetic of decoding.

Perplexity is exp of the token-weighted mean loss over fixed, non-overlapping windows; the first token of a window, by
which the tokenizer begins a text (see `windows`), is context only. Gates decide token by token, exactly as at batch 1,
also where many tokens are processed at once.
Anything that is not finite raises.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rankgate.common.passes import evaluation_mode
from rankgate.common.progress import track
from rankgate.conversion.gates import record_gates
from rankgate.conversion.reads import Reads, weight_reads
from rankgate.errors import RankgateError


@dataclass(frozen=True)
class Evaluation:
    """Dense against converted.

    tokens: input tokens run; scored: predictions compared; context: window length.
    loss_dense, loss: nats per token. top1: share of predictions with the same most likely token.
    kl_mean, kl_max: KL(dense ‖ converted) in nats. fire_rate: mean over gated groups weighted by what W costs to read,
    None without a gate; fire_rates: by the first member of each group.
    """

    tokens: int
    scored: int
    context: int
    loss_dense: float
    loss: float
    top1: float
    kl_mean: float
    kl_max: float
    fire_rate: float | None
    fire_rates: dict[str, float]
    reads: Reads

    @property
    def ppl_dense(self) -> float:
        return math.exp(self.loss_dense)

    @property
    def ppl(self) -> float:
        return math.exp(self.loss)

    @property
    def ppl_ratio(self) -> float:
        return math.exp(self.loss - self.loss_dense)


def evaluate(
    dense: PreTrainedModel, model: PreTrainedModel, windows: Tensor, *, batch_size: int = 1, progress: bool = False
) -> Evaluation:
    """Run both models over `windows` (count × context token ids) and compare their predictions.

    Raises RankgateError if a logit is not finite.
    """
    parts = []
    with record_gates(model) as gates, torch.inference_mode(), evaluation_mode(dense), evaluation_mode(model):
        for batch in track(windows.split(batch_size), "evaluating", enabled=progress):
            reference = log_probabilities(dense, batch, "dense")
            candidate = log_probabilities(model, batch, "converted")
            for p, q, ids in zip(reference, candidate, batch.to(dense.device), strict=True):
                parts.append(compare(p, q, ids))  # one window at a time: less memory
    losses_dense, losses, same, kl = (torch.cat(figures).double() for figures in zip(*parts, strict=True))
    rates = {log.members[0]: log.rate for log in gates.values()}
    costs = {log.members[0]: sum(_weights(model, name) for name in log.members) for log in gates.values()}
    return Evaluation(
        tokens=windows.numel(),
        scored=kl.numel(),
        context=windows.shape[1],
        loss_dense=losses_dense.mean().item(),
        loss=losses.mean().item(),
        top1=same.mean().item(),
        kl_mean=kl.mean().item(),
        kl_max=kl.max().item(),
        fire_rate=sum(rates[g] * costs[g] for g in rates) / sum(costs.values()) if rates else None,
        fire_rates=rates,
        reads=weight_reads(model, gates),
    )


class Compared(NamedTuple):
    """Predictions of one window after its first token, one figure each."""

    loss_dense: Tensor
    loss: Tensor
    same: Tensor  # bool: the same most likely token
    kl: Tensor


def compare(reference: Tensor, candidate: Tensor, ids: Tensor) -> Compared:
    """Log-probabilities (tokens × vocabulary) of the dense and another model after each of `ids` (tokens)."""
    p, q, target = reference[:-1], candidate[:-1], ids[1:, None]
    dense, other = (-prediction.gather(1, target)[:, 0].double() for prediction in (p, q))
    kl = F.kl_div(q, p, log_target=True, reduction="none").sum(-1).double()
    return Compared(dense, other, p.argmax(-1) == q.argmax(-1), kl)


def log_probabilities(model: PreTrainedModel, batch: Tensor, which: str) -> Tensor:
    """After every token of `batch` (rows × tokens). Raises RankgateError if a logit is not finite."""
    logits = model(input_ids=batch.to(model.device), use_cache=False).logits.float()
    if not torch.isfinite(logits).all():
        raise RankgateError(f"the {which} model gives non-finite logits; nothing can be compared")
    return F.log_softmax(logits, dim=-1)


def _weights(model: PreTrainedModel, name: str) -> int:
    layer = model.get_submodule(name)
    return int(layer.in_features) * int(layer.out_features)  # type: ignore[arg-type]


@dataclass(frozen=True)
class TextComparison:
    """Greedy continuations of the same prompts. `first_difference`: position in characters, None where identical."""

    prompts: list[str]
    dense: list[str]
    converted: list[str]
    first_difference: list[int | None]

    @property
    def identical(self) -> float:
        """Share of prompts continued with the same text, character for character."""
        return sum(position is None for position in self.first_difference) / len(self.first_difference)


def continuations(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Tensor, new_tokens: int = 32
) -> list[str]:
    """The greedy continuations of `prompts` (count × length token ids) as text."""
    return list(tokenizer.batch_decode(greedy(model, tokenizer, prompts, new_tokens), skip_special_tokens=True))


def compare_text(prompts: list[str], dense: list[str], converted: list[str]) -> TextComparison:
    """Compare the continuations of the same prompts, character by character."""
    differences = [first_difference(a, b) for a, b in zip(dense, converted, strict=True)]
    return TextComparison(prompts, dense, converted, differences)


def greedy(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Tensor, new_tokens: int, streamer: Any = None
) -> Tensor:
    """The ids that `model` continues unpadded `prompts` (count × length) with: count × at most `new_tokens`."""
    ids = prompts.to(model.device)
    generate: Any = model.generate
    out: Tensor = generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=new_tokens,
        do_sample=False,
        streamer=streamer,
        pad_token_id=tokenizer.pad_token_id or 0,
    )
    return out[:, ids.shape[1] :]


def first_difference(a: str, b: str) -> int | None:
    """Position of the first character in which two texts differ, None if they are the same."""
    if a == b:
        return None
    shorter = min(len(a), len(b))
    return next((i for i in range(shorter) if a[i] != b[i]), shorter)
