"""What a plan must keep to, and what was measured of it."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from rankgate.errors import RankgateError

ONE_SIDED = 1.645  # standard errors of a 95 % bound
LOSS_PER_KL, FLIPS_PER_ROOT_KL = 0.75, 0.58  # first guesses, corrected by what is measured


@dataclass(frozen=True)
class Budget:
    """`ppl`: ratio to the dense perplexity, at most. `top1`: agreement, at least. `bits`: per weight read, at most."""

    kind: str
    value: float

    @classmethod
    def parse(cls, text: str) -> Budget:
        """From 'ppl=1.01', 'top1=0.98' or 'bits=5'. Raises RankgateError if it is none of these."""
        kind, _, number = text.partition("=")
        ranges = {"ppl": (1.0, math.inf), "top1": (0.0, 1.0), "bits": (4.0, 32.0)}
        try:
            low, high = ranges[kind]
            value = float(number)
        except (KeyError, ValueError):
            raise RankgateError(f"budget {text!r} is not understood; write ppl=1.01, top1=0.98 or bits=5") from None
        if not low < value < high:
            raise RankgateError(f"budget {text} is out of range: {kind} lies between {low:g} and {high:g}")
        return cls(kind, value)

    def level(self) -> float:
        """The Σ KL to start from, for a budget on quality."""
        if self.kind == "ppl":
            return math.log(self.value) / LOSS_PER_KL
        return ((1 - self.value) / FLIPS_PER_ROOT_KL) ** 2

    def __str__(self) -> str:
        return f"{self.kind}={self.value:g}"


@dataclass(frozen=True)
class Measured:
    """A whole model on a text against dense: values, standard errors of loss and top-1, bits per weight read."""

    ppl_ratio: float
    top1: float
    loss_error: float
    top1_error: float
    bits: float
    scored: int

    @classmethod
    def of(cls, dense: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor], bits: float) -> Measured:
        """From nats and the most likely token of every prediction (both 1-D) of the two models."""
        difference, same = other[0] - dense[0], (other[1] == dense[1]).double()
        root = math.sqrt(len(same))
        return cls(
            ppl_ratio=difference.mean().exp().item(),
            top1=same.mean().item(),
            loss_error=difference.std().item() / root,
            top1_error=same.std().item() / root,
            bits=bits,
            scored=len(same),
        )

    def excess(self, budget: Budget) -> float:
        """How many times too large the loss, the share of flips (at their upper bounds) or the bits are; ≤ 1 holds."""
        if budget.kind == "bits":
            return self.bits / budget.value
        if budget.kind == "ppl":
            return (math.log(self.ppl_ratio) + ONE_SIDED * self.loss_error) / math.log(budget.value)
        return (1 - self.top1 + ONE_SIDED * self.top1_error) / (1 - budget.value)
