"""One launch per token for a quantised input group on the GPU (Triton): the contract of `QuantizedGroup.reference`.

The work is cut into programs of three kinds, which the hardware starts in this order; each kind leaves its results in a
scratch and counts itself off, and the next one waits for the count.

    producers      z:  CHUNK inputs of B, all ranks, all tokens
                   E:  for LISTING channels of one token, those that are open, and x_j column_j of each
    refiners       A z and the open columns of E in some of the lists, for one token and a strip of 128 rows
    multipliers    a few rows of Q; they add what the refiners have long found, so that nothing waits in fact

The last multiplier sets the counters back to zero. No host in between: capturable in a CUDA graph.

Codes become floats without conversions: under the exponent of 1, a nibble at bit 16 is 1 + q / 128, one at bit 12 is
1 + q / 2048. So

    Σ (q − z) x = 128 (Σ_low (1 + q / 128) x + Σ_high (1 + q / 2048) 16 x  −  Σ_low x − 16 Σ_high x − z / 128 Σ x)

over the low and the high nibbles of the bytes, in float32, whatever the dtype of x. A group serves one stream at a
time: its counters are its own.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

CHUNK = 512  # inputs of a producer of z
LISTING = 1024  # channels of a producer of a list
ONE = 0x3F800000  # float32 1, an argument because the compiler moves constants to a register for every word
REFINERS = 192  # of one token, about, where there are lists enough; more of them would delay the multipliers
TOGETHER = 64  # open channels that a refiner reads together


@triton.jit
def signal(counter):
    """What this program stored can be read by those who see the counter go up."""
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
def _low(q, one):
    """1 + q / 128 for the nibble at bit 16."""
    return ((q & 0x000F0000) | one).to(tl.float32, bitcast=True)


@triton.jit
def _high(q, one):
    """1 + q / 2048 for the nibble at bit 12."""
    return ((q & 0x0000F000) | one).to(tl.float32, bitcast=True)


@triton.jit
def _byte(q, SHIFT: tl.constexpr):
    """The signed byte of q at SHIFT, as float32; q has its sign bits flipped."""
    return (((q >> SHIFT) & 255) | 0x4B000000).to(tl.float32, bitcast=True) - 8388736.0


@triton.jit
def _inputs(spread, place, inside, size, LANE: tl.constexpr):
    """The inputs (BATCH × 1 × WORDS) that belong to one lane of the words."""
    return tl.load(spread + place + LANE * size, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _multiply(
    spread,
    codes,
    scale,
    zero,
    token,
    row,
    blocks,
    one,
    BITS: tl.constexpr,
    ZERO: tl.constexpr,
    BATCH: tl.constexpr,
    ROWS: tl.constexpr,
    GROUPS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Q x (BATCH × ROWS) for the given tokens and rows, all of which exist. spread: see `spread`."""
    PER: tl.constexpr = 2 * BITS  # words of a group of 64
    LANES: tl.constexpr = 32 // BITS
    WORDS: tl.constexpr = GROUPS * PER
    words, size = codes.to(tl.pointer_type(tl.int32)), blocks * PER
    token, row = token[:, None, None], row[None, :, None]
    total = tl.zeros((BATCH, ROWS, GROUPS), tl.float32)
    for start in tl.range(0, blocks, GROUPS, num_stages=STAGES):
        w = start * PER + tl.arange(0, WORDS)[None, None, :]
        q = tl.load(words + row * size + w, mask=w < size, other=0)
        block = row * blocks + tl.minimum(start + tl.arange(0, GROUPS), blocks - 1)[None, None, :]
        s = tl.load(scale + block).to(tl.float32)
        place, inside = token * (LANES * size) + w, w < size
        x0 = _inputs(spread, place, inside, size, 0)
        x1 = _inputs(spread, place, inside, size, 1)
        x2 = _inputs(spread, place, inside, size, 2)
        x3 = _inputs(spread, place, inside, size, 3)
        if BITS == 4:
            x4 = _inputs(spread, place, inside, size, 4)
            x5 = _inputs(spread, place, inside, size, 5)
            x6 = _inputs(spread, place, inside, size, 6)
            x7 = _inputs(spread, place, inside, size, 7)
            low, high = (x0 + x1) + (x2 + x3), (x4 + x5) + (x6 + x7)
            v = low + high
            offset = low + 16 * high
            if not ZERO:
                offset += 0.0625 * v  # 8 / 128
            right, left = q >> 8, q << 8
            y = _low(q, one) * x2 - offset
            y += _high(q, one) * (16 * x5)
            y += _low(left, one) * x1
            y += _high(left, one) * (16 * x4)
            y += _low(right, one) * x3
            y += _high(right, one) * (16 * x6)
            y += _low(q << 16, one) * x0
            y += _high(q >> 16, one) * (16 * x7)
            s *= 128
        else:
            q = q ^ -2139062144  # 0x80808080
            v = (x0 + x1) + (x2 + x3)
            y = _byte(q, 0) * x0 + _byte(q, 8) * x1 + _byte(q, 16) * x2 + _byte(q, 24) * x3
        y = tl.sum(tl.reshape(y, (BATCH, ROWS, GROUPS, PER)), 3)
        if ZERO:
            z = tl.load(zero + block).to(tl.float32)
            if BITS == 4:
                z /= 128
            y -= z * tl.sum(tl.reshape(v, (BATCH, 1, GROUPS, PER)), 3)
        total += s * y
    return tl.sum(total, 2)


