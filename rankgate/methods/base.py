"""What every method is: a frozen dataclass of settings with one verb, `rewrite`.

A method is handed a way to read the groups, which it may use more than once: memory holds one group at a time.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from rankgate.common.kept import Kept, anew
from rankgate.core import GroupedLinear, LinearGroup
from rankgate.errors import RankgateError
from rankgate.methods.given import GroupStats, Linear

Groups = Callable[
    [], Iterator[tuple[list[Linear], GroupStats | None]]
]  # the linears of each group, with their statistics


@dataclass(frozen=True)
class Rewrite:
    """What became of one linear: its new module, or the reason why it stays dense.

    `kept` is the share of energy that the rank keeps; of what, the method says (None where it is not known in advance).
    """

    module: nn.Module | None
    rank: int | None = None
    kept: float | None = None
    reason: str = ""


@dataclass(frozen=True)
class Method(ABC):
    """Settings of one method; subclasses add fields and validate them when they are made."""

    name: ClassVar[str]

    @property
    @abstractmethod
    def needs_stats(self) -> bool:
        """Whether `rewrite` needs calibration statistics."""

    @property
    def needs_sensitivity(self) -> bool:
        """Whether the statistics must hold the sensitivity of outputs."""
        return False

    @abstractmethod
    def rewrite(self, groups: Groups, kept: Kept = anew) -> Iterator[list[Rewrite]]:
        """The rewritten linears of every input group, in order. Each is put in place before the next is asked for.

        kept: where a method whose work takes long may find what it has done before.
        """

    def record(self) -> dict[str, Any]:
        """The method's name and settings as plain JSON values."""
        return {"name": self.name, **asdict(self)}

    def attach(self, model: PreTrainedModel) -> None:  # noqa: B027  most methods need nothing
        """Install what the method needs on the converted model as a whole. Called after conversion and loading."""


class GroupwiseMethod(Method):
    """A method that needs to see only one group at a time."""

    def rewrite(self, groups: Groups, kept: Kept = anew) -> Iterator[list[Rewrite]]:
        for layers, stats in groups():
            yield self.rewrite_group(layers, stats)

    @abstractmethod
    def rewrite_group(self, layers: list[Linear], stats: GroupStats | None) -> list[Rewrite]:
        """Rewrite the linears of one input group, in order."""


def stacked(layers: list[Linear]) -> Tensor:
    """W of a group (Σ m × n); that of a single layer is not copied."""
    return layers[0].W if len(layers) == 1 else torch.cat([layer.W for layer in layers])


def members(group: LinearGroup, layers: list[Linear]) -> list[GroupedLinear]:
    """Each of `layers` as its rows of `group`."""
    made, start = [], 0
    for layer in layers:
        made.append(GroupedLinear(group, start, start + layer.m, layer.bias))
        start += layer.m
    return made


def check_rank(rank: int | float) -> None:
    """Raises RankgateError unless `rank` is a positive integer or a fraction in (0, 1]."""
    if not rank > 0 or (isinstance(rank, float) and rank > 1):
        raise RankgateError(f"rank {rank} is out of range; give a whole number ≥ 1 or a fraction in (0, 1]")


def rank_for(rank: int | float, full: int, layer: Linear) -> int:
    """The rank to use for `layer`: an integer as it is, a fraction of `full`, never above `full`.

    Raises RankgateError if an integer exceeds the number of inputs n.
    """
    if isinstance(rank, float):
        return max(1, round(rank * full))
    if rank > layer.n:
        raise RankgateError(f"rank {rank} exceeds the {layer.n} inputs of {layer.name}; lower it or use a fraction")
    return min(rank, full)


def factor(view: Tensor, dtype: torch.dtype) -> Tensor:
    """A contiguous copy of `view` with storage of its own: a slice would keep the whole factor alive."""
    return view.to(dtype, copy=True, memory_format=torch.contiguous_format)


def too_large(rank: int, n: int, outputs: int) -> str:
    """Why a subspace of `rank` for `outputs` outputs in all is no gain over dense, or '' if it is one."""
    ratio = rank * (n + outputs) / (n * outputs)
    return f"rank {rank} reads {ratio:.2f} x dense" if ratio >= 1 else ""
