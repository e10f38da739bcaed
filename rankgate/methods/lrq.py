"""Low rank plus quantised, Rankgate's own method: codes that are always read, and a refinement behind channel gates.

    y = Q x  +  A (B x)  +  Σ_{j : |x_j| > t_j} E_j x_j  +  bias

Q has 4 or 8 bits, A B corrects its error where outputs matter, and E restores the rest column by column, for the
channels that are large enough at this token. `quantize` says how each is chosen. Reads per token for a group with n
inputs and m outputs in all: m n bits/8 and scales, r (m + n) for the correction, and a share `refine` of m n / 2.

Two things are decided for the model as a whole: `rank` is a mean, spent on the groups where a byte restores most; and
gates open above one level of worth per byte, at which a share `refine` of all channels is read on the calibration text.
Groups are read twice for that, and only singular values are kept between the passes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch

from rankgate.core import ChannelGate
from rankgate.errors import RankgateError
from rankgate.methods.base import Groups, Method, Rewrite, members, stacked
from rankgate.methods.quantize import (
    ChannelWorth,
    allocate_ranks,
    closed_moment,
    gate_level,
    quantize_group,
    rounding_worth,
    spectrum,
)
from rankgate.quantized import GROUP, Grid, QuantizedGroup

SPREAD = 4  # a group may get at most this many times the mean rank


@dataclass(frozen=True)
class LRQConfig(Method):
    """Settings of `lrq`.

    bits: of Q, 4 or 8. rank: mean rank of the correction over groups, 0 for none. refine: share of channels whose
    refinement is read, in [0, 1]; 0 for no refinement plane, 1 for gates that are always open.
    symmetric: no zero points; 1.5 % fewer bytes, more loss. rounds: of choosing Q and A B in turn. group_size: inputs
    that share a scale, 64 or 32, the size of llama.cpp's blocks; 0.25 bits more for each weight, less loss.
    """

    name: ClassVar[str] = "lrq"
    bits: int = 4
    rank: int = 16
    refine: float = 0.05
    symmetric: bool = True
    rounds: int = 3
    group_size: int = GROUP

    def __post_init__(self) -> None:
        _ = self.grid
        if not isinstance(self.rank, int) or self.rank < 0:
            raise RankgateError(f"rank {self.rank} is out of range; lrq takes a whole number ≥ 0, the mean over groups")
        if not 0 <= self.refine <= 1:
            raise RankgateError(f"refine {self.refine} is out of range; give a share of channels in [0, 1]")
        if self.rounds < 1:
            raise RankgateError(f"{self.rounds} rounds choose nothing; use at least 1")

    @property
    def grid(self) -> Grid:
        """Of Q."""
        return Grid(self.bits, self.symmetric, self.group_size)

    @property
    def needs_stats(self) -> bool:
        return True

    @property
    def needs_sensitivity(self) -> bool:
        return True

    def rewrite(self, groups: Groups) -> Iterator[list[Rewrite]]:
        ranks, expected = self.survey(groups)
        level = gate_level(expected, self.refine) if expected else 0.0
        gates: list[tuple[ChannelGate, ChannelWorth]] = []
        for g, (layers, stats) in enumerate(groups()):
            assert stats is not None and stats.sensitivity is not None
            W = stacked(layers)
            C = stats.C.to(W.device)
            if expected:
                C = closed_moment(C, stats.sample, expected[g].thresholds(level))
            result = quantize_group(
                W,
                C,
                stats.sensitivity,
                grid=self.grid,
                rank=ranks[g],
                refined=self.refine > 0,
                rounds=self.rounds,
            )
            if result.refinement is not None and result.worth is not None:
                gates.append((result.refinement.gate, ChannelWorth(stats.sample, result.worth, len(W))))
            group = QuantizedGroup(result.base, result.low_rank, result.refinement)
            yield [Rewrite(module, ranks[g]) for module in members(group, layers)]
        if gates:
            level = gate_level([worth for _, worth in gates], self.refine)
            for gate, worth in gates:
                gate.threshold.copy_(worth.thresholds(level))

    def survey(self, groups: Groups) -> tuple[list[int], list[ChannelWorth]]:
        """The rank of each group, and what its channel gates will decide by (nothing without a refinement)."""
        shapes, spectra, expected = [], [], []
        for layers, stats in groups():
            assert stats is not None and stats.sensitivity is not None
            W = stacked(layers)
            shapes.append((len(W), layers[0].n))
            spectra.append(torch.empty(0))
            if self.rank:
                most = SPREAD * self.rank
                spectra[-1] = spectrum(W, stats.C.to(W.device), stats.sensitivity, self.grid, most)
            if self.refine:
                worth = rounding_worth(W, stats.sensitivity, self.bits)
                expected.append(ChannelWorth(stats.sample, worth, len(W)))
        return allocate_ranks(spectra, shapes, self.rank), expected