@triton.jit
def _code(q, SHIFT: tl.constexpr):
    """The nibble of q at SHIFT, minus 8, as float32."""
    return (((q >> SHIFT) & 15) | 0x4B000000).to(tl.float32, bitcast=True) - 8388616.0


@triton.jit
def _gather(
    plane,
    channels,
    scaled,
    counts,
    first,
    lists,
    stride,
    LISTS: tl.constexpr,
    LISTING: tl.constexpr,
    TOGETHER: tl.constexpr,
):
    """Σ over the open channels of some lists, from the first, of the codes of 128 rows of E times x_j column_j.

    plane: int32; the codes of channel j are the `stride` words at j stride: 16, or 8 where only 64 rows are left.
    """
    w, every = tl.arange(0, 16), tl.arange(0, LISTS)
    count = tl.load(counts + first + every, mask=every < lists, other=0, cache_modifier=".cg")
    end = tl.cumsum(count, 0)
    a = tl.zeros((TOGETHER, 16), tl.float32)
    b, c, d, e, f, g, h = a, a, a, a, a, a, a
    for start in range(0, tl.sum(count, 0), TOGETHER):
        i = start + tl.arange(0, TOGETHER)  # among all lists, one after the other
        passed = end[None, :] <= i[:, None]
        listing, skipped = tl.sum(passed.to(tl.int32), 1), tl.sum(tl.where(passed, count[None, :], 0), 1)
        place, known = (first + listing) * LISTING + i - skipped, listing < LISTS
        j = tl.load(channels + place, mask=known, other=0, cache_modifier=".cg")
        v = tl.load(scaled + place, mask=known, other=0.0, cache_modifier=".cg")[:, None]
        q = tl.load(plane + j[:, None] * stride + w, mask=(w < stride)[None, :], other=0)
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
    A,
    low,
    plane,
    row_factor,
    channels,
    scaled,
    counts,
    extra,
    strip,
    part,
    projections,
    lists,
    token,
    tokens,
    m,
    n,
    rank,
    RANK: tl.constexpr,
    REFINED: tl.constexpr,
    CHUNKS: tl.constexpr,
    LISTS: tl.constexpr,
    LISTING: tl.constexpr,
    TOGETHER: tl.constexpr,
):
    """extra[part, token, row] = the open columns of E in some lists (and A z in part 0), for a strip of 128 rows."""
    row = strip * 128 + tl.arange(0, 128)
    total = tl.zeros((128,), tl.float32)
    if RANK > 0:
        if part == 0:
            chunk, r = tl.arange(0, CHUNKS), tl.arange(0, RANK)
            a = tl.load(A + row[:, None] * rank + r, mask=(row < m)[:, None] & (r < rank), other=0).to(tl.float32)
            at = (chunk[:, None] * tokens + token) * RANK + r
            z = tl.load(low + at, mask=(chunk < projections)[:, None], other=0.0, cache_modifier=".cg")
            total += tl.sum(a * tl.sum(z, 0)[None, :], 1)
    if REFINED:
        stride = tl.where(strip * 128 + 128 <= tl.cdiv(m, 64) * 64, 16, 8)
        here = plane.to(tl.pointer_type(tl.int32)) + strip * 16 * n
        first, some = part * LISTS, tl.minimum(LISTS, lists - part * LISTS)
        e = _gather(here, channels, scaled, counts, token * lists + first, some, stride, LISTS, LISTING, TOGETHER)
        total += tl.load(row_factor + row, mask=row < m, other=0.0).to(tl.float32) * e
    tl.store(extra + (part * tokens + token) * m + row, total, mask=row < m)


