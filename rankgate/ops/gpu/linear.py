"""Which kernel multiplies so many tokens with a quantised input group on the GPU."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rankgate.core import FEW
from rankgate.ops.gpu import many, quantized, unpack


def linear(x: Tensor, parts: list[Any]) -> Tensor:
    """y (…, m) from x (…, n) and `QuantizedGroup.parts`.

    One token, and up to 8 of float32 or with a refinement plane, of which each then reads what it opens: `quantized`.
    Up to 64 in 16 bits: `many`. More, as in a prompt: `unpack`, for which every channel is open. That is nearer to the
    dense model than the gate, and who records gates, as an evaluation does, gets `QuantizedGroup.reference`.
    """
    flat = x.reshape(-1, x.shape[-1])
    short, refined = x.dtype != torch.float32, parts[6] is not None
    if len(flat) <= (1 if short and not refined else FEW):
        y = quantized.gemv(flat, *parts)
    elif short and len(flat) <= many.LARGEST:
        y = many.multiply(flat, parts)
    else:
        y = unpack.multiply(flat, parts)
    return y.view(*x.shape[:-1], len(parts[0]))
