"""A quantised input group for prompts on the GPU: strips of it as 16-bit (or float32) floats, into cuBLAS.

At so many tokens the product is bound by arithmetic, of which cuBLAS does most; unpacking costs as much as some hundred
tokens. What a gate opens would have to be multiplied by itself, which costs more than all of the refinement plane in
the same matrix: so every channel is open for every token here. A strip is small enough to stay in the GPU's cache until
it is multiplied, unless tokens are so few that only a large one keeps all multiprocessors busy.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

ROWS, GROUPS = 64, 4  # of a program
CACHED = 16 << 20  # bytes of a strip at most, if there is work enough in it
WORK = 132 * 128 * 256  # results of a strip, at least


# Four bytes $4 of codes, −(magic + z) in $5 and $6, s in $7 and $8 → (low nibbles − z) s in $0 and $1, the high ones in
# $2 and $3, pairs of 16-bit floats. A nibble under the exponent of 128 (bfloat16) or 1024 (float16) is that plus it.
_UNPACK = """{{
    .reg .b32 a, b, c, d, one, zero;
    mov.b32 one, {one};
    mov.b32 zero, 0x80008000;
    prmt.b32 a, $4, 0, 0x4140;
    prmt.b32 b, $4, 0, 0x4342;
    shr.u32 c, a, 4;
    shr.u32 d, b, 4;
    lop3.b32 a, a, 0x000f000f, {magic}, 0xea;
    lop3.b32 b, b, 0x000f000f, {magic}, 0xea;
    lop3.b32 c, c, 0x000f000f, {magic}, 0xea;
    lop3.b32 d, d, 0x000f000f, {magic}, 0xea;
    fma.rn.{kind} a, a, one, $5;
    fma.rn.{kind} b, b, one, $6;
    fma.rn.{kind} c, c, one, $5;
    fma.rn.{kind} d, d, one, $6;
    fma.rn.{kind} $0, a, $7, zero;
    fma.rn.{kind} $1, b, $8, zero;
    fma.rn.{kind} $2, c, $7, zero;
    fma.rn.{kind} $3, d, $8, zero;
}}"""
_BFLOAT16 = tl.constexpr(_UNPACK.format(magic="0x43004300", kind="bf16x2", one="0x3f803f80"))
_FLOAT16 = tl.constexpr(_UNPACK.format(magic="0x64006400", kind="f16x2", one="0x3c003c00"))
_ASSEMBLED = tl.constexpr(not triton.knobs.runtime.interpret)


@triton.jit
def _nibbles(q, zero, scale):
    """(low − zero) scale and (high − zero) scale, in the dtype of `scale`, of bytes q; all are of one shape."""
    dtype: tl.constexpr = scale.dtype
    if _ASSEMBLED and dtype != tl.float32:
        wide: tl.constexpr = dtype == tl.bfloat16
        low, high = tl.inline_asm_elementwise(
            _BFLOAT16 if wide else _FLOAT16,
            "=&r,=&r,=&r,=&r,r,r,r,r,r",
            [q, ((-128.0 if wide else -1024.0) - zero).to(dtype), scale],
            dtype=(tl.uint16, tl.uint16),
            is_pure=True,
            pack=4,
        )
        low, high = low.to(dtype, bitcast=True), high.to(dtype, bitcast=True)
    else:
        low = (((q & 15).to(tl.float32) - zero) * scale.to(tl.float32)).to(dtype)
        high = (((q >> 4).to(tl.float32) - zero) * scale.to(tl.float32)).to(dtype)
    return low, high


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
        low, high = _nibbles(q, tl.broadcast_to(z, shape), tl.broadcast_to(s.to(dtype), shape))
        tl.store(W + place, low, mask=inside & (block * 64 + i < n))
        tl.store(W + place + 32, high, mask=inside & (block * 64 + 32 + i < n))
    else:
        tl.store(W + place, ((q.to(tl.float32) - z) * s.to(tl.float32)).to(dtype), mask=inside & (block * 64 + i < n))


@triton.jit
def _unpack_both(
    W, codes, scale, zero, plane, row_factor, column, start, m, n, blocks, BITS: tl.constexpr, ZERO: tl.constexpr
):
    """W (rows × n) = Q + E, of 128 rows (`start` is a multiple of that) and 64 columns."""
    WIDTH: tl.constexpr = 8 * BITS
    dtype: tl.constexpr = W.dtype.element_ty
    block, strip = tl.program_id(1), start // 128 + tl.program_id(0)
    byte, i = tl.arange(0, 64)[:, None], tl.arange(0, 32)[None, :]
    stride = tl.where(strip * 128 + 128 <= tl.cdiv(m, 64) * 64, 64, 32)
    here = plane + strip.to(tl.int64) * 64 * n + byte
    k = block * 64 + i
    e_first = tl.load(here + k * stride, mask=(k < n) & (byte < stride), other=0x88)
    e_second = tl.load(here + (k + 32) * stride, mask=(k + 32 < n) & (byte < stride), other=0x88)
    c_first = tl.load(column + k, mask=k < n, other=0.0).to(tl.float32)
    c_second = tl.load(column + k + 32, mask=k + 32 < n, other=0.0).to(tl.float32)
    for half in tl.static_range(2):  # low nibbles of the plane are of other rows than high ones
        row = strip * 128 + byte // 32 * 64 + byte % 32 + 32 * half
        group = tl.minimum(row, m - 1).to(tl.int64) * blocks + block
        s = tl.load(scale + group).to(tl.float32)
        z = tl.load(zero + group).to(tl.float32) if ZERO else (8.0 if BITS == 4 else 0.0)
        f = tl.load(row_factor + row, mask=row < m, other=0.0).to(tl.float32)
        first = tl.load(codes + group * WIDTH + i)
        if BITS == 4:
            second = first >> 4
            first &= 15
        else:
            second = tl.load(codes + group * WIDTH + 32 + i)
        a = ((e_first >> 4 * half) & 15).to(tl.float32) - 8
        b = ((e_second >> 4 * half) & 15).to(tl.float32) - 8
        place = W + (row - start).to(tl.int64) * n + k
        whole = (first.to(tl.float32) - z) * s + a * c_first * f
        tl.store(place, whole.to(dtype), mask=(row < m) & (k < n))
        whole = (second.to(tl.float32) - z) * s + b * c_second * f
        tl.store(place + 32, whole.to(dtype), mask=(row < m) & (k + 32 < n))


def multiply(x: Tensor, parts: list[Any]) -> Tensor:
    """y (tokens, m) from x (tokens, n) and `QuantizedGroup.parts`, as if every channel were open."""
    codes, scale, zero, A, B, factor, plane, row, column, _ = parts
    (tokens, n), (m, blocks) = x.shape, scale.shape
    y = x.new_empty((tokens, m))
    strip = max(CACHED // (n * x.element_size()), WORK // tokens) // 128 * 128
    strip = min(max(strip, 128), m)
    W = x.new_empty((strip, n))
    form: dict[str, Any] = {"BITS": 4 if codes.dtype == torch.uint8 else 8, "ZERO": zero is not None}
    for start in range(0, m, strip):
        stop = min(start + strip, m)
        if plane is None:
            _unpack[triton.cdiv(stop - start, ROWS), triton.cdiv(blocks, GROUPS)](
                *(W, codes, scale, zero, start, stop, n, blocks), ROWS=ROWS, GROUPS=GROUPS, **form
            )
        else:
            _unpack_both[triton.cdiv(stop - start, 128), blocks](
                *(W, codes, scale, zero, plane, row, column, start, m, n, blocks), **form
            )
        torch.mm(x, W[: stop - start].T, out=y[:, start:stop])
    if A is not None:
        z = F.linear(x.float(), B.float()) * factor
        y.addmm_(z.to(x.dtype), A.T.to(x.dtype))
    return y
