"""Low rank without a gate: y ≈ A (B x).

`svd`   A B is the truncated singular value decomposition of W: the closest rank-k matrix to W, blind to what the
        inputs look like. `kept` is Σᵢ≤k σᵢ² / Σ σᵢ².
`asvd`  A B is the rank-k map with the least mean squared *output* error E‖W x − A B x‖² over the calibration text
        (activation-aware SVD). With C = E[x xᵀ] = S Sᵀ and U_k the top left singular vectors of W S, it is

            A = U_k,   B = U_kᵀ W,

        the truncated SVD of W S mapped back by S⁻¹, written so that no inverse is needed: a singular C (inputs that
        are always zero) does no harm. `kept` is the share of the outputs' energy E‖W x‖².

The rank is given, or is the least that keeps a share `energy`. A layer stays dense where k (m + n) ≥ m n, because its
factors would be read for longer than W.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from rankgate.core import GatedGroup, Subspace, widen
from rankgate.errors import RankgateError
from rankgate.methods.base import GroupwiseMethod, Rewrite, check_rank, factor, members, rank_for, too_large
from rankgate.methods.given import GroupStats, Linear

RIDGE = 1e-6  # of the mean eigenvalue of C, added to each: directions that calibration never saw still count a little


@dataclass(frozen=True)
class SVDConfig(GroupwiseMethod):
    """Truncated SVD of the weights.

    Exactly one of: rank (k, or a fraction of min(m, n)); energy (share of Σ σ² to keep, in (0, 1]).
    allow_larger: also convert a layer whose factors hold as many weights as the dense layer, or more.
    """

    name: ClassVar[str] = "svd"
    rank: int | float | None = None
    energy: float | None = None
    allow_larger: bool = False

    def __post_init__(self) -> None:
        if (self.rank is None) == (self.energy is None):
            raise RankgateError(f"{self.name} takes either a rank or an energy threshold")
        if self.rank is not None:
            check_rank(self.rank)
        if self.energy is not None and not 0 < self.energy <= 1:
            raise RankgateError(f"energy {self.energy} is out of range; give a share in (0, 1]")

    @property
    def needs_stats(self) -> bool:
        return False

    def rewrite_group(self, layers: list[Linear], stats: GroupStats | None) -> list[Rewrite]:
        return [self._rewrite(layer, stats) for layer in layers]

    def _rewrite(self, layer: Linear, stats: GroupStats | None) -> Rewrite:
        A, sigma, B = self.factors(widen(layer.W), stats)
        energy = sigma.double().square().cumsum(0)
        energy = energy / energy[-1].clamp_min(torch.finfo(energy.dtype).tiny)
        full = min(layer.m, layer.n)
        rank = rank_at(energy, self.energy or 1.0) if self.rank is None else rank_for(self.rank, full, layer)
        kept = float(energy[rank - 1])
        reason = "" if self.allow_larger else too_large(rank, layer.n, layer.m)
        if reason:
            return Rewrite(None, rank, kept, reason)
        dtype = layer.W.dtype
        group = GatedGroup(Subspace(factor(B[:rank], dtype)), factor(A[:, :rank], dtype), None)
        return Rewrite(members(group, [layer])[0], rank, kept)

    def factors(self, W: Tensor, stats: GroupStats | None) -> tuple[Tensor, Tensor, Tensor]:
        """A (m × r), σ (r, descending) and B (r × n) at full rank r = min(m, n), to be cut to the first k."""
        U, sigma, Vh = torch.linalg.svd(W, full_matrices=False)
        root = sigma.sqrt()  # split evenly, so that neither factor strains a narrow dtype
        return U * root, sigma, root[:, None] * Vh


@dataclass(frozen=True)
class ASVDConfig(SVDConfig):
    """Activation-aware SVD: least mean output error over the calibration text. Settings as for `svd`."""

    name: ClassVar[str] = "asvd"

    @property
    def needs_stats(self) -> bool:
        return True

    def factors(self, W: Tensor, stats: GroupStats | None) -> tuple[Tensor, Tensor, Tensor]:
        assert stats is not None
        values, vectors = stats.eigen()
        root = (values + RIDGE * values.mean()).sqrt()
        U, sigma, _ = torch.linalg.svd((W @ vectors) * root, full_matrices=False)
        return U, sigma, U.T @ W


def rank_at(energy: Tensor, share: float) -> int:
    """The least k whose cumulative `energy` (ascending, ends at 1) reaches `share`."""
    return min(int((energy < share).sum()) + 1, energy.numel())
