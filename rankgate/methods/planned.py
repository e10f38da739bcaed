"""A setting of its own for every input group: what `plan` chooses, or what somebody wrote into a plan by hand."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar

from rankgate.common.kept import Kept, anew
from rankgate.errors import RankgateError
from rankgate.methods.base import Groups, Method, Rewrite, members, stacked
from rankgate.methods.given import GroupStats, Linear
from rankgate.methods.quantize import (
    ChannelWorth,
    GroupResult,
    closed_moment,
    gate_level,
    quantize_group,
    rounding_worth,
)
from rankgate.quantized import Grid, QuantizedGroup, Refinement


@dataclass(frozen=True)
class Setting:
    """How to quantise one group: bits of Q (4 or 8), rank of the correction, share of channels that are refined."""

    bits: int
    rank: int = 0
    refine: float = 0.0

    def __post_init__(self) -> None:
        Grid(self.bits)
        if not isinstance(self.rank, int) or self.rank < 0 or not 0 <= self.refine <= 1:
            raise RankgateError(
                f"rank {self.rank}, refine {self.refine}: give a whole number ≥ 0 and a share in [0, 1]"
            )

    def __str__(self) -> str:
        rank, refine = f" r={self.rank}" if self.rank else "", f" refine={self.refine:g}" if self.refine else ""
        return f"int{self.bits}{rank}{refine}"


@dataclass(frozen=True)
class PlannedConfig(Method):
    """`settings` by the first member of an input group; groups that are not named, or have None, stay dense.

    built: groups that are quantised already, by name and setting; they are used as they are.
    """

    name: ClassVar[str] = "planned"
    settings: Mapping[str, Setting | None]
    built: Mapping[tuple[str, Setting], QuantizedGroup] = field(default_factory=dict, compare=False, repr=False)

    def __post_init__(self) -> None:
        read = {name: _setting(name, value) for name, value in self.settings.items()}
        object.__setattr__(self, "settings", read)

    def record(self) -> dict[str, Any]:
        return {"name": self.name, "settings": {name: s and asdict(s) for name, s in self.settings.items()}}

    @property
    def needs_stats(self) -> bool:
        return True

    @property
    def needs_sensitivity(self) -> bool:
        return True

    def rewrite(self, groups: Groups, kept: Kept = anew) -> Iterator[list[Rewrite]]:
        unknown = set(self.settings)
        for layers, stats in groups():
            assert stats is not None
            unknown.discard(layers[0].name)
            setting = self.settings.get(layers[0].name)
            if setting is None:
                yield [Rewrite(None, 0, reason="the plan keeps it dense") for _ in layers]
            else:
                group = self.built.get((layers[0].name, setting)) or assemble(
                    quantize(layers, stats, setting), stats, setting
                )
                yield [Rewrite(module, setting.rank) for module in members(group, layers)]
        if unknown:
            raise RankgateError(f"the plan names {sorted(unknown)[0]}, which is not the first of an input group here")


def _setting(name: str, value: Any) -> Setting | None:
    if value is None or isinstance(value, Setting):
        return value
    try:
        return Setting(**value)
    except TypeError as error:
        raise RankgateError(f"the plan's setting of {name} is not understood: {error}") from error


def quantize(layers: list[Linear], stats: GroupStats, setting: Setting, rounds: int = 3) -> GroupResult:
    """The linears of one group, stacked and quantised; gates are still shut. `rounds`: see `quantize_group`."""
    assert stats.sensitivity is not None
    W = stacked(layers)
    C = stats.C.to(W.device)
    if setting.refine:
        expected = ChannelWorth(stats.sample, rounding_worth(W, stats.sensitivity, setting.bits), len(W))
        C = closed_moment(C, stats.sample, expected.thresholds(gate_level([expected], setting.refine)))
    refined = setting.refine > 0
    grid = Grid(setting.bits)
    return quantize_group(W, C, stats.sensitivity, grid=grid, rank=setting.rank, refined=refined, rounds=rounds)


def assemble(result: GroupResult, stats: GroupStats, setting: Setting) -> QuantizedGroup:
    """The module of a quantised group, its gate open for a share `refine` of the channels that calibration saw."""
    plane = result.refinement if setting.refine else None
    if plane is not None:
        assert result.worth is not None
        worth = ChannelWorth(stats.sample, result.worth, result.base.m)
        opened = worth.thresholds(gate_level([worth], setting.refine)).to(plane.gate.threshold.dtype)
        plane = Refinement(plane.m, plane.codes, plane.row, plane.column, opened)
    return QuantizedGroup(result.base, result.low_rank, plane)
