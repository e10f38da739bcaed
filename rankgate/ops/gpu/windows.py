"""Attention of a whole text to windows, and to single keys before them, by head, on the GPU (Triton).

A program takes STEP queries of one head. They see the same keys before their own step: some that are kept (sinks and
representatives, each with a bias of its logit), which lie together, then the window, a run of whole tiles. Only the
tiles at the ends of the window compare positions. Nothing of size T × T is held: the biases are T / STEP × kept.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from rankgate.ops.gpu.dots import dot

WIDE = 256  # bytes of a key from which on fewer of them are read together
WIDEST = 512  # bytes of a key
LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)


class Kept(NamedTuple):
    """The keys that some heads read before their windows: representatives, and sinks among them.

    keys: (N, d), values: (N, e), those of a head in the order of the text. ends: (heads, steps) int32, how many of
    them lie before the window of a step. bias: (steps, M) float32; heads with the same keys share them.
    """

    keys: Tensor
    values: Tensor
    ends: Tensor
    bias: Tensor


@triton.jit
def _tile(
    top,
    total,
    mixed,
    query,
    keys,
    values,
    scale,
    bias,
    seen,
    inside,
    value_inside,
    BIAS: tl.constexpr,
    MASKED: tl.constexpr,
):
    """The softmax so far (largest score, sum, weighted values), and a tile of keys and values more, by their addresses.

    inside: None where rows have a power of two of elements, all of which exist. seen: where MASKED.
    """
    if inside is None:
        key, value = tl.load(keys), tl.load(values)
    else:
        key, value = tl.load(keys, mask=inside, other=0.0), tl.load(values, mask=value_inside, other=0.0)
    score = dot(query, tl.trans(key), None, "tf32") * scale
    if BIAS:
        score += (bias * LOG2E)[None, :]
    if MASKED:
        score = tl.where(seen, score, -float("inf"))
    higher = tl.maximum(top, tl.max(score, 1))
    weight, shrink = tl.math.exp2(score - higher[:, None]), tl.math.exp2(top - higher)
    mixed = dot(weight.to(value.dtype), value, mixed * shrink[:, None], "tf32")
    return higher, total * shrink + tl.sum(weight, 1), mixed


@triton.jit
def _attend_windows(
    q,
    k,
    v,
    out,
    table,
    kept_keys,
    kept_values,
    ends,
    bias,
    tokens,
    sinks,
    kept,
    heads,
    share,
    width,
    value_width,
    q_head,
    q_token,
    k_head,
    k_token,
    v_head,
    v_token,
    scale,
    STEP: tl.constexpr,
    TILE: tl.constexpr,
    WIDTH: tl.constexpr,
    VALUE: tl.constexpr,
    EVEN: tl.constexpr,
    KEPT: tl.constexpr,
):
    line, steps = tl.program_id(0) // share, tl.num_programs(1)
    step = steps - 1 - tl.program_id(1)  # the longest first
    g, window = tl.load(table + 4 * line), tl.load(table + 4 * line + 1)
    head, start = g * share + tl.program_id(0) % share, step * STEP
    low = tl.maximum(start - window, 0)
    i, e, n = tl.arange(0, WIDTH)[None, :], tl.arange(0, VALUE)[None, :], tl.arange(0, TILE)
    t = start + tl.arange(0, STEP)
    k += g.to(tl.int64) * k_head
    v += g.to(tl.int64) * v_head
    q += head.to(tl.int64) * q_head + start.to(tl.int64) * q_token
    key_at, value_at = n[:, None] * k_token + i, n[:, None] * v_token + e
    inside, value_inside = None, None
    if not EVEN:
        inside, value_inside = (n[:, None] >= 0) & (i < width), (n[:, None] >= 0) & (e < value_width)
    there = t[:, None] < tokens
    query = tl.load(q + tl.arange(0, STEP)[:, None] * q_token + i, mask=there & (i < width), other=0.0)
    top = tl.full((STEP,), -1e30, tl.float32)
    total, mixed = tl.zeros((STEP,), tl.float32), tl.zeros((STEP, VALUE), tl.float32)
    count, last, key_row, value_row = tl.minimum(sinks, low), 0, k_token, v_token
    early_keys, early_values = k, v
    if KEPT:
        count, first = tl.load(ends + line * steps + step), tl.load(table + 4 * line + 2).to(tl.int64)
        last, key_row, value_row = count // TILE * TILE, width, value_width
        early_keys, early_values = kept_keys + first * width, kept_values + first * value_width
        bias += step.to(tl.int64) * kept + tl.load(table + 4 * line + 3)
        keys, values = early_keys + n[:, None] * width + i, early_values + n[:, None] * value_width + e
        for at in range(0, last, TILE):
            more = tl.load(bias + at + n)
            top, total, mixed = _tile(
                top, total, mixed, query, keys, values, scale, more, None, inside, value_inside, True, False
            )
            keys += TILE * width
            values += TILE * value_width
    for at in range(last, count, TILE):
        rows, seen = tl.minimum(at + n, count - 1)[:, None], (at + n)[None, :] < count
        keys, values = early_keys + rows * key_row + i, early_values + rows * value_row + e
        more = tl.load(bias + at + n, mask=at + n < count, other=0.0) if KEPT else None
        top, total, mixed = _tile(
            top, total, mixed, query, keys, values, scale, more, seen, inside, value_inside, KEPT, True
        )
    whole = tl.minimum(tl.cdiv(low, TILE) * TILE, start)
    if low < whole:  # a window that begins within a tile
        row = (whole - TILE).to(tl.int64)
        keys, values, seen = (
            k + row * k_token + key_at,
            v + row * v_token + value_at,
            (whole - TILE + n)[None, :] >= low,
        )
        top, total, mixed = _tile(
            top, total, mixed, query, keys, values, scale, None, seen, inside, value_inside, False, True
        )
    row = whole.to(tl.int64)
    keys, values = k + row * k_token + key_at, v + row * v_token + value_at
    for _ in range(whole, start, TILE):
        top, total, mixed = _tile(
            top, total, mixed, query, keys, values, scale, None, None, inside, value_inside, False, False
        )
        keys += TILE * k_token
        values += TILE * v_token
    for at in range(start, tl.minimum(start + STEP, tokens), TILE):
        here = tl.minimum(at + n, tokens - 1).to(tl.int64)[:, None]
        keys, values, seen = k + here * k_token + i, v + here * v_token + e, (at + n)[None, :] <= t[:, None]
        top, total, mixed = _tile(
            top, total, mixed, query, keys, values, scale, None, seen, inside, value_inside, False, True
        )
    place = (t[:, None].to(tl.int64) * heads + head) * value_width + e
    tl.store(out + place, (mixed / total[:, None]).to(out.dtype.element_ty), mask=there & (e < value_width))


def attend(
    q: Tensor, k: Tensor, v: Tensor, heads: Tensor, sinks: int, kept: Kept | None, scale: float, step: int, out: Tensor
) -> None:
    """Some heads read: their step's tokens up to each query, the window before it, and what is kept before that.

    Args:
        q: (H, T, d), with H a multiple of G.
        k: (G, T, d), of at most WIDEST bytes each.
        v: (G, T, e), likewise.
        heads: (n, 4) int32: which key head; its window; where its keys begin in `kept`; its biases in a row.
        sinks: tokens at the beginning that are kept, without bias, if `kept` is None.
        kept: see there.
        scale: of products.
        step: queries whose windows begin at the same token; a power of two, at least 64.
        out: (T, H, e), contiguous, of which these heads are written.
    """
    (count, tokens, width), (groups, _, value_width) = q.shape, v.shape
    q, k, v = (x if x.stride(2) == 1 else x.contiguous() for x in (q, k, v))
    sizes = max(16, triton.next_power_of_2(width)), max(16, triton.next_power_of_2(value_width))
    wide = max(sizes) * k.element_size() > WIDE
    _attend_windows[len(heads) * count // groups, triton.cdiv(tokens, step)](
        q,
        k,
        v,
        out,
        heads,
        *((k, v, heads, k) if kept is None else kept),
        tokens,
        sinks,
        0 if kept is None else kept.bias.shape[1],
        count,
        count // groups,
        width,
        value_width,
        q.stride(0),
        q.stride(1),
        k.stride(0),
        k.stride(1),
        v.stride(0),
        v.stride(1),
        scale * LOG2E.value,
        STEP=step,
        TILE=32 if wide else 64,
        WIDTH=sizes[0],
        VALUE=sizes[1],
        EVEN=sizes == (width, value_width),
        KEPT=kept is not None,
        num_warps=8,
        num_stages=2 if wide else 3,
    )
