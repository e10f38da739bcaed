"""What `lrq` has to beat: plain quantisation, and plain activation sparsity.

`int8`, `int4`  W rounded to nearest in groups of 64 inputs, symmetric, each scale the best of a short list of shrunken
                ranges by squared error of the weights. No statistics, no error compensation, no correction.
`sparse`        y = Σ_j W_j x_j over the channels j with the largest |x_j| ‖W_j‖; W stays in the model's dtype. In every
                input group, thresholds are such that a share `keep` of the channels is read on the calibration text.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from rankgate.core import ChannelGate, SparseLinear
from rankgate.errors import RankgateError
from rankgate.methods.base import GroupwiseMethod, Rewrite, members, stacked
from rankgate.methods.given import GroupStats, Linear
from rankgate.methods.quantize import ChannelWorth, gate_level, nearest
from rankgate.quantized import QuantizedGroup


@dataclass(frozen=True)
class Int8Config(GroupwiseMethod):
    """8 bits, rounded to nearest. No settings."""

    name: ClassVar[str] = "int8"
    bits: ClassVar[int] = 8

    @property
    def needs_stats(self) -> bool:
        return False

    def rewrite_group(self, layers: list[Linear], stats: GroupStats | None) -> list[Rewrite]:
        group = QuantizedGroup(nearest(stacked(layers), self.bits), None, None)
        return [Rewrite(module) for module in members(group, layers)]


@dataclass(frozen=True)
class Int4Config(Int8Config):
    """4 bits, rounded to nearest. No settings."""

    name: ClassVar[str] = "int4"
    bits: ClassVar[int] = 4


@dataclass(frozen=True)
class SparseConfig(GroupwiseMethod):
    """keep: share of channels that is read, in (0, 1]."""

    name: ClassVar[str] = "sparse"
    keep: float = 0.5

    def __post_init__(self) -> None:
        if not 0 < self.keep <= 1:
            raise RankgateError(f"keep {self.keep} is out of range; give a share of channels in (0, 1]")

    @property
    def needs_stats(self) -> bool:
        return True

    def rewrite_group(self, layers: list[Linear], stats: GroupStats | None) -> list[Rewrite]:
        assert stats is not None
        norms = torch.stack([torch.linalg.vector_norm(layer.W.float(), dim=0) for layer in layers])
        worth = ChannelWorth(stats.sample, torch.linalg.vector_norm(norms, dim=0), sum(layer.m for layer in layers))
        gate = ChannelGate(worth.thresholds(gate_level([worth], self.keep)))
        return [Rewrite(SparseLinear(gate, layer.W, layer.bias)) for layer in layers]
