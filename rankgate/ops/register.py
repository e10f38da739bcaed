"""How a backend puts its kernels behind the operators."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

_operators = torch.library.Library("rankgate", "IMPL")


class Route(NamedTuple):
    """What an operator does on a device: `module.function`, a kernel, where it `takes` the arguments."""

    module: str
    function: str
    call: Callable[..., Any]


ROUTES: dict[tuple[str, str], Route] = {}  # by operator and dispatch key


def register(
    operator: str,
    device: str,
    place: str,
    *,
    takes: Callable[..., bool] | None = None,
    definition: Callable[..., Any] | None = None,
) -> None:
    """Let `place` ("module.function") compute `operator` (of `torch.ops.rankgate`) on `device` (a dispatch key).

    The module is imported at the first call: Numba and Triton take seconds. takes: of which arguments; of others the
    `definition` computes the result.
    """
    module, function = place.rsplit(".", 1)

    def call(*arguments: Any) -> Any:
        if takes is not None and definition is not None and not takes(*arguments):
            return definition(*arguments)
        return getattr(importlib.import_module(module), function)(*arguments)

    ROUTES[operator, device] = Route(module, function, call)
    _operators.impl(operator, call, device)
