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
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from rankgate.common.kept import Kept, anew
from rankgate.core import ChannelGate
from rankgate.errors import RankgateError
from rankgate.methods.base import Groups, Method, Rewrite, members, stacked
from rankgate.methods.given import GroupStats, Linear
from rankgate.methods.quantize import (
    ChannelWorth,
    allocate_ranks,
    closed_moment,
    gate_level,
    quantize_group,
    rounding_worth,
    spectrum,
)
from rankgate.quantized import GROUP, PART_DTYPES, Grid, QuantizedGroup

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

    def rewrite(self, groups: Groups, kept: Kept = anew) -> Iterator[list[Rewrite]]:
        ranks, expected = self.survey(groups, kept)
        level = gate_level(expected, self.refine) if expected else 0.0
        gates: list[tuple[ChannelGate, ChannelWorth]] = []
        for g, (layers, stats) in enumerate(groups()):
            assert stats is not None
            shut = expected[g].thresholds(level) if expected else None
            made = kept(layers[0].name, partial(self._quantized, layers, stats, ranks[g], shut))
            device, worth = layers[0].W.device, made.pop("worth", None)
            group = QuantizedGroup.of(layers[0].n, [made.get(str(i)) for i in range(len(PART_DTYPES))]).to(device)
            if group.gate is not None and worth is not None:
                gates.append((group.gate, ChannelWorth(stats.sample, worth.to(device), group.m)))
            yield [Rewrite(module, ranks[g]) for module in members(group, layers)]
        if gates:
            level = gate_level([channels for _, channels in gates], self.refine)
            for gate, channels in gates:
                gate.threshold.copy_(channels.thresholds(level))

    def _quantized(self, layers: list[Linear], stats: GroupStats, rank: int, shut: Tensor | None) -> dict[str, Tensor]:
        """The parts of a quantised group by their number, and the `worth` of its refinement.

        shut: thresholds (n) up to which gates are expected to be closed.
        """
        assert stats.sensitivity is not None
        W = stacked(layers)
        C = stats.C.to(W.device)
        if shut is not None:
            C = closed_moment(C, stats.sample, shut)
        result = quantize_group(
            W, C, stats.sensitivity, grid=self.grid, rank=rank, refined=self.refine > 0, rounds=self.rounds
        )
        parts = QuantizedGroup(result.base, result.low_rank, result.refinement).tensors
        made = {str(i): part.detach() for i, part in enumerate(parts) if part is not None}
        return made if result.worth is None else {**made, "worth": result.worth}

    def survey(self, groups: Groups, kept: Kept = anew) -> tuple[list[int], list[ChannelWorth]]:
        """The rank of each group, and what its channel gates will decide by (nothing without a refinement)."""
        shapes, spectra, expected = [], [], []
        for layers, stats in groups():
            assert stats is not None
            found = kept(f"{layers[0].name} survey", partial(self._surveyed, layers, stats))
            m = sum(layer.m for layer in layers)
            shapes.append((m, layers[0].n))
            spectra.append(found["spectrum"])
            if self.refine:
                expected.append(ChannelWorth(stats.sample, found["worth"].to(stats.sample.device), m))
        return allocate_ranks(spectra, shapes, self.rank), expected

    def _surveyed(self, layers: list[Linear], stats: GroupStats) -> dict[str, Tensor]:
        """The singular values that a correction could restore, and what a channel of the refinement may be worth."""
        assert stats.sensitivity is not None
        W, found = stacked(layers), {"spectrum": torch.empty(0)}
        if self.rank:
            most = SPREAD * self.rank
            found["spectrum"] = spectrum(W, stats.C.to(W.device), stats.sensitivity, self.grid, most)
        if self.refine:
            found["worth"] = rounding_worth(W, stats.sensitivity, self.bits)
        return found
