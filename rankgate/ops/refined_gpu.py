"""A quantised input group with low rank or refinement on the GPU (Triton); see `QuantizedGroup.reference`.

Two launches, of which the second overlaps with the first where the hardware can (programmatic dependent launch, sm_90):

    _refine     A z and the open columns of E, of some of the inputs, for one token and a strip of 128 rows
    _multiply   the base, see `ops.quantized_gpu`

The first reads few bytes, but one after the other: it waits for memory while the base is multiplied, which needs
nothing of it. Every strip finds the open channels and z for itself, out of the cache of the GPU: sharing them would
take a launch of its own, which takes longer. Nobody asks the host: both can be captured in a CUDA graph.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from rankgate import ops
from rankgate.ops import quantized_gpu

LISTING = 1024  # channels that a program looks through together
PRODUCTS = 8192  # of B and x that it holds
TOGETHER = 64  # open channels that it reads together
PROGRAMS = 192  # for a token, about, where there are inputs enough; more would delay `_multiply`


@triton.jit
def _low(x, B, factor, first, end, n, rank, RANK: tl.constexpr, CHUNK: tl.constexpr):
    """z = s · B x over the inputs from `first` to `end`."""
    r = tl.arange(0, RANK)
    total = tl.zeros((RANK, CHUNK), tl.float32)
    for start in range(first, end, CHUNK):
        j = start + tl.arange(0, CHUNK)
        b = tl.load(B + r[:, None] * n + j, mask=(r[:, None] < rank) & (j < end), other=0).to(tl.float32)
        total += b * tl.load(x + j, mask=j < end, other=0.0).to(tl.float32)
    return tl.sum(total, 1) * tl.load(factor + r, mask=r < rank, other=0.0)


@triton.jit
def _list(x, column, threshold, channels, scaled, first, end, LISTING: tl.constexpr):
    """How many channels from `first` to `end` are open. They are stored in order, with x_j column_j of each."""
    count = 0
    for start in range(first, end, LISTING):
        j = start + tl.arange(0, LISTING)
        v = tl.load(x + j, mask=j < end, other=0.0).to(tl.float32)
        t = tl.load(threshold + j, mask=j < end, other=float("inf")).to(tl.float32)
        c = tl.load(column + j, mask=j < end, other=0.0).to(tl.float32)
        opened = (tl.abs(v) > t).to(tl.int32)
        place = count + tl.cumsum(opened, 0) - 1
        tl.store(channels + place, j, mask=opened > 0)
        tl.store(scaled + place, v * c, mask=opened > 0)
        count += tl.sum(opened, 0)
    tl.debug_barrier()
    return count


@triton.jit
def _code(q, SHIFT: tl.constexpr):
    """The nibble of q at SHIFT, minus 8, as float32."""
    return (((q >> SHIFT) & 15) | 0x4B000000).to(tl.float32, bitcast=True) - 8388616.0


@triton.jit
def _gather(plane, channels, scaled, count, stride, TOGETHER: tl.constexpr):
    """Σ over the listed channels of the codes of 128 rows of E times x_j column_j.

    plane: int32; the codes of channel j are the `stride` words at j stride: 16, or 8 where only 64 rows are left.
    """
    w = tl.arange(0, 16)
    a = tl.zeros((TOGETHER, 16), tl.float32)
    b, c, d, e, f, g, h = a, a, a, a, a, a, a
    for start in range(0, count, TOGETHER):
        i = start + tl.arange(0, TOGETHER)
        j = tl.load(channels + i, mask=i < count, other=0)
        v = tl.load(scaled + i, mask=i < count, other=0.0)[:, None]
        q = tl.load(plane + j[:, None] * stride + w, mask=(i < count)[:, None] & (w < stride), other=0)
        a += _code(q, 0) * v
        b += _code(q, 8) * v
        c += _code(q, 16) * v
        d += _code(q, 24) * v
        e += _code(q, 4) * v
        f += _code(q, 12) * v
        g += _code(q, 20) * v
        h += _code(q, 28) * v
    low, high = tl.join(tl.join(a, b), tl.join(c, d)), tl.join(tl.join(e, f), tl.join(g, h))
    total = tl.reshape(tl.sum(tl.join(low, high), 0), (2, 8, 2, 2, 2))  # half, word, byte & 1, byte >> 1, nibble
    return tl.reshape(tl.permute(total, (0, 4, 1, 3, 2)), (128,))


@triton.jit
def _refine(
    x,
    A,
    B,
    factor,
    plane,
    row_factor,
    column,
    threshold,
    channels,
    scaled,
    extra,
    tokens,
    m,
    n,
    rank,
    RANK: tl.constexpr,
    REFINED: tl.constexpr,
    PARTS: tl.constexpr,
    INPUTS: tl.constexpr,
    CHUNK: tl.constexpr,
    LISTING: tl.constexpr,
    TOGETHER: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """extra[part, token, row] = what INPUTS inputs add to a strip of 128 rows."""
    if OVERLAP:
        tl.extra.cuda.gdc_launch_dependents()
    pid = tl.program_id(0)
    strip, part, token = pid // (tokens * PARTS), pid // tokens % PARTS, pid % tokens
    row, first = strip * 128 + tl.arange(0, 128), part * INPUTS
    end, x = tl.minimum(first + INPUTS, n), x + token * n
    total = tl.zeros((128,), tl.float32)
    if REFINED:
        list_at = (part * tokens + token) * INPUTS  # where all strips write the same
        count = _list(x, column, threshold, channels + list_at, scaled + list_at, first, end, LISTING)
        stride = tl.where(strip * 128 + 128 <= tl.cdiv(m, 64) * 64, 16, 8)
        here = plane.to(tl.pointer_type(tl.int32)) + strip * 16 * n
        e = _gather(here, channels + list_at, scaled + list_at, count, stride, TOGETHER)
        total += tl.load(row_factor + row, mask=row < m, other=0.0).to(tl.float32) * e
    if RANK > 0:
        r = tl.arange(0, RANK)
        a = tl.load(A + row[:, None] * rank + r, mask=(row < m)[:, None] & (r < rank), other=0).to(tl.float32)
        total += tl.sum(a * _low(x, B, factor, first, end, n, rank, RANK, CHUNK)[None, :], 1)
    tl.store(extra + (part * tokens + token) * m + row, total, mask=row < m)


def parts_of(m: int, n: int) -> tuple[int, int]:
    """How many parts what is added comes in, and of how many inputs each takes care."""
    lists = triton.cdiv(n, LISTING)
    some = triton.next_power_of_2(triton.cdiv(lists, max(1, PROGRAMS // triton.cdiv(m, 128))))
    return triton.cdiv(lists, some), some * LISTING


def gemv(x: Tensor, codes: Tensor, scale: Tensor, zero: Tensor | None, *added: Tensor | None) -> tuple[Tensor, Tensor]:
    """Q x (tokens, m) and what is to be added to it (parts, tokens, m), float32, from at most 8 tokens x (tokens, n).

    The tensors are those of `QuantizedGroup.parts`: base, low rank and refinement.
    """
    whole, y = quantized_gpu.padded(x), x.new_empty((len(x), len(codes)), dtype=torch.float32)
    extra = _added(x.contiguous(), len(codes), *added)  # y has its memory: it is written while this runs
    quantized_gpu.multiply(whole, y, codes, scale, zero, after=ops.overlaps(x.device))
    return y, extra


def _added(
    x: Tensor,
    m: int,
    A: Tensor | None,
    B: Tensor | None,
    factor: Tensor | None,
    plane: Tensor | None,
    row: Tensor | None,
    column: Tensor | None,
    threshold: Tensor | None,
) -> Tensor:
    """A z + E x, to be summed over the parts; (A, B, factor) or (plane, row, column, threshold) may be None."""
    (tokens, n), rank = x.shape, 0 if B is None else len(B)
    ranks, (parts, inputs) = triton.next_power_of_2(rank) if rank else 0, parts_of(m, n)
    listed = 0 if plane is None else parts * tokens * inputs
    channels = x.new_empty(listed, dtype=torch.int32)
    scaled = x.new_empty(listed, dtype=torch.float32)
    extra = x.new_empty((parts, tokens, m), dtype=torch.float32)
    _refine[triton.cdiv(m, 128) * tokens * parts,](
        *(x, A, B, factor, plane, row, column, threshold, channels, scaled, extra, tokens, m, n, rank),
        RANK=ranks,
        REFINED=plane is not None,
        PARTS=parts,
        INPUTS=inputs,
        CHUNK=max(16, PRODUCTS // max(1, ranks)),
        LISTING=LISTING,
        TOGETHER=TOGETHER,
        OVERLAP=ops.overlaps(x.device),
    )
    return extra
