"""Choice of representative tokens on the GPU (Triton): `attention.select`, tile by tile, with no T × T in memory.

    greedy    CHUNK tokens at a time. All their tiles are held against the representatives before them, by as many
              programs as fill the GPU. Then one program settles, tile after tile, which of them are near to none that
              is chosen. What is near within a chunk is known before, for all chunks at once: T × CHUNK bytes.
    nearest   the largest cosine of every row with an earlier column.

Cosines are sums in float32 of products of the elements as they are given.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from rankgate.ops.gpu.dots import dot

TILE = 128  # tokens on either side of a product
CHUNK, NARROW_CHUNK = (
    1024,
    4096,
)  # tokens that are settled together; more of them where products cost less than launches
NARROW = 256
PROGRAMS = 264  # two for each multiprocessor of a large GPU
DEPTH = 64  # elements of a token multiplied at once


@triton.jit
def _cosines(x, rows, columns, width, TILE: tl.constexpr, DEPTH: tl.constexpr):
    """TILE × TILE products of tokens of x (… × width) at the given rows and columns."""
    i = tl.arange(0, DEPTH)
    left, right = x + rows.to(tl.int64)[:, None] * width, x + columns.to(tl.int64)[:, None] * width
    out = tl.zeros((TILE, TILE), tl.float32)
    for at in range(0, width, DEPTH):
        inside = at + i[None, :] < width
        a = tl.load(left + at + i[None, :], mask=inside, other=0.0)
        b = tl.load(right + at + i[None, :], mask=inside, other=0.0)
        out = dot(a, tl.trans(b), out, "tf32")
    return out


@triton.jit
def _packed(flags, ROWS: tl.constexpr, WORDS: tl.constexpr):
    """Flags (ROWS × 32 WORDS, 0 or 1) as bits of int32 (ROWS × WORDS)."""
    return tl.sum(tl.reshape(flags, (ROWS, WORDS, 32)) << tl.arange(0, 32)[None, None, :], 2)


@triton.jit
def _within(x, least, near, tokens, width, CHUNK: tl.constexpr, TILE: tl.constexpr, DEPTH: tl.constexpr):
    """What is near to an earlier token of its chunk: near (texts × tokens × CHUNK / 32), a bit for each pair."""
    row, column, text = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    WORDS: tl.constexpr = TILE // 32
    n = tl.arange(0, TILE)
    t, s = row * TILE + n, row * TILE // CHUNK * CHUNK + column * TILE + n
    if column * TILE <= row * TILE % CHUNK:
        x += text.to(tl.int64) * tokens * width
        cosines = _cosines(x, tl.minimum(t, tokens - 1), tl.minimum(s, tokens - 1), width, TILE, DEPTH)
        close = (tl.minimum(cosines, 1.0) > tl.load(least + text)) & (s[None, :] < t[:, None])
        place = (
            (text.to(tl.int64) * tokens + t[:, None]) * (CHUNK // 32) + column * WORDS + tl.arange(0, WORDS)[None, :]
        )
        tl.store(near + place, _packed(close.to(tl.int32), TILE, WORDS), mask=t[:, None] < tokens)


@triton.jit
def _against(
    x, least, found, counts, taken, start, tokens, width, SPLITS: tl.constexpr, TILE: tl.constexpr, DEPTH: tl.constexpr
):
    """Mark in `taken` the tokens of a tile that are near to every SPLITS-th tile of representatives."""
    row, split, text = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    n = tl.arange(0, TILE)
    t = start + row * TILE + n
    count, limit, found = tl.load(counts + text), tl.load(least + text), found + text.to(tl.int64) * tokens
    x += text.to(tl.int64) * tokens * width
    top = tl.full((TILE,), -1.0, tl.float32)
    for at in range(split * TILE, count, SPLITS * TILE):
        columns = tl.load(found + tl.minimum(at + n, count - 1))  # the last one several times
        top = tl.maximum(top, tl.max(_cosines(x, tl.minimum(t, tokens - 1), columns, width, TILE, DEPTH), 1))
    close = tl.minimum(top, 1.0) > limit
    tl.store(taken + text.to(tl.int64) * tokens + t, close.to(tl.int8), mask=close & (t < tokens))


@triton.jit
def _settle(near, taken, chosen, found, counts, start, tokens, CHUNK: tl.constexpr, TILE: tl.constexpr):
    """Choose among the tokens of a chunk, one tile after the other, and add them to `found`."""
    WORDS: tl.constexpr = CHUNK // 32
    OWN: tl.constexpr = TILE // 32
    text = tl.program_id(0).to(tl.int64)
    near += text * tokens * WORDS
    taken, chosen, found = taken + text * tokens, chosen + text * tokens, found + text * tokens
    n, word, own = tl.arange(0, TILE), tl.arange(0, WORDS), tl.arange(0, OWN)
    count, held = tl.load(counts + text), tl.zeros((1, WORDS), tl.int32)  # the chosen of the chunk, as bits
    for at in range(start, tl.minimum(start + CHUNK, tokens), TILE):
        t = at + n
        there, place = t < tokens, (at - start) // 32
        rows = near + t[:, None] * WORDS
        before = tl.load(rows + word[None, :], mask=there[:, None] & (word[None, :] < place), other=0)
        close = tl.load(rows + place + own[None, :], mask=there[:, None], other=0)
        free = (tl.load(taken + t, mask=there, other=1) == 0).to(tl.int32)
        free *= (tl.max(((before & held) != 0).to(tl.int32), 1) == 0).to(tl.int32)
        mine = free * 0
        while tl.max(free, 0) > 0:  # nothing undecided before the first of them is near
            waiting = _packed(tl.reshape(free, (1, TILE)), 1, OWN)
            first = free * (tl.max(((close & waiting) != 0).to(tl.int32), 1) == 0).to(tl.int32)
            mine += first
            settled = _packed(tl.reshape(first, (1, TILE)), 1, OWN)
            free *= (1 - first) * (tl.max(((close & settled) != 0).to(tl.int32), 1) == 0).to(tl.int32)
        every = tl.where(tl.arange(0, CHUNK // TILE)[:, None] == (at - start) // TILE, mine[None, :], 0)
        held = held | _packed(tl.reshape(every, (1, CHUNK)), 1, WORDS)
        tl.store(chosen + t, mine.to(tl.int8), mask=there)
        tl.store(found + count + tl.cumsum(mine, 0) - 1, t, mask=mine > 0)
        count += tl.sum(mine, 0)
    tl.store(counts + text, count)


@triton.jit
def _nearest(
    x,
    rows,
    columns,
    ends,
    best,
    place,
    count,
    tokens,
    capacity,
    width,
    SPLITS: tl.constexpr,
    TILE: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """The largest cosine of each row of a tile with every SPLITS-th tile of columns, and the number of that column."""
    tile, split, text = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    n = tl.arange(0, TILE)
    r, end = tile * TILE + n, tl.load(ends + text * tl.num_programs(0) + tile)
    x, columns = x + text * tokens * width, columns + text * capacity
    t = tl.load(rows + r, mask=r < count, other=0)
    low: tl.constexpr = TILE - 1  # the last bits of a cosine make room for the number of its column: 3e-5
    top, at_top = tl.full((TILE,), 0, tl.int32), tl.zeros((TILE,), tl.int32)
    for at in range(split * TILE, end, SPLITS * TILE):
        s = tl.load(columns + tl.minimum(at + n, end - 1))
        cosines = tl.minimum(_cosines(x, t, s, width, TILE, DEPTH), 1.0) + 2.0  # positive, in the order of its bits
        cosines = tl.where((at + n < end)[None, :] & (s[None, :] < t[:, None]), cosines, 1.0)
        high = tl.max((cosines.to(tl.int32, bitcast=True) & ~low) | (low - n)[None, :], 1)
        at_top = tl.where((high & ~low) > (top & ~low), at + low - (high & low), at_top)
        top = tl.maximum(top, high)
    top = tl.maximum((top & ~low).to(tl.float32, bitcast=True) - 2.0, -1.0)
    out = (split * tl.num_programs(2) + text) * count + r
    tl.store(best + out, top, mask=r < count)
    tl.store(place + out, at_top, mask=r < count)


def greedy(x: Tensor, least: Tensor) -> tuple[Tensor, Tensor]:
    """The first maximal set of tokens of which none has a cosine above `least` with an earlier one.

    x: (B, T, d), of length 1. least: (B,) float32. Returns it as (B, T) bool, and the tokens in it, ascending: (B, T)
    int32, of which the first ones count.
    """
    texts, tokens, width = x.shape
    x, tiles, chunk = x.contiguous(), triton.cdiv(tokens, TILE), NARROW_CHUNK if width <= NARROW else CHUNK
    near = x.new_empty(texts * tokens * chunk // 32, dtype=torch.int32)
    taken, chosen = x.new_zeros(2, texts, tokens, dtype=torch.int8)
    found, counts = x.new_zeros(texts, tokens, dtype=torch.int32), x.new_zeros(texts, dtype=torch.int32)
    shape = {"TILE": TILE, "DEPTH": DEPTH, "num_warps": 8}
    _within[tiles, chunk // TILE, texts](x, least, near, tokens, width, CHUNK=chunk, **shape)
    for start in range(0, tokens, chunk):
        rows = min(chunk // TILE, triton.cdiv(tokens - start, TILE))
        if start:
            splits = max(1, min(start // TILE, PROGRAMS // (rows * texts)))
            _against[rows, splits, texts](x, least, found, counts, taken, start, tokens, width, SPLITS=splits, **shape)
        _settle[texts,](near, taken, chosen, found, counts, start, tokens, CHUNK=chunk, TILE=TILE, num_warps=8)
    return chosen.bool(), found


def nearest(x: Tensor, rows: Tensor, columns: Tensor, before: Tensor) -> tuple[Tensor, Tensor]:
    """The largest cosine of each row with an earlier column of its text (−1 if there is none), and that column.

    x: (B, T, d), of length 1. rows: (n,) ascending positions, the same in all texts. columns: (B, m) int32, ascending
    positions. before: (B, n), ascending, how many columns at most come before a row.
    Returns two of (B, n).
    """
    (texts, tokens, width), count, tiles = x.shape, len(rows), triton.cdiv(len(rows), TILE)
    ends = torch.cat([before[:, TILE - 1 :: TILE], before[:, -1:]], 1)[:, :tiles].to(torch.int32).contiguous()
    splits = max(1, min(triton.cdiv(columns.shape[1], TILE), PROGRAMS // (tiles * texts)))
    best = x.new_empty(splits, texts, count, dtype=torch.float32)
    place = torch.empty_like(best, dtype=torch.int32)
    shape = {"SPLITS": splits, "TILE": TILE, "DEPTH": DEPTH, "num_warps": 8}
    _nearest[tiles, splits, texts](
        x.contiguous(), rows, columns, ends, best, place, count, tokens, columns.shape[1], width, **shape
    )
    likeness, split = best.max(0)
    return likeness, columns.gather(1, place.gather(0, split[None])[0].long())
