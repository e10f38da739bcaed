"""A quantised input group on the GPU (Triton), for a few tokens: the contract of `QuantizedGroup.reference`.

Three launches, each of which overlaps with the one before where the hardware can (programmatic dependent launch,
sm_90). What the last one adds at its end, the first two have found out while it was reading Q:

    _produce     z: CHUNK inputs of B, all ranks; and of LISTING channels those that are open, and x_j column_j of each
    _refine      A z and the open columns of E in some of the lists, for one token and a strip of 128 rows
    _multiply    a few rows of Q, for all tokens

Without low rank and refinement there is only the last. Nobody asks the host: all can be captured in a CUDA graph.

Codes become floats without conversions: under the exponent of 1, a nibble at bit 16 is 1 + q / 128, one at bit 12 is
1 + q / 2048. So

    Σ (q − z) x = 128 (Σ_low (1 + q / 128) x + Σ_high (1 + q / 2048) 16 x  −  Σ_low x − 16 Σ_high x − z / 128 Σ x)

over the low and the high nibbles of the bytes, in float32, whatever the dtype of x.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

CHUNK = 512  # inputs of a program of `_produce` for z
LISTING = 1024  # channels of one for a list
ONE = 0x3F800000  # float32 1, an argument because the compiler moves constants to a register for every word
REFINERS = 192  # programs of `_refine` for a token, about, where there are lists enough; more would delay `_multiply`
HOPPER = 9  # compute capability from which a launch can overlap with the one before
TOGETHER = 64  # open channels that a program of `_refine` reads together


@triton.jit
def _inputs_at(spread, token, j, n, blocks, BITS: tl.constexpr):
    """x_j of one token, as float32; zero beyond n."""
    half: tl.constexpr = 8 * BITS  # inputs whose codes are the same nibbles
    lane = j % 64 // half * 4 + j % 4
    place = lane * (blocks * 2 * BITS) + j // 64 * (2 * BITS) + j % half // 4
    return tl.load(spread + token * (64 * blocks) + place, mask=j < n, other=0.0).to(tl.float32)


@triton.jit
def _project(
    spread, B, factor, low, chunk, n, blocks, tokens, rank, RANK: tl.constexpr, CHUNK: tl.constexpr, BITS: tl.constexpr
):
    """low[chunk, token, rank] = s · B x over the inputs of one chunk."""
    j, r = chunk * CHUNK + tl.arange(0, CHUNK), tl.arange(0, RANK)
    b = tl.load(B + r[:, None] * n + j, mask=(r[:, None] < rank) & (j < n), other=0).to(tl.float32)
    s = tl.load(factor + r, mask=r < rank, other=0.0)
    for token in range(tokens):
        v = _inputs_at(spread, token, j, n, blocks, BITS)
        tl.store(low + (chunk * tokens + token) * RANK + r, tl.sum(b * v, 1) * s)


@triton.jit
def _list(
    spread,
    column,
    threshold,
    channels,
    scaled,
    counts,
    listing,
    lists,
    token,
    n,
    blocks,
    LISTING: tl.constexpr,
    BITS: tl.constexpr,
):
    """The open channels of one token among LISTING, in order, and x_j column_j of each."""
    j = listing * LISTING + tl.arange(0, LISTING)
    v = _inputs_at(spread, token, j, n, blocks, BITS)
    t = tl.load(threshold + j, mask=j < n, other=float("inf")).to(tl.float32)
    c = tl.load(column + j, mask=j < n, other=0.0).to(tl.float32)
    opened = (tl.abs(v) > t).to(tl.int32)
    place = (token * lists + listing) * LISTING + tl.cumsum(opened, 0) - 1
    tl.store(channels + place, j, mask=opened > 0)
    tl.store(scaled + place, v * c, mask=opened > 0)
    tl.store(counts + token * lists + listing, tl.sum(opened, 0))


@triton.jit
def _produce(
    spread,
    B,
    factor,
    column,
    threshold,
    low,
    channels,
    scaled,
    counts,
    tokens,
    n,
    blocks,
    rank,
    lists,
    RANK: tl.constexpr,
    REFINED: tl.constexpr,
    CHUNK: tl.constexpr,
    LISTING: tl.constexpr,
    BITS: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    if OVERLAP:
        tl.extra.cuda.gdc_launch_dependents()
    pid, listings = tl.program_id(0), lists * tokens
    if pid < listings:
        if REFINED:
            listing, token = pid // tokens, pid % tokens
            _list(
                spread,
                column,
                threshold,
                channels,
                scaled,
                counts,
                listing,
                lists,
                token,
                n,
                blocks,
                LISTING,
                BITS,
            )
    else:
        if RANK > 0:
            _project(spread, B, factor, low, pid - listings, n, blocks, tokens, rank, RANK, CHUNK, BITS)


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
    count = tl.load(counts + first + every, mask=every < lists, other=0)
    end = tl.cumsum(count, 0)
    a = tl.zeros((TOGETHER, 16), tl.float32)
    b, c, d, e, f, g, h = a, a, a, a, a, a, a
    for start in range(0, tl.sum(count, 0), TOGETHER):
        i = start + tl.arange(0, TOGETHER)  # among all lists, one after the other
        passed = end[None, :] <= i[:, None]
        listing, skipped = tl.sum(passed.to(tl.int32), 1), tl.sum(tl.where(passed, count[None, :], 0), 1)
        place, known = (first + listing) * LISTING + i - skipped, listing < LISTS
        j = tl.load(channels + place, mask=known, other=0)
        v = tl.load(scaled + place, mask=known, other=0.0)[:, None]
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
    projections,
    lists,
    tokens,
    m,
    n,
    rank,
    RANK: tl.constexpr,
    REFINED: tl.constexpr,
    CHUNKS: tl.constexpr,
    PARTS: tl.constexpr,
    LISTS: tl.constexpr,
    LISTING: tl.constexpr,
    TOGETHER: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """extra[part, token, row] = the open columns of E in some lists (and A z in part 0), for a strip of 128 rows."""
    if OVERLAP:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    pid = tl.program_id(0)
    strip, part, token = pid // (tokens * PARTS), pid // tokens % PARTS, pid % tokens
    row = strip * 128 + tl.arange(0, 128)
    total = tl.zeros((128,), tl.float32)
    if RANK > 0:
        if part == 0:
            chunk, r = tl.arange(0, CHUNKS), tl.arange(0, RANK)
            a = tl.load(A + row[:, None] * rank + r, mask=(row < m)[:, None] & (r < rank), other=0).to(tl.float32)
            at = (chunk[:, None] * tokens + token) * RANK + r
            z = tl.load(low + at, mask=(chunk < projections)[:, None], other=0.0)
            total += tl.sum(a * tl.sum(z, 0)[None, :], 1)
    if REFINED:
        stride = tl.where(strip * 128 + 128 <= tl.cdiv(m, 64) * 64, 16, 8)
        here = plane.to(tl.pointer_type(tl.int32)) + strip * 16 * n
        first, some = part * LISTS, tl.minimum(LISTS, lists - part * LISTS)
        e = _gather(here, channels, scaled, counts, token * lists + first, some, stride, LISTS, LISTING, TOGETHER)
        total += tl.load(row_factor + row, mask=row < m, other=0.0).to(tl.float32) * e
    tl.store(extra + (part * tokens + token) * m + row, total, mask=row < m)


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
    out,
    codes,
    scale,
    zero,
    extra,
    tokens,
    m,
    blocks,
    one,
    BITS: tl.constexpr,
    ZERO: tl.constexpr,
    BATCH: tl.constexpr,
    ROWS: tl.constexpr,
    GROUPS: tl.constexpr,
    PARTS: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """out = Q x + the sum of the parts of `extra`, for some rows and all tokens."""
    PER: tl.constexpr = 2 * BITS  # words of a group of 64
    LANES: tl.constexpr = 32 // BITS
    WORDS: tl.constexpr = GROUPS * PER
    words, size = codes.to(tl.pointer_type(tl.int32)), blocks * PER
    batch, rows = tl.arange(0, BATCH)[:, None], tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    token, row = tl.minimum(batch, tokens - 1)[:, :, None], tl.minimum(rows, m - 1)[None, :, None]
    total = tl.zeros((BATCH, ROWS, GROUPS), tl.float32)
    for start in range(0, blocks, GROUPS):
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
    result = tl.sum(total, 2)
    place, inside = batch * m + rows, (batch < tokens) & (rows < m)
    if PARTS > 0:
        if OVERLAP:
            tl.extra.cuda.gdc_wait()
        for part in tl.static_range(PARTS):
            result += tl.load(extra + part * tokens * m + place, mask=inside, other=0.0)
    tl.store(out + place, result.to(out.dtype.element_ty), mask=inside)


def spread(x: Tensor, bits: int) -> Tensor:
    """x (…, n) in the order in which the kernel multiplies: (tokens, lanes, ⌈n / 64⌉ 2 bits).

    A word of codes has 32 / bits lanes: first the low nibbles of its bytes, then the high ones, or the bytes. All
    words' inputs of one lane lie side by side. Apart from the kernel, so that a compiler can fuse it with what made x.
    """
    padded = F.pad(x.flatten(0, -2), (0, -x.shape[-1] % 64))
    groups = padded.unflatten(-1, (-1, 8 // bits, 2 * bits, 4))  # token, group, nibble, word, byte
    return groups.permute(0, 2, 4, 1, 3).reshape(len(padded), 32 // bits, -1).contiguous()


def gemv(
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
) -> Tensor:
    """y (tokens, m), of at most 8 tokens, from x in the order of `spread`.

    The tensors are those of a `QuantizedGroup`: base (codes, scale, zero), low rank (A, B, factor; or all None) and
    refinement (plane, row, column, threshold; or all None).
    """
    spread = spread.contiguous()
    (m, blocks), tokens, bits = scale.shape, len(spread), 4 if codes.dtype == torch.uint8 else 8
    overlap = overlaps(spread.device)
    y = spread.new_empty((tokens, m))
    extra, parts = None, 0
    if B is not None or plane is not None:
        rank, n = B.shape if B is not None else (0, 0)
        n = len(column) if column is not None else n
        chunks = triton.cdiv(n, CHUNK) if rank else 0
        lists = 0 if plane is None else triton.cdiv(n, LISTING)
        padded_rank = triton.next_power_of_2(rank) if rank else 0
        strips = triton.cdiv(m, 128)
        some = triton.next_power_of_2(triton.cdiv(max(1, lists), max(1, REFINERS // strips)))  # lists of a program
        parts = triton.cdiv(max(1, lists), some)
        low = spread.new_empty(chunks * tokens * padded_rank, dtype=torch.float32)
        channels = spread.new_empty(lists * tokens * LISTING, dtype=torch.int32)
        scaled = spread.new_empty(lists * tokens * LISTING, dtype=torch.float32)
        counts = spread.new_empty(lists * tokens, dtype=torch.int32)
        extra = spread.new_empty(parts * tokens * m, dtype=torch.float32)
        common = {"RANK": padded_rank, "REFINED": plane is not None, "LISTING": LISTING, "OVERLAP": overlap}
        _produce[chunks + lists * tokens,](
            *(spread, B, factor, column, threshold, low, channels, scaled, counts, tokens, n, blocks, rank, lists),
            CHUNK=CHUNK,
            BITS=bits,
            **common,
        )
        _refine[strips * tokens * parts,](
            *(A, low, plane, row, channels, scaled, counts, extra, chunks, lists, tokens, m, n, rank),
            CHUNKS=triton.next_power_of_2(max(1, chunks)),
            PARTS=parts,
            LISTS=some,
            TOGETHER=TOGETHER,
            launch_pdl=overlap,
            **common,
        )
    batch = triton.next_power_of_2(tokens)
    rows, groups, warps = _tiles(m, blocks, bits, batch)
    _multiply[triton.cdiv(m, rows),](
        *(spread, y, codes, scale, zero, extra, tokens, m, blocks, ONE),
        BITS=bits,
        ZERO=zero is not None,
        BATCH=batch,
        ROWS=rows,
        GROUPS=groups,
        PARTS=parts,
        OVERLAP=overlap,
        num_warps=warps,
        launch_pdl=overlap and parts > 0,
    )
    return y


def overlaps(device: torch.device) -> bool:
    """Whether a launch on `device` can begin before the one before it is through."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] >= HOPPER


def _tiles(m: int, blocks: int, bits: int, batch: int) -> tuple[int, int, int]:
    """Rows and groups that a program of `_multiply` reads together, and its warps, as an H100 likes them."""
    if m >= 8192:
        rows, groups, warps = 64 if m >= 16384 else 32, 8, 4
    elif m >= 2048:
        rows, groups, warps = (16, 32, 16) if blocks >= 128 else (16, 16, 8)
    else:
        rows, groups, warps = 8, 8, 4
    return min(rows, 128 // batch), groups * 4 // bits, warps  # as many words and registers whatever the bits and batch
