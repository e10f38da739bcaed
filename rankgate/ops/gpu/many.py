"""A quantised input group on tensor cores (Triton), for 2 to 64 tokens: the contract of `QuantizedGroup.reference`.

Two launches. `_project` computes z = s B x. `_multiply` then has programs of three kinds for every tile of rows and of
tokens, which leave their sums in float32:

    Q x      some of the groups of 64 inputs: codes become 16-bit floats (q − z) s in registers
    E x      the same of the refinement plane, dense: what is open differs from token to token, so closed channels of
             x are set to 0
    A z      all ranks

Whichever ends last adds up what the others have left, always in the same order. Arithmetic is that of torch's products
in 16 bits: weights are rounded to them, sums are float32.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from rankgate.ops.gpu.nibbles import dot, nibbles

CHUNK = 512  # inputs of a program of `_project`
STRIP = 128  # rows of the refinement plane that lie together
LARGEST = 64  # tokens of a tile
GROUPS, SPLITS = 2, 4  # groups of 64 inputs that are multiplied together; programs that share the inputs


@triton.jit
def _inputs(x, token, first, n, inside, OFFSET: tl.constexpr, WIDTH: tl.constexpr, GROUPS: tl.constexpr):
    """x of some tokens (BATCH × GROUPS · WIDTH): of GROUPS groups of 64 inputs, WIDTH of each from OFFSET on."""
    k = (first + tl.arange(0, GROUPS)[:, None]) * 64 + OFFSET + tl.arange(0, WIDTH)[None, :]
    values = tl.load(
        x + token[:, None, None] * n + k[None, :, :], mask=inside[:, None, None] & (k < n)[None], other=0.0
    )
    return tl.reshape(values, (token.shape[0], GROUPS * WIDTH))


@triton.jit
def _groups(
    codes, scale, zero, x, token, inside, row, start, last, n, blocks,
    BITS: tl.constexpr, ZERO: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    """Codes, scales and zeros of GROUPS groups, and x in two halves (at 8 bits the first one is all of it)."""
    WIDTH: tl.constexpr = 8 * BITS
    block = start + tl.arange(0, GROUPS)[None, :, None]
    here = row[:, None, None] * blocks + tl.minimum(block, blocks - 1)
    q = tl.load(codes + here * WIDTH + tl.arange(0, WIDTH)[None, None, :])
    s = tl.load(scale + here, mask=block < last, other=0.0)
    z = tl.load(zero + here) if ZERO else s
    first = _inputs(x, token, start, n, inside, 0, WIDTH, GROUPS)
    second = _inputs(x, token, start, n, inside, WIDTH, WIDTH, GROUPS) if BITS == 4 else first
    return q, s, z, first, second


@triton.jit
def _base(
    x, codes, scale, zero, token, inside, row, first, last, n, blocks,
    BITS: tl.constexpr, ZERO: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    """Q x of some rows and groups of inputs; what the next groups need is loaded while these are multiplied."""
    BATCH: tl.constexpr = token.shape[0]
    ROWS: tl.constexpr = row.shape[0]
    shape: tl.constexpr = (ROWS, GROUPS, 8 * BITS)
    dtype: tl.constexpr = x.dtype.element_ty
    total = tl.zeros((ROWS, BATCH), tl.float32)
    q, s, z, x_first, x_second = _groups(
        codes, scale, zero, x, token, inside, row, first, last, n, blocks, BITS, ZERO, GROUPS
    )
    for start in range(first, last, GROUPS):
        q_next, s_next, z_next, first_next, second_next = _groups(
            codes, scale, zero, x, token, inside, row, start + GROUPS, last, n, blocks, BITS, ZERO, GROUPS
        )
        zeros = z.to(tl.float32) if ZERO else tl.full((ROWS, GROUPS, 1), 8.0 if BITS == 4 else 0.0, tl.float32)
        if BITS == 4:
            low, high = nibbles(q, tl.broadcast_to(zeros, shape), tl.broadcast_to(s.to(dtype), shape))
            total = dot(tl.reshape(low, (ROWS, GROUPS * 32)), tl.trans(x_first), total)
            total = dot(tl.reshape(high, (ROWS, GROUPS * 32)), tl.trans(x_second), total)
        else:
            w = ((q.to(tl.float32) - zeros) * s.to(tl.float32)).to(dtype)
            total = dot(tl.reshape(w, (ROWS, GROUPS * 64)), tl.trans(x_first), total)
        q, s, z, x_first, x_second = q_next, s_next, z_next, first_next, second_next
    return tl.trans(total)


@triton.jit
def _plane(
    x, plane, row_factor, column, threshold, token, inside, strip, first, last, n, m,
    INPUTS: tl.constexpr,
):  # fmt: skip
    """E of a strip of 128 rows times the open channels of x: of the rows of low nibbles, and of those of high ones."""
    BATCH: tl.constexpr = token.shape[0]
    dtype: tl.constexpr = x.dtype.element_ty
    byte = tl.arange(0, 64)[None, :]
    stride = tl.where(strip * 128 + 128 <= tl.cdiv(m, 64) * 64, 64, 32)
    here = plane + strip * 64 * n
    low_total = tl.zeros((BATCH, 64), tl.float32)
    high_total = tl.zeros((BATCH, 64), tl.float32)
    for start in range(first, last, INPUTS):
        k = start + tl.arange(0, INPUTS)
        q = tl.load(here + k[:, None] * stride + byte, mask=(k < last)[:, None] & (byte < stride), other=0x88)
        v = tl.load(x + token[:, None] * n + k[None, :], mask=inside[:, None] & (k < n)[None, :], other=0.0)
        t = tl.load(threshold + k, mask=k < n, other=float("inf")).to(tl.float32)
        c = tl.load(column + k, mask=k < n, other=0.0).to(tl.float32)
        wide = v.to(tl.float32)
        v = tl.where(tl.abs(wide) > t[None, :], wide * c[None, :], 0.0).to(dtype)
        one = tl.full((INPUTS, 64), 1.0, dtype)
        low, high = nibbles(q, tl.full((INPUTS, 64), 8.0, tl.float32), one)
        low_total = dot(v, low, low_total)
        high_total = dot(v, high, high_total)
    return low_total, high_total


@triton.jit
def _multiply(
    x, out, codes, scale, zero, A, low, plane, row_factor, column, threshold, sums, counts,
    tokens, m, n, blocks, rank, chunks,
    BITS: tl.constexpr, ZERO: tl.constexpr, RANK: tl.constexpr, REFINED: tl.constexpr, BATCH: tl.constexpr,
    ROWS: tl.constexpr, GROUPS: tl.constexpr, SPLITS: tl.constexpr, INPUTS: tl.constexpr,
):  # fmt: skip
    """out = Q x + E x + A z, a part of one of them by each program; see above."""
    PARTS: tl.constexpr = SPLITS * (2 if REFINED else 1) + (1 if RANK > 0 else 0)
    pid, tile = tl.program_id(0), tl.program_id(0) // PARTS
    part = pid % PARTS
    token = tl.program_id(1) * BATCH + tl.arange(0, BATCH)
    inside = token < tokens
    row = tile * ROWS + tl.arange(0, ROWS)
    sums += tl.program_id(1) * BATCH * m * PARTS  # of these tokens
    counts += tl.program_id(1) * tl.cdiv(m, ROWS)
    place = tl.arange(0, BATCH)[:, None] * m + row[None, :]
    keep = inside[:, None] & (row < m)[None, :]
    if part < SPLITS:
        share = tl.cdiv(tl.cdiv(blocks, SPLITS), GROUPS) * GROUPS
        first = part * share
        y = _base(
            x, codes, scale, zero, token, inside, tl.minimum(row, m - 1), first, tl.minimum(first + share, blocks),
            n, blocks, BITS, ZERO, GROUPS,
        )  # fmt: skip
        tl.store(sums + part * BATCH * m + place, y, mask=keep)
    else:
        if REFINED:
            if part < 2 * SPLITS:
                share = tl.cdiv(tl.cdiv(n, SPLITS), INPUTS) * INPUTS
                first = (part - SPLITS) * share
                y, y_high = _plane(
                    x, plane, row_factor, column, threshold, token, inside, tile, first,
                    tl.minimum(first + share, n), n, m, INPUTS,
                )  # fmt: skip
                i = tl.arange(0, 64)
                r = tile * 128 + i // 32 * 64 + i % 32
                at = sums + part * BATCH * m + tl.arange(0, BATCH)[:, None] * m + r[None, :]
                f = tl.load(row_factor + r, mask=r < m, other=0.0).to(tl.float32)
                tl.store(at, y * f[None, :], mask=inside[:, None] & (r < m)[None, :])
                f = tl.load(row_factor + r + 32, mask=r + 32 < m, other=0.0).to(tl.float32)
                tl.store(at + 32, y_high * f[None, :], mask=inside[:, None] & (r + 32 < m)[None, :])
        if RANK > 0:
            if part == PARTS - 1:
                r = tl.arange(0, RANK)
                a = tl.load(
                    A + row[:, None] * rank + r[None, :], mask=(row < m)[:, None] & (r < rank)[None, :], other=0
                )
                z = tl.zeros((BATCH, RANK), tl.float32)
                for chunk in range(chunks):
                    z += tl.load(
                        low + (chunk * tokens + token[:, None]) * RANK + r[None, :], mask=inside[:, None], other=0.0
                    )
                dtype: tl.constexpr = x.dtype.element_ty
                y = dot(z.to(dtype), tl.trans(a.to(tl.float32).to(dtype)), tl.zeros((BATCH, ROWS), tl.float32))
                tl.store(sums + part * BATCH * m + place, y, mask=keep)
    tl.debug_barrier()
    if tl.atomic_add(counts + tile, 1, sem="acq_rel") == PARTS - 1:
        y = tl.zeros((BATCH, ROWS), tl.float32)
        for each in range(PARTS):
            y += tl.load(sums + each * BATCH * m + place, mask=keep, other=0.0, cache_modifier=".cg")
        tl.store(out + tl.program_id(1) * BATCH * m + place, y.to(out.dtype.element_ty), mask=keep)


@triton.jit
def _project(
    x, B, factor, low, counts, tokens, n, rank, counters,
    RANK: tl.constexpr, BATCH: tl.constexpr, CHUNK: tl.constexpr, INPUTS: tl.constexpr, COUNTERS: tl.constexpr,
):  # fmt: skip
    """low[chunk, token, rank] = s · B x over the inputs of one chunk; and nobody has been counted yet."""
    chunk, r = tl.program_id(0), tl.arange(0, RANK)
    token = tl.program_id(1) * BATCH + tl.arange(0, BATCH)
    inside = token < tokens
    dtype: tl.constexpr = x.dtype.element_ty
    if chunk == 0 and tl.program_id(1) == 0:
        for start in range(0, counters, COUNTERS):
            c = start + tl.arange(0, COUNTERS)
            tl.store(counts + c, tl.zeros((COUNTERS,), tl.int32), mask=c < counters)
    total = tl.zeros((BATCH, RANK), tl.float32)
    for start in range(chunk * CHUNK, min(n, chunk * CHUNK + CHUNK), INPUTS):
        k = start + tl.arange(0, INPUTS)
        b = (
            tl.load(B + r[:, None] * n + k[None, :], mask=(r < rank)[:, None] & (k < n)[None, :], other=0)
            .to(tl.float32)
            .to(dtype)
        )
        v = tl.load(x + token[:, None] * n + k[None, :], mask=inside[:, None] & (k < n)[None, :], other=0.0)
        total = dot(v, tl.trans(b), total)
    s = tl.load(factor + r, mask=r < rank, other=0.0)
    tl.store(low + (chunk * tokens + token[:, None]) * RANK + r[None, :], total * s[None, :], mask=inside[:, None])


def multiply(x: Tensor, parts: list[Any]) -> Tensor:
    """y (tokens, m) from x (tokens, n) in bfloat16 or float16, and `QuantizedGroup.parts`."""
    codes, scale, zero, A, B, factor, plane, row, column, threshold = parts
    x = x.contiguous()
    (tokens, n), (m, blocks) = x.shape, scale.shape
    rank = 0 if B is None else len(B)
    padded, chunks = max(16, triton.next_power_of_2(rank)) if rank else 0, triton.cdiv(n, CHUNK)
    batch = min(max(16, triton.next_power_of_2(tokens)), LARGEST)
    rows = STRIP if plane is not None or batch > 16 else STRIP // 2
    tiles, many = triton.cdiv(m, rows), triton.cdiv(tokens, batch)
    count = SPLITS * (1 if plane is None else 2) + (rank > 0)
    out = x.new_empty((tokens, m))
    sums = x.new_empty(many * count * batch * m, dtype=torch.float32)
    counts = x.new_empty(many * tiles, dtype=torch.int32)
    low = None
    if rank:
        low = x.new_empty(chunks * tokens * padded, dtype=torch.float32)
        _project[chunks, many](
            *(x, B, factor, low, counts, tokens, n, rank, len(counts)),
            RANK=padded,
            BATCH=batch,
            CHUNK=CHUNK,
            INPUTS=128,
            COUNTERS=1024,
        )
    else:
        counts.zero_()
    _multiply[tiles * count, many](
        *(x, out, codes, scale, zero, A, low, plane, row, column, threshold, sums, counts),
        *(tokens, m, n, blocks, rank, chunks),
        BITS=4 if codes.dtype == torch.uint8 else 8,
        ZERO=zero is not None,
        RANK=padded,
        REFINED=plane is not None,
        BATCH=batch,
        ROWS=rows,
        GROUPS=GROUPS,
        SPLITS=SPLITS,
        INPUTS=64,
    )
    return out
