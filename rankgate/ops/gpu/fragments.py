"""A quantised input group on tensor cores, for 2 to 64 tokens: the contract of `QuantizedGroup.reference`.

Triton does not let one choose how a factor of a product lies in registers, and moving codes from one layout to another
costs more than reading them. So this kernel is CUDA C++ (`fragments.cu`), which takes a second to compile for each
shape of a block. Weights are rounded to 16 bits as in torch's products, sums are float32. What low rank and refinement
add is computed by launches before, with which this one overlaps, see `united`.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from rankgate.ops.gpu import united
from rankgate.ops.gpu.launch import launch
from rankgate.ops.gpu.quantized import padded
from rankgate.quantized import groups_of

LARGEST = 64  # tokens at once


def shape(tokens: int, m: int, bits: int) -> dict[str, int]:
    """Of a block, as `fragments.cu` defines it: the fastest on an H100, where small matrices need many blocks."""
    large = m >= 1 << 14
    columns = united.columns(tokens)
    if large and bits == 8:
        columns = max(columns, 2)
    if columns == 4:
        tiles, warps = (4, 4) if large else (2, 4 if tokens > 32 else 8)
    else:
        tiles, warps = 2 if large or columns == 2 else 1, 8
    return {"TILES": tiles, "WARPS": warps, "COLUMNS": columns}


def multiply(x: Tensor, parts: list[Any]) -> Tensor:
    """y (tokens, m) from 2 to 64 tokens that `launch.takes` (tokens, n), and `QuantizedGroup.parts`."""
    codes, scale, zero, *added = parts
    (tokens, n), m = x.shape, len(codes)
    bits, half = 4 if codes.dtype == torch.uint8 else 8, int(x.dtype == torch.float16)
    block = shape(tokens, m, bits)
    whole, y = padded(x), x.new_empty((tokens, m))
    extra = united.added(whole, m, n, *added)
    launch(
        "fragments",
        "fragments",
        {**block, "BITS": bits, "ZERO": int(zero is not None), "GROUPS": groups_of(scale, n), "HALF": half},
        (triton.cdiv(tokens, 8 * block["COLUMNS"]), triton.cdiv(m, 16 * block["TILES"]), 1),
        32 * block["WARPS"],
        [
            *(whole, y, codes, scale, scale if zero is None else zero, y if extra is None else extra),
            *(tokens, m, whole.shape[1] // 64, 0 if extra is None else len(extra)),
        ],
        x.device,
    )
    return y
