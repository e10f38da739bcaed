"""Watching the gates of a converted model while it runs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from rankgate.convert import converted_layers
from rankgate.core import Projection
from rankgate.methods.context import ContextProjection


@dataclass
class GateLog:
    """What one input group's gate did, token by token in the order of reading (1-D tensors on the CPU)."""

    members: list[str] = field(default_factory=list)
    _fire: list[Tensor] = field(default_factory=list)
    _columns: list[Tensor] = field(default_factory=list)

    @property
    def fire(self) -> Tensor:
        return torch.cat(self._fire)

    @property
    def rate(self) -> float:
        """Share of tokens that fired."""
        return self.fire.float().mean().item()

    @property
    def columns(self) -> float | None:
        """Mean number of filled directions of a context basis, None for a fixed one."""
        return torch.cat(self._columns).float().mean().item() if self._columns else None

    def add(self, seen: Projection | ContextProjection) -> None:
        assert seen.fire is not None
        self._fire.append(seen.fire.flatten().cpu())
        if isinstance(seen, ContextProjection):
            self._columns.append(seen.columns.flatten().cpu())


@contextmanager
def record_gates(model: nn.Module) -> Iterator[dict[nn.Module, GateLog]]:
    """While open, log every gated subspace of `model`; the dictionary is keyed by the subspace module."""
    logs: dict[nn.Module, GateLog] = {}
    for name, layer in converted_layers(model):
        if layer.subspace.eps is not None:
            logs.setdefault(layer.subspace, GateLog()).members.append(name)
    handles = [
        subspace.register_forward_hook(lambda _, args, seen, log=log: log.add(seen)) for subspace, log in logs.items()
    ]
    try:
        yield logs
    finally:
        for handle in handles:
            handle.remove()
