"""`rounding.round_block` on the GPU (Triton): a program holds b columns of some rows of W in registers."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

STRIPE = 32  # rows of W per program
MAGIC = tl.constexpr(12582912.0)  # 1.5 · 2²³: adding it rounds a float32 below 2²² to nearest even


@triton.jit
def _round_block(rows, s, z, U, codes, errors, count, m, low, high, B: tl.constexpr, M: tl.constexpr):
    column, row = tl.arange(0, B), tl.program_id(0) * M + tl.arange(0, M)
    inside = row < m
    tile = tl.load(rows + column[:, None] * m + row, mask=(column[:, None] < count) & inside, other=0.0)
    for j in range(count):
        w = tl.sum(tl.where(column[:, None] == j, tile, 0.0), 0)
        scale = tl.load(s + j * m + row, mask=inside, other=1.0)
        zero = tl.load(z + j * m + row, mask=inside, other=0.0)
        code = tl.minimum(tl.maximum(w / scale + zero, low), high)
        code = (code + MAGIC) - MAGIC
        error = (w - (code - zero) * scale) / tl.load(U + j * count + j)
        tl.store(codes + j * m + row, code, mask=inside)
        tl.store(errors + j * m + row, error, mask=inside)
        u = tl.load(U + j * count + column, mask=(column > j) & (column < count), other=0.0)
        tile -= u[:, None] * error[None, :]


def round_block(rows: Tensor, s: Tensor, z: Tensor, U: Tensor, low: int, high: int) -> tuple[Tensor, Tensor]:
    """See `ops.rounding`."""
    codes, errors = torch.empty_like(rows), torch.empty_like(rows)
    count, m = rows.shape
    width = triton.next_power_of_2(count)
    _round_block[triton.cdiv(m, STRIPE),](
        rows, s, z, U, codes, errors, count, m, float(low), float(high), B=width, M=STRIPE, num_warps=4
    )
    return codes, errors
