"""Watching the gates of a converted model while it runs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from rankgate.conversion.convert import Converted, converted_layers
from rankgate.core import GroupedLinear, Projection, SparseLinear
from rankgate.methods.context import ContextProjection


@dataclass
class GateLog:
    """What one input group's gate did, token by token in the order of reading (1-D tensors on the CPU)."""

    members: list[str] = field(default_factory=list)
    _fire: list[Tensor] = field(default_factory=list)
    _columns: list[Tensor] = field(default_factory=list)

    @property
    def fire(self) -> Tensor:
        """Share of the residual that each token read: 0 or 1 for a token gate."""
        return torch.cat([torch.empty(0), *self._fire])

    @property
    def rate(self) -> float:
        """Share of the residual that was read: of tokens that fired, or of channels; 0 if it saw none."""
        return self.fire.mean().item() if self._fire else 0.0

    @property
    def columns(self) -> float | None:
        """Mean number of filled directions of a context basis, None for a fixed one."""
        return torch.cat(self._columns).float().mean().item() if self._columns else None

    def add(self, seen: Projection | ContextProjection | Tensor) -> None:
        """Add the answer of a token gate, or the mask (…, n) of a `ChannelGate`."""
        if isinstance(seen, Tensor):
            self._fire.append(seen.float().mean(-1).flatten().cpu())
            return
        assert seen.fire is not None
        self._fire.append(seen.fire.flatten().float().cpu())
        if isinstance(seen, ContextProjection):
            self._columns.append(seen.columns.flatten().cpu())


def gate_of(layer: Converted) -> nn.Module | None:
    """The module whose answer says what `layer` reads of its residual; None without a gate. Shared in a group."""
    if isinstance(layer, SparseLinear):
        return layer.gate
    return layer.group.gate if isinstance(layer, GroupedLinear) else layer.subspace


@contextmanager
def record_gates(model: nn.Module) -> Iterator[dict[nn.Module, GateLog]]:
    """While open, log every gate of `model`; the dictionary is keyed by the gate's module, see `gate_of`.

    A fused kernel decides by itself and asks no gate: log runs of more than one token.
    """
    logs: dict[nn.Module, GateLog] = {}
    for name, layer in converted_layers(model):
        gate = gate_of(layer)
        if gate is not None:
            logs.setdefault(gate, GateLog()).members.append(name)
    handles = [gate.register_forward_hook(lambda _, args, seen, log=log: log.add(seen)) for gate, log in logs.items()]
    try:
        yield logs
    finally:
        for handle in handles:
            handle.remove()
