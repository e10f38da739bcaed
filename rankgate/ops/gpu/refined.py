"""What low rank and refinement add to a quantised input group on the GPU (Triton); see `QuantizedGroup.reference`.

Two launches, each of which overlaps with the one before where the hardware can (see `overlap`):

    produce    z: CHUNK inputs of B, all ranks; and of LISTING channels those that are open, and x_j column_j of each
    refine     A z, or the open columns of E in some of the lists, for one token and a strip of 128 rows

Few bytes, but one memory access after the other: the base, which needs nothing of theirs but at its end, is multiplied
meanwhile, see `quantized`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from rankgate.ops.gpu.overlap import begin, overlaps

CHUNK = 512  # inputs of a program of `produce` for z
LISTING = 1024  # channels of one for a list
PROGRAMS = 192  # of `refine` for a token, about, where there are lists enough
TOGETHER = 64  # open channels that one of them reads together
SLOTS = 8  # of which so many are in each step: with 16 words of a channel, one word for each thread


@triton.jit
def _project(x, B, factor, low, chunk, n, tokens, rank, RANK: tl.constexpr, CHUNK: tl.constexpr, OVERLAP: tl.constexpr):
    """low[chunk, token, rank] = s · B x over the inputs of one chunk."""
    j, r = chunk * CHUNK + tl.arange(0, CHUNK), tl.arange(0, RANK)
    b = tl.load(B + r[:, None] * n + j, mask=(r[:, None] < rank) & (j < n), other=0).to(tl.float32)
    s = tl.load(factor + r, mask=r < rank, other=0.0)
    begin(OVERLAP)
    for token in range(tokens):
        v = tl.load(x + token * n + j, mask=j < n, other=0.0).to(tl.float32)
        tl.store(low + (chunk * tokens + token) * RANK + r, tl.sum(b * v, 1) * s)


@triton.jit
def _list(
    x,
    column,
    threshold,
    channels,
    scaled,
    counts,
    listing,
    lists,
    token,
    n,
    LISTING: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """LISTING channels of one token, the open ones first, and x_j column_j of each: 0 for a closed one."""
    j = listing * LISTING + tl.arange(0, LISTING)
    t = tl.load(threshold + j, mask=j < n, other=float("inf")).to(tl.float32)
    c = tl.load(column + j, mask=j < n, other=0.0).to(tl.float32)
    begin(OVERLAP)
    v = tl.load(x + token * n + j, mask=j < n, other=0.0).to(tl.float32)
    opened = (tl.abs(v) > t).to(tl.int32)
    before, count = tl.cumsum(opened, 0) - opened, tl.sum(opened, 0)
    i = tl.arange(0, LISTING)
    place = (token * lists + listing) * LISTING + tl.where(opened > 0, before, count + i - before)
    tl.store(channels + place, j)
    tl.store(scaled + place, tl.where(opened > 0, v * c, 0.0))
    tl.store(counts + token * lists + listing, count)


@triton.jit
def produce(
    x,
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
    rank,
    lists,
    RANK: tl.constexpr,
    REFINED: tl.constexpr,
    CHUNK: tl.constexpr,
    LISTING: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    pid, listings = tl.program_id(0), lists * tokens
    if pid < listings:
        if REFINED:
            listing, token = pid // tokens, pid % tokens
            _list(
                x,
                column,
                threshold,
                channels,
                scaled,
                counts,
                listing,
                lists,
                token,
                n,
                LISTING,
                OVERLAP,
            )
    else:
        if RANK > 0:
            _project(x, B, factor, low, pid - listings, n, tokens, rank, RANK, CHUNK, OVERLAP)


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
    last,
    stride,
    LISTING: tl.constexpr,
    TOGETHER: tl.constexpr,
    SLOTS: tl.constexpr,
):
    """Σ over the open channels of the lists from `first` to `last`, of the codes of 128 rows of E times x_j column_j.

    plane: int32; the codes of channel j are the `stride` words at j stride: 16, or 8 where only 64 rows are left.
    """
    w = tl.arange(0, 16)[None, :]
    a = tl.zeros((SLOTS, 16), tl.float32)
    b, c, d, e, f, g, h = a, a, a, a, a, a, a
    for listing in range(first, last):
        for start in range(0, tl.load(counts + listing), TOGETHER):
            for step in tl.static_range(0, TOGETHER, SLOTS):  # unrolled, so that their loads are under way together
                i = listing * LISTING + start + step + tl.arange(0, SLOTS)
                j, v = tl.load(channels + i)[:, None], tl.load(scaled + i)[:, None]
                q = tl.load(plane + j * stride + w, mask=(v != 0) & (w < stride), other=0)
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
def refine(
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
    SLOTS: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """extra[part, token, row]: the open columns of E in some lists, or A z (the last part), for a strip of 128 rows."""
    if OVERLAP:
        tl.extra.cuda.gdc_launch_dependents()
    pid = tl.program_id(0)
    strip, part, token = pid // (tokens * PARTS), pid // tokens % PARTS, pid % tokens
    row = strip * 128 + tl.arange(0, 128)
    last = part == PARTS - 1
    if RANK > 0:
        r, rows = tl.arange(0, RANK), tl.where(last, m, 0)
        a = tl.load(A + row[:, None] * rank + r, mask=(row < rows)[:, None] & (r < rank), other=0)
    if REFINED:
        factor = tl.load(row_factor + row, mask=row < m, other=0.0)
    if OVERLAP:
        tl.extra.cuda.gdc_wait()
    total = tl.zeros((128,), tl.float32)
    if REFINED:
        stride = tl.where(strip * 128 + 128 <= tl.cdiv(m, 64) * 64, 16, 8)
        here, begin = plane.to(tl.pointer_type(tl.int32)) + strip * 16 * n, token * lists
        first, end = begin + tl.minimum(part * LISTS, lists), begin + tl.minimum((part + 1) * LISTS, lists)
        e = _gather(here, channels, scaled, counts, first, end, stride, LISTING, TOGETHER, SLOTS)
        total += factor.to(tl.float32) * e
    if RANK > 0:
        if last:
            chunk = tl.arange(0, CHUNKS)[:, None]
            z = tl.load(low + (chunk * tokens + token) * RANK + r, mask=chunk < projections, other=0.0)
            total += tl.sum(a.to(tl.float32) * tl.sum(z, 0)[None, :], 1)
    tl.store(extra + (part * tokens + token) * m + row, total, mask=row < m)


class Launches(NamedTuple):
    """Sizes of the two launches, what the first leaves to the second (low, channels, scaled, counts), and constants."""

    rank: int
    chunks: int
    lists: int
    parts: int
    scratch: list[Tensor]
    producing: dict[str, Any]
    refining: dict[str, Any]

    @classmethod
    def of(cls, x: Tensor, m: int, A: Tensor | None, plane: Tensor | None) -> Launches:
        """For tokens x (tokens, n), A of rank r (m, r) and a refinement plane, one of which may be None."""
        (tokens, n), rank = x.shape, 0 if A is None else A.shape[1]
        chunks = triton.cdiv(n, CHUNK) if rank else 0
        lists = 0 if plane is None else triton.cdiv(n, LISTING)
        padded_rank = triton.next_power_of_2(rank) if rank else 0
        some = triton.next_power_of_2(triton.cdiv(lists, max(1, PROGRAMS // triton.cdiv(m, 128)))) if lists else 1
        parts = triton.cdiv(lists, some) + (rank > 0)
        overlap = overlaps(x.device)
        low = x.new_empty(chunks * tokens * padded_rank, dtype=torch.float32)
        channels = x.new_empty(lists * tokens * LISTING, dtype=torch.int32)
        scaled = x.new_empty(lists * tokens * LISTING, dtype=torch.float32)
        counts = x.new_empty(lists * tokens, dtype=torch.int32)
        common = {"RANK": padded_rank, "REFINED": plane is not None, "LISTING": LISTING, "OVERLAP": overlap}
        common["launch_pdl"] = overlap
        refining = {"CHUNKS": triton.next_power_of_2(max(1, chunks)), "PARTS": parts, "LISTS": some}
        refining |= {"TOGETHER": TOGETHER, "SLOTS": SLOTS, **common}
        return cls(*(rank, chunks, lists, parts, [low, channels, scaled, counts]), {"CHUNK": CHUNK, **common}, refining)


def added(
    x: Tensor,
    m: int,
    A: Tensor | None,
    B: Tensor | None,
    factor: Tensor | None,
    plane: Tensor | None,
    row: Tensor | None,
    column: Tensor | None,
    threshold: Tensor | None,
) -> Tensor | None:
    """A z + E x (parts, tokens, m) float32, to be summed over the parts, from at most 8 tokens x (tokens, n).

    Low rank (A, B, factor) or refinement (plane, row, column, threshold) may be all None; without either, None.
    """
    if B is None and plane is None:
        return None
    x = x.contiguous()
    (tokens, n), launches = x.shape, Launches.of(x, m, A, plane)
    low, *found = launches.scratch
    extra = x.new_empty((launches.parts, tokens, m), dtype=torch.float32)
    rank, chunks, lists = launches.rank, launches.chunks, launches.lists
    produce[chunks + lists * tokens,](
        *(x, B, factor, column, threshold, low, *found, tokens, n, rank, lists),
        **launches.producing,
    )
    refine[triton.cdiv(m, 128) * tokens * launches.parts,](
        *(A, low, plane, row, *found, extra, chunks, lists, tokens, m, n, rank),
        **launches.refining,
    )
    return extra