@triton.jit
def _await(counter, count):
    while tl.atomic_add(counter, 0, sem="acquire") < count:
        pass


@triton.jit
def _gemv(
    x,
    spread,
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
    extra,
    tokens,
    m,
    n,
    blocks,
    one,
    BITS: tl.constexpr,
    ZERO: tl.constexpr,
    RANK: tl.constexpr,
    REFINED: tl.constexpr,
    BATCH: tl.constexpr,
    ROWS: tl.constexpr,
    GROUPS: tl.constexpr,
    STAGES: tl.constexpr,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
    PARTS: tl.constexpr,
    LISTS: tl.constexpr,
    LISTING: tl.constexpr,
    TOGETHER: tl.constexpr,
):
    pid, lists = tl.program_id(0), tl.cdiv(n, LISTING)
    projections, listings, refiners = 0, 0, 0
    if RANK > 0:
        projections = tl.cdiv(n, CHUNK)
    if REFINED:
        listings = lists * tokens
    producers = projections + listings
    if RANK > 0 or REFINED:
        refiners = tl.cdiv(m, 128) * tokens * PARTS
    if pid < listings:
        if REFINED:
            _list(x, column, threshold, channels, scaled, counts, pid // tokens, lists, pid % tokens, n, LISTING)
            signal(counters)
    elif pid < producers:
        if RANK > 0:
            _project(x, B, factor, low, pid - listings, n, tokens, rank, RANK, CHUNK)
            signal(counters)
    elif pid < producers + refiners:
        if RANK > 0 or REFINED:
            _await(counters, producers)
            strip, part = (pid - producers) // (tokens * PARTS), (pid - producers) // tokens % PARTS
            _refine(
                A,
                low,
                plane,
                row_factor,
                channels,
                scaled,
                counts,
                extra,
                strip,
                part,
                projections,
                lists,
                (pid - producers) % tokens,
                tokens,
                m,
                n,
                rank,
                RANK,
                REFINED,
                CHUNKS,
                LISTS,
                LISTING,
                TOGETHER,
            )
            signal(counters + 1)
    else:
        first = pid - producers - refiners
        row, batch = first * ROWS + tl.arange(0, ROWS), tl.arange(0, BATCH)
        total = _multiply(
            spread,
            codes,
            scale,
            zero,
            tl.minimum(batch, tokens - 1),
            tl.minimum(row, m - 1),
            blocks,
            one,
            BITS,
            ZERO,
            BATCH,
            ROWS,
            GROUPS,
            STAGES,
        )
        place, inside = batch[:, None] * m + row, (batch < tokens)[:, None] & (row < m)
        if RANK > 0 or REFINED:
            _await(counters + 1, refiners)
            for part in tl.static_range(PARTS):
                total += tl.load(extra + part * tokens * m + place, mask=inside, other=0.0, cache_modifier=".cg")
        tl.store(y + place, total.to(y.dtype.element_ty), mask=inside)
        if RANK > 0 or REFINED:
            if tl.atomic_add(counters + 2, 1, sem="acq_rel") == tl.num_programs(0) - producers - refiners - 1:
                tl.store(counters, 0)
                tl.store(counters + 1, 0)
                tl.store(counters + 2, 0)


def spread(x: Tensor, bits: int) -> Tensor:
    """x (…, n) in the order in which the kernel multiplies: (tokens, lanes, ⌈n / 64⌉ 2 bits).

    A word of codes has 32 / bits lanes: first the low nibbles of its bytes, then the high ones, or the bytes. All
    words' inputs of one lane lie side by side. Apart from the kernel, so that a compiler can fuse it with what made x.
    """
    padded = F.pad(x.flatten(0, -2), (0, -x.shape[-1] % 64))
    groups = padded.unflatten(-1, (-1, 8 // bits, 2 * bits, 4))  # token, group, nibble, word, byte
    return groups.permute(0, 2, 4, 1, 3).reshape(len(padded), 32 // bits, -1).contiguous()


def gemv(
    x: Tensor,
    spread: Tensor,
    codes: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    A: Tensor | None,
    B: Tensor | None,
    factor: Tensor | None,
    plane: Tensor | None,
    row: Tensor | None,
    column: Tensor | None,
    threshold: Tensor | None,
    counters: Tensor,
) -> Tensor:
    """y (…, m) in the dtype of x (…, n), at most 8 tokens; for spread see `spread`.

    The tensors are those of a `QuantizedGroup`: base (codes, scale, zero), low rank (A, B, factor; or all None) and
    refinement (plane, row, column, threshold; or all None). counters: three int32, zero.
    """
    x = x.contiguous()
    m, n, tokens = len(codes), x.shape[-1], x.numel() // x.shape[-1]
    bits = 4 if codes.dtype == torch.uint8 else 8
    rank = 0 if B is None else len(B)
    chunks = triton.cdiv(n, CHUNK) if rank else 0
    lists = 0 if plane is None else triton.cdiv(n, LISTING)
    padded_rank = triton.next_power_of_2(rank) if rank else 0
    y = x.new_empty((*x.shape[:-1], m))
    low = x.new_empty(chunks * tokens * padded_rank, dtype=torch.float32)
    channels = x.new_empty(lists * tokens * LISTING, dtype=torch.int32)
    scaled = x.new_empty(lists * tokens * LISTING, dtype=torch.float32)
    counts = x.new_empty(lists * tokens, dtype=torch.int32)
    strips = triton.cdiv(m, 128)
    some = triton.next_power_of_2(triton.cdiv(max(1, lists), max(1, REFINERS // strips)))  # lists of a refiner
    parts = triton.cdiv(max(1, lists), some) if rank or lists else 0
    refiners = strips * tokens * parts
    extra = x.new_empty(parts * tokens * m, dtype=torch.float32)
    rows, groups, warps, stages = tile(m)
    _gemv[chunks + lists * tokens + refiners + triton.cdiv(m, rows),](
        x,
        spread,
        y,
        codes,
        scale,
        zero,
        A,
        B,
        factor,
        rank,
        plane,
        row,
        column,
        threshold,
        counters,
        low,
        channels,
        scaled,
        counts,
        extra,
        tokens,
        m,
        n,
        scale.shape[1],
        ONE,
        BITS=bits,
        ZERO=zero is not None,
        RANK=padded_rank,
        REFINED=plane is not None,
        BATCH=triton.next_power_of_2(tokens),
        ROWS=rows,
        GROUPS=groups,
        STAGES=stages,
        CHUNK=CHUNK,
        CHUNKS=triton.next_power_of_2(max(1, chunks)),
        PARTS=max(1, parts),
        LISTS=some,
        LISTING=LISTING,
        TOGETHER=TOGETHER,
        num_warps=warps,
    )
    return y


def tile(m: int) -> tuple[int, int, int, int]:
    """Rows and groups that a multiplier reads together, its warps and stages, as an H100 likes them."""
    return (
        (64, 8, 4, 3) if m >= 16384 else (32, 8, 4, 3) if m >= 8192 else (16, 16, 8, 1) if m >= 2048 else (8, 8, 4, 1)
    )
