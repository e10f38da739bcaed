"""A quantised input group for prompts on the GPU: strips of it as 16-bit (or float32) floats, into cuBLAS.

At so many tokens the product is bound by arithmetic, of which cuBLAS does most; unpacking costs as much as some hundred
tokens. A strip is small enough to stay in the GPU's cache until it is multiplied, unless tokens are so few that only a
large one keeps all multiprocessors busy.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from rankgate.ops.gpu.nibbles import nibbles

ROWS, GROUPS = 64, 4  # of a program
CACHED = 16 << 20  # bytes of a strip at most, if there is work enough in it
WORK = 132 * 128 * 256  # results of a strip, at least


@triton.jit
def _unpack(
    W, codes, scale, zero, start, m, n, blocks,
    BITS: tl.constexpr, ZERO: tl.constexpr, ROWS: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    """W (rows × n) = Q, of the rows of a strip from `start` to m."""
    WIDTH: tl.constexpr = 8 * BITS
    dtype: tl.constexpr = W.dtype.element_ty
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None, None]
    block = tl.program_id(1) * GROUPS + tl.arange(0, GROUPS)[None, :, None]
    i = tl.arange(0, WIDTH)[None, None, :]
    here = tl.minimum(start + row, m - 1).to(tl.int64) * blocks + tl.minimum(block, blocks - 1)
    q, s = tl.load(codes + here * WIDTH + i), tl.load(scale + here)
    if ZERO:
        z = tl.load(zero + here).to(tl.float32)
    else:
        z = tl.full((ROWS, GROUPS, 1), 8.0 if BITS == 4 else 0.0, tl.float32)
    place, inside = row * n + block * 64 + i, start + row < m
    if BITS == 4:
        shape: tl.constexpr = (ROWS, GROUPS, WIDTH)
        if dtype == tl.float32:
            low, high = ((q & 15).to(dtype) - z) * s.to(dtype), ((q >> 4).to(dtype) - z) * s.to(dtype)
        else:
            low, high = nibbles(q, tl.broadcast_to(z, shape), tl.broadcast_to(s.to(dtype), shape))
        tl.store(W + place, low, mask=inside & (block * 64 + i < n))
        tl.store(W + place + 32, high, mask=inside & (block * 64 + 32 + i < n))
    else:
        tl.store(W + place, ((q.to(tl.float32) - z) * s.to(tl.float32)).to(dtype), mask=inside & (block * 64 + i < n))


@triton.jit
def _unpack_plane(W, plane, row_factor, column, start, m, n, INPUTS: tl.constexpr):
    """W (rows × n) = E, of 128 rows (`start` is a multiple of that) and INPUTS columns."""
    strip = start // 128 + tl.program_id(0)
    k, byte = tl.program_id(1) * INPUTS + tl.arange(0, INPUTS)[None, :], tl.arange(0, 64)[:, None]
    stride = tl.where(strip * 128 + 128 <= tl.cdiv(m, 64) * 64, 64, 32)
    q = tl.load(plane + strip.to(tl.int64) * 64 * n + k * stride + byte, mask=(k < n) & (byte < stride), other=0x88)
    c = tl.load(column + k, mask=k < n, other=0.0).to(tl.float32)
    r = byte // 32 * 64 + byte % 32
    for half in tl.static_range(2):
        row = strip * 128 + r + 32 * half
        inside = (row < m) & (k < n)
        place = W + (row - start).to(tl.int64) * n + k
        e = ((q >> 4 * half) & 15).to(tl.float32) - 8
        e *= c * tl.load(row_factor + row, mask=row < m, other=0.0).to(tl.float32)
        tl.store(place, e.to(W.dtype.element_ty), mask=inside)


def multiply(x: Tensor, parts: list[Any]) -> Tensor:
    """y (tokens, m) from x (tokens, n) and `QuantizedGroup.parts`."""
    codes, scale, zero, A, B, factor, plane, row, column, threshold = parts
    (tokens, n), (m, blocks) = x.shape, scale.shape
    y = x.new_empty((tokens, m))
    opened = None if plane is None else torch.where(x.abs() > threshold, x, 0)
    strip = max(CACHED // (n * x.element_size()), WORK // tokens) // 128 * 128
    strip = min(max(strip, 128), m)
    W = x.new_empty((strip, n))
    bits = 4 if codes.dtype == torch.uint8 else 8
    for start in range(0, m, strip):
        rows = min(strip, m - start)
        _unpack[triton.cdiv(rows, ROWS), triton.cdiv(blocks, GROUPS)](
            *(W, codes, scale, zero, start, min(start + rows, m), n, blocks),
            BITS=bits,
            ZERO=zero is not None,
            ROWS=ROWS,
            GROUPS=GROUPS,
        )
        here = y[:, start : start + rows]
        torch.mm(x, W[:rows].T, out=here)
        if opened is not None:
            _unpack_plane[triton.cdiv(rows, 128), triton.cdiv(n, 64)](W, plane, row, column, start, m, n, INPUTS=64)
            here.addmm_(opened, W[:rows].T)
    if A is not None:
        z = F.linear(x.float(), B.float()) * factor
        y.addmm_(z.to(x.dtype), A.T.to(x.dtype))
    return y
