"""One launch per token for a quantised input group on the GPU (Triton): the contract of `QuantizedGroup.reference`.

The work is cut into programs of two kinds. What every row of the output needs, the low-rank projection z = s · B x and
the list of open channels, comes first in the grid (*producers*, which the hardware starts first) and goes to a scratch.
The rest (*consumers*) multiply their rows of Q; by the time they are through, the producers are. They wait on a
counter, add A z and the columns of E that are on the list, and the last of them sets the counters back to zero. One
launch, no host in between: capturable in a CUDA graph.

    producers    z:  CHUNK inputs of B, all ranks, all tokens
                 E:  for LISTING channels of one token, those that are open, and x_j column_j of each
    consumers    H rows, and the H rows 32 further down, whose codes in E are the other nibbles of the same bytes

Codes become floats without conversions: a nibble shifted to bits 16–19 under the exponent of 1 is 1 + q / 128. So

    Σ (q − z) x = 128 Σ (1 + q / 128) x − (128 + z) Σ x

in float32, whatever the dtype of x. One group at a time: its counters belong to it, so two streams must not share it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

if TYPE_CHECKING:
    from rankgate.quantized import QuantizedGroup

CHUNK = 512  # inputs of a producer of z
LISTING = 1024  # channels of a producer of a list
TOGETHER = 128  # open channels that a consumer reads together


@triton.jit
def _signal(counter):
    tl.debug_barrier()  # every thread's stores come before the release
    tl.atomic_add(counter, 1, sem="release")


@triton.jit
def _project(x, B, factor, low, chunk, n, tokens, rank, RANK: tl.constexpr, CHUNK: tl.constexpr):
    """low[chunk, token, rank] = s · B x over the inputs of one chunk."""
    j, r = chunk * CHUNK + tl.arange(0, CHUNK), tl.arange(0, RANK)
    b = tl.load(B + r[:, None] * n + j, mask=(r[:, None] < rank) & (j < n), other=0).to(tl.float32)
    s = tl.load(factor + r, mask=r < rank, other=0.0)
    for token in range(tokens):
        v = tl.load(x + token * n + j, mask=j < n, other=0.0).to(tl.float32)
        tl.store(low + (chunk * tokens + token) * RANK + r, tl.sum(b * v, 1) * s)


@triton.jit
def _list(x, column, threshold, channels, scaled, counts, listing, lists, token, n, LISTING: tl.constexpr):
    """The open channels of one token among LISTING, in order, and x_j column_j of each."""
    j = listing * LISTING + tl.arange(0, LISTING)
    v = tl.load(x + token * n + j, mask=j < n, other=0.0).to(tl.float32)
    t = tl.load(threshold + j, mask=j < n, other=float("inf")).to(tl.float32)
    c = tl.load(column + j, mask=j < n, other=0.0).to(tl.float32)
    opened = (tl.abs(v) > t).to(tl.int32)
    place = (token * lists + listing) * LISTING + tl.cumsum(opened, 0) - 1
    tl.store(channels + place, j, mask=opened > 0)
    tl.store(scaled + place, v * c, mask=opened > 0)
    tl.store(counts + token * lists + listing, tl.sum(opened, 0))


@triton.jit
def _unit(q, SHIFT: tl.constexpr):
    """1 + nibble / 128, in one shift and one logic operation."""
    if SHIFT < 16:
        q = q << (16 - SHIFT)
    else:
        q = q >> (SHIFT - 16)
    return ((q & 0x000F0000) | 0x3F800000).to(tl.float32, bitcast=True)


@triton.jit
def _byte(q, SHIFT: tl.constexpr):
    """The signed byte of q at SHIFT, as float32; q has its sign bits flipped."""
    return (((q >> SHIFT) & 255) | 0x4B000000).to(tl.float32, bitcast=True) - 8388736.0


@triton.jit
def _inputs(x, token, known, j, n, OFFSET: tl.constexpr):
    """x (BATCH × 1 × WORDS) at inputs j + OFFSET."""
    inside = known[:, None, None] & (j + OFFSET < n)[None, None, :]
    return tl.load(x + token[:, None, None] * n + (j + OFFSET)[None, None, :], mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _multiply(
    x,
    codes,
    scale,
    zero,
    token,
    known,
    row,
    inside,
    n,
    blocks,
    BITS: tl.constexpr,
    ZERO: tl.constexpr,
    BATCH: tl.constexpr,
    ROWS: tl.constexpr,
    WORDS: tl.constexpr,
    UNROLL: tl.constexpr,
):
    """Q x (BATCH × ROWS) for the given tokens and rows."""
    PER: tl.constexpr = 2 * BITS  # words of a group of 64
    GROUPS: tl.constexpr = WORDS // PER
    words = codes.to(tl.pointer_type(tl.int32))
    total = tl.zeros((BATCH, ROWS, GROUPS), tl.float32)
    for start in tl.range(0, blocks * PER, WORDS, loop_unroll_factor=UNROLL):
        w = start + tl.arange(0, WORDS)
        g = start // PER + tl.arange(0, GROUPS)
        here = inside[:, None] & (g < blocks)
        q = tl.load(words + row[:, None] * (blocks * PER) + w, mask=inside[:, None] & (w < blocks * PER), other=0)
        s = tl.load(scale + row[:, None] * blocks + g, mask=here, other=0.0).to(tl.float32)
        q = q[None]
        if BITS == 4:
            j = 64 * (w // 8) + 4 * (w % 8)
            x0 = _inputs(x, token, known, j, n, 0)
            x1 = _inputs(x, token, known, j, n, 1)
            x2 = _inputs(x, token, known, j, n, 2)
            x3 = _inputs(x, token, known, j, n, 3)
            x4 = _inputs(x, token, known, j, n, 32)
            x5 = _inputs(x, token, known, j, n, 33)
            x6 = _inputs(x, token, known, j, n, 34)
            x7 = _inputs(x, token, known, j, n, 35)
            y = _unit(q, 0) * x0 + _unit(q, 4) * x4 + _unit(q, 8) * x1 + _unit(q, 12) * x5
            y += _unit(q, 16) * x2 + _unit(q, 20) * x6 + _unit(q, 24) * x3 + _unit(q, 28) * x7
            v = ((x0 + x1) + (x2 + x3)) + ((x4 + x5) + (x6 + x7))
        else:
            q = q ^ -2139062144  # 0x80808080
            j = 4 * w
            x0 = _inputs(x, token, known, j, n, 0)
            x1 = _inputs(x, token, known, j, n, 1)
            x2 = _inputs(x, token, known, j, n, 2)
            x3 = _inputs(x, token, known, j, n, 3)
            y = _byte(q, 0) * x0 + _byte(q, 8) * x1 + _byte(q, 16) * x2 + _byte(q, 24) * x3
            v = (x0 + x1) + (x2 + x3)
        y = tl.sum(tl.reshape(y, (BATCH, ROWS, GROUPS, PER)), 3)
        v = tl.sum(tl.reshape(v, (BATCH, 1, GROUPS, PER)), 3)
        if ZERO:
            z = tl.load(zero + row[:, None] * blocks + g, mask=here, other=0).to(tl.float32)[None]
        if BITS == 4 and ZERO:
            y = 128.0 * y - (128.0 + z) * v
        elif BITS == 4:
            y = 128.0 * y - 136.0 * v
        elif ZERO:
            y -= z * v
        total += s[None] * y
    return tl.sum(total, 2)


@triton.jit
def _code(q, SHIFT: tl.constexpr):
    """The nibble of q at SHIFT, minus 8, as float32."""
    return (((q >> SHIFT) & 15) | 0x4B000000).to(tl.float32, bitcast=True) - 8388616.0


@triton.jit
def _weave(a, b, c, d, SIZE: tl.constexpr):
    """a₀ b₀ c₀ d₀ a₁ b₁ …, SIZE values in all."""
    return tl.reshape(tl.permute(tl.join(tl.join(a, b), tl.join(c, d)), (0, 2, 1)), (SIZE,))


@triton.jit
def _gather(
    plane,
    channels,
    scaled,
    counts,
    lists,
    token,
    first,
    stride,
    H: tl.constexpr,
    LISTING: tl.constexpr,
    TOGETHER: tl.constexpr,
):
    """Σ over the open channels of one token of the codes of E times x_j column_j: H low, then H high nibbles.

    plane: int32; the codes of channel j are the H / 4 words at first + j stride.
    """
    i, w = tl.arange(0, TOGETHER), tl.arange(0, H // 4)
    a = tl.zeros((H // 4,), tl.float32)
    b, c, d, e, f, g, h = a, a, a, a, a, a, a
    for listing in range(lists):
        place = (token * lists + listing) * LISTING
        count = tl.load(counts + token * lists + listing, cache_modifier=".cg")
        for start in range(0, count, TOGETHER):
            known = start + i < count
            j = tl.load(channels + place + start + i, cache_modifier=".cg")  # beyond the count: anything
            v = tl.load(scaled + place + start + i, cache_modifier=".cg")
            j, v = tl.where(known, j, 0), tl.where(known, v, 0.0)[:, None]
            q = tl.load(plane + first + j[:, None] * stride + w)
            a += tl.sum(_code(q, 0) * v, 0)
            b += tl.sum(_code(q, 8) * v, 0)
            c += tl.sum(_code(q, 16) * v, 0)
            d += tl.sum(_code(q, 24) * v, 0)
            e += tl.sum(_code(q, 4) * v, 0)
            f += tl.sum(_code(q, 12) * v, 0)
            g += tl.sum(_code(q, 20) * v, 0)
            h += tl.sum(_code(q, 28) * v, 0)
    low, high = _weave(a, b, c, d, H), _weave(e, f, g, h, H)
    return tl.reshape(tl.trans(tl.join(low, high)), (2 * H,))


@triton.jit
def _gemv(
    x,
    y,
    codes,
    scale,
    zero,
    A,
    B,
    factor,
    rank,
    plane,
    row_factor,
    column,
    threshold,
    counters,
    low,
    channels,
    scaled,
    counts,
    tokens,
    m,
    n,
    blocks,
    BITS: tl.constexpr,
    ZERO: tl.constexpr,
    RANK: tl.constexpr,
    REFINED: tl.constexpr,
    BATCH: tl.constexpr,
    H: tl.constexpr,
    WORDS: tl.constexpr,
    UNROLL: tl.constexpr,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
    LISTING: tl.constexpr,
    TOGETHER: tl.constexpr,
):
    pid, lists = tl.program_id(0), tl.cdiv(n, LISTING)
    projections, listings = 0, 0
    if RANK > 0:
        projections = tl.cdiv(n, CHUNK)
    if REFINED:
        listings = lists * tokens
    producers = projections + listings
    if pid < listings:
        if REFINED:
            _list(x, column, threshold, channels, scaled, counts, pid // tokens, lists, pid % tokens, n, LISTING)
            _signal(counters)
    elif pid < producers:
        if RANK > 0:
            _project(x, B, factor, low, pid - listings, n, tokens, rank, RANK, CHUNK)
            _signal(counters)
    else:
        block = pid - producers
        first = block // (32 // H) * 64 + block % (32 // H) * H
        i = tl.arange(0, 2 * H)
        row, token = first + i % H + 32 * (i // H), tl.arange(0, BATCH)
        inside, known = row < m, token < tokens
        if RANK > 0:
            part, r = tl.arange(0, CHUNKS), tl.arange(0, RANK)
            a = tl.load(A + row[:, None] * rank + r, mask=inside[:, None] & (r < rank), other=0)
        if REFINED:
            f = tl.load(row_factor + row, mask=inside, other=0.0).to(tl.float32)
        total = _multiply(
            x, codes, scale, zero, token, known, row, inside, n, blocks, BITS, ZERO, BATCH, 2 * H, WORDS, UNROLL
        )
        if RANK > 0 or REFINED:
            while tl.atomic_add(counters, 0, sem="acquire") < producers:
                pass
        if RANK > 0:
            at = (part[:, None, None] * tokens + token[:, None]) * RANK + r
            there = (part < projections)[:, None, None] & known[:, None]
            z = tl.sum(tl.load(low + at, mask=there, other=0.0, cache_modifier=".cg"), 0)
            total += tl.sum(a.to(tl.float32)[None] * z[:, None, :], 2)
        if REFINED:
            # words of a column of its strip of 128 rows, or of the 64 rows that may remain
            stride = tl.where(first // 128 * 128 + 128 <= tl.cdiv(m, 64) * 64, 16, 8)
            word = first // 128 * 16 * n + first % 128 // 64 * 8 + first % 32 // 4
            for t in range(tokens):
                e = _gather(
                    plane.to(tl.pointer_type(tl.int32)),
                    channels,
                    scaled,
                    counts,
                    lists,
                    t,
                    word,
                    stride,
                    H,
                    LISTING,
                    TOGETHER,
                )
                total += tl.where((token == t)[:, None], (f * e)[None, :], 0.0)
        tl.store(y + token[:, None] * m + row, total.to(y.dtype.element_ty), mask=known[:, None] & inside)
        if RANK > 0 or REFINED:
            if tl.atomic_add(counters + 1, 1, sem="acq_rel") == tl.num_programs(0) - producers - 1:
                tl.store(counters, 0)
                tl.store(counters + 1, 0)


def gemv(x: Tensor, group: QuantizedGroup) -> Tensor:
    """y (…, m) in the dtype of x (…, n), at most 8 tokens."""
    base, low, fine = group.base, group.low_rank, group.refinement
    x = x.contiguous()
    m, n, tokens = base.m, base.n, x.numel() // x.shape[-1]
    rank = 0 if low is None else low.rank
    chunks = 0 if low is None else triton.cdiv(n, CHUNK)
    lists = 0 if fine is None else triton.cdiv(n, LISTING)
    padded_rank = triton.next_power_of_2(rank) if rank else 0
    y = x.new_empty((*x.shape[:-1], m))
    part = x.new_empty(chunks * tokens * padded_rank, dtype=torch.float32)
    channels = x.new_empty(lists * tokens * LISTING, dtype=torch.int32)
    scaled = x.new_empty(lists * tokens * LISTING, dtype=torch.float32)
    counts = x.new_empty(lists * tokens, dtype=torch.int32)
    H, words, warps, unroll = tile(m)
    _gemv[chunks + lists * tokens + triton.cdiv(m, 64) * (32 // H),](
        x,
        y,
        base.codes,
        base.scale,
        base.zero,
        *((None, None, None) if low is None else (low.A, low.B, low.scale)),
        rank,
        *((None,) * 4 if fine is None else (fine.codes, fine.row, fine.column, fine.gate.threshold)),
        group.counters(x.device),
        part,
        channels,
        scaled,
        counts,
        tokens,
        m,
        n,
        base.scale.shape[1],
        BITS=base.bits,
        ZERO=base.zero is not None,
        RANK=padded_rank,
        REFINED=fine is not None,
        BATCH=triton.next_power_of_2(tokens),
        H=H,
        WORDS=words,
        UNROLL=unroll,
        CHUNK=CHUNK,
        CHUNKS=triton.next_power_of_2(max(1, chunks)),
        LISTING=LISTING,
        TOGETHER=TOGETHER,
        num_warps=warps,
    )
    return y


def tile(m: int) -> tuple[int, int, int, int]:
    """H, words of a row read together, warps and unrolled steps of a consumer, as an H100 likes them."""
    return (16, 128, 4, 1) if m >= 8192 else (8, 256, 8, 2) if m >= 2048 else (4, 64, 4, 1)
