"""Which kernel multiplies so many tokens with a quantised input group on the GPU."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from rankgate.core import FEW
from rankgate.ops.gpu import fragments, quantized, unpack
from rankgate.ops.gpu.launch import takes


def linear(x: Tensor, parts: list[Any]) -> Tensor:
    """y (…, m) from x (…, n) and `QuantizedGroup.parts`.

    One token: `quantized`. Up to 64 in 16 bits: `fragments`; up to 8 others: `quantized` again. More, as in a prompt:
    `unpack`, for which every channel is open. That is nearer to the dense model than the gate, and who records gates,
    as an evaluation does, gets `QuantizedGroup.reference`.
    """
    flat = x.reshape(-1, x.shape[-1])
    if 1 < len(flat) <= fragments.LARGEST and takes(flat):
        y = fragments.multiply(flat, parts)
    elif len(flat) <= FEW:
        y = quantized.gemv(flat, *parts)
    else:
        y = unpack.multiply(flat, parts)
    return y.view(*x.shape[:-1], len(parts[0]))
