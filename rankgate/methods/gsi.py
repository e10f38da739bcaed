"""Gated Subspace Inference: an activation subspace, a cached weight image, and W itself behind a gate.

    z = Vᵀ x      y = (W V) z + bias     if ‖x − V z‖ ≤ ε ‖x‖
                  y = W x + bias         otherwise

Reads per token: k (n + Σ m) weights for an input group with Σ m outputs, and all of W for the share p of tokens whose
gate opens. Nothing is approximated by more than the part of x outside the subspace, so quality is good at small ε by
construction; what decides the speed is how often the gate opens on text that V has not seen.

`basis="calibrated"`  V = top-k eigenvectors of C: fixed, the same for every text. `kept` is the share of E‖x‖² inside.
`basis="context"`     V is grown from the running text itself, see `context`. Needs no calibration.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from transformers import PreTrainedModel

from rankgate.core import GatedGroup, Subspace, widen
from rankgate.errors import RankgateError
from rankgate.methods.base import GroupwiseMethod, Rewrite, check_rank, factor, members, rank_for, stacked, too_large
from rankgate.methods.context import ContextBasis, ContextLinear, SequenceTracker
from rankgate.methods.given import GroupStats, Linear

BASES = ("calibrated", "context")


@dataclass(frozen=True)
class GSIConfig(GroupwiseMethod):
    """rank: k, or a fraction of the inputs n.  eps: tolerance ε ≥ 0; 0 is exact, ≥ 1 never opens the gate.

    allow_larger: also convert groups whose subspace alone reads as much as the dense layers, or more.
    """

    name: ClassVar[str] = "gsi"
    rank: int | float = 0.25
    eps: float = 0.05
    basis: str = "calibrated"
    allow_larger: bool = False

    def __post_init__(self) -> None:
        check_rank(self.rank)
        if not self.eps >= 0:
            raise RankgateError(f"eps {self.eps} is out of range; the tolerance is ≥ 0 (0.05 is usual)")
        if self.basis not in BASES:
            raise RankgateError(f"unknown basis {self.basis!r}; choose from {', '.join(BASES)}")
        if self.basis == "context" and self.eps >= 1:
            raise RankgateError(f"eps {self.eps} never opens the gate, so a context basis cannot grow; use less than 1")

    @property
    def needs_stats(self) -> bool:
        return self.basis == "calibrated"

    def rewrite_group(self, layers: list[Linear], stats: GroupStats | None) -> list[Rewrite]:
        n = layers[0].n
        rank = rank_for(self.rank, n, layers[0])
        reason = "" if self.allow_larger else too_large(rank, n, sum(layer.m for layer in layers))
        if reason:
            return [Rewrite(None, rank, reason=reason + " with the gate closed") for _ in layers]
        if stats is None:
            basis = ContextBasis(n, rank, self.eps)
            return [Rewrite(ContextLinear(basis, layer.W, layer.bias), rank) for layer in layers]
        if stats.tokens < rank:
            raise RankgateError(
                f"calibration saw {stats.tokens} tokens, too few for rank {rank} at {layers[0].name}; "
                "give more text or a lower rank"
            )
        values, vectors = stats.eigen()
        V = vectors[:, :rank]  # (n, k)
        kept = float(values[:rank].sum() / values.sum())
        W = stacked(layers)
        group = GatedGroup(Subspace(factor(V.T, W.dtype), self.eps), factor(widen(W) @ V, W.dtype), W)
        return [Rewrite(module, rank, kept) for module in members(group, layers)]

    def attach(self, model: PreTrainedModel) -> None:
        if self.basis == "context":
            SequenceTracker.install(model)
