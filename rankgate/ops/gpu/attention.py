"""Attention of new tokens on the GPU (Triton): `ops.attention`, with a cache that is found on the device.

The address of every layer's keys and values is data, in a small table, and so is the position. The launch is therefore
the same for every step of whatever sequences, and a CUDA graph that has it outlives the cache it was recorded with.

A program takes the query heads that share a key head of one sequence, one token and every SPLITS-th block of keys: of
the cache, or of what the key head holds (`attend_held`), its kept rows and then its ring. It leaves the maximum, sum
and mixed values of each query head in a scratch; the program that is through last adds up the parts. Products are
those of tensor cores; weights enter them as two numbers, so that their rounding does not show.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from rankgate.ops import attention
from rankgate.ops.gpu.dots import dot
from rankgate.ops.gpu.overlap import begin, overlaps

PROGRAMS = 256  # about two for each multiprocessor of a large GPU
TILE = 16 << 10  # bytes of keys, and of values, read together
NEW = tl.constexpr(16)  # new ones
SPLITS = 64  # programs for a key head, at most; so many where some heads hold much more than others
COUNTERS = 4096  # heads times new tokens, at most


def table(buffers: list[Tensor]) -> Tensor:
    """What `attend` and `attend_held` know of a cache: (3 or 4 layers + COUNTERS,) int64 on its device.

    For each layer the address of the keys, that of the values, and the capacity, or the addresses of all that its heads
    hold; then counters for the heads and new tokens of one layer, zero between launches.
    buffers: keys and values of every layer, alternating: (B, G, capacity, width), contiguous; or keys, values, biases
    and rows of what the heads of every layer hold, see `ops.attention.attend_held`.
    """
    if buffers[0].ndim == 2:
        fields = [buffer.data_ptr() for buffer in buffers]
    else:
        pairs = zip(buffers[::2], buffers[1::2], strict=True)
        fields = [field for k, v in pairs for field in (k.data_ptr(), v.data_ptr(), k.shape[2])]
    return torch.tensor(fields + [0] * COUNTERS, device=buffers[0].device)


@triton.jit
def _times(weight, value):
    """weight @ value, with weights in about twice the bits of the values."""
    if value.dtype == tl.float32:
        out = dot(weight, value, None, "ieee")
    else:
        high = weight.to(value.dtype)
        out = dot((weight - high.to(tl.float32)).to(value.dtype), value, dot(high, value, None, "ieee"), "ieee")
    return out


@triton.jit
def _more(top, total, mixed, query, key, value, bias, within, scale, cap, CAP: tl.constexpr, BIAS: tl.constexpr):
    """The softmax so far (largest score, sum, weighted values), and some keys and values more."""
    score = dot(query, tl.trans(key), None, "ieee") * scale
    if BIAS:
        score += bias[None, :]
    if CAP:
        score = cap * (2 * tl.sigmoid(2 * score / cap) - 1)
    score = tl.where(within[None, :], score, -float("inf"))
    higher = tl.maximum(tl.maximum(top, tl.max(score, 1)), -1e30)  # which a part without keys does not reach
    weight, shrink = tl.exp(score - higher[:, None]), tl.exp(top - higher)
    return higher, total * shrink + tl.sum(weight, 1), mixed * shrink[:, None] + _times(weight, value)


@triton.jit
def _attend(
    q,
    k,
    v,
    cache,
    counters,
    position,
    out,
    parts,
    sums,
    groups,
    scale,
    window,
    cap,
    sinks,
    width: tl.constexpr,
    value_width: tl.constexpr,
    SHARE: tl.constexpr,
    LINES: tl.constexpr,
    WIDTH: tl.constexpr,
    VALUE: tl.constexpr,
    BLOCK: tl.constexpr,
    SPLITS: tl.constexpr,
    STEP: tl.constexpr,
    WINDOW: tl.constexpr,
    CAP: tl.constexpr,
    SINKS: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    begin(OVERLAP)
    group, split, token, tokens = tl.program_id(0), tl.program_id(1), tl.program_id(2), tl.num_programs(2)
    sequence, g = group // groups, group % groups
    first = tl.load(position + sequence * tokens)
    last = first + token
    keys = tl.multiple_of(tl.load(cache).to(k.dtype), 16)
    values = tl.multiple_of(tl.load(cache + 1).to(v.dtype), 16)
    if STEP:
        rows = tl.load(cache + 3).to(cache.dtype) + 6 * g
        start, kept, ring, length = tl.load(rows), tl.load(rows + 1), tl.load(rows + 2), tl.load(rows + 3)
        earliest = tl.maximum(tl.load(rows + 5), last // STEP * STEP - tl.load(rows + 4))
        bias, turn = tl.load(cache + 2).to(parts.dtype), earliest // length * length
    else:
        start, kept, length = last * 0, last * 0, tl.load(cache + 2)
        ring, earliest = group * length, tl.maximum(last + 1 - window, 0) if WINDOW else last * 0
    early, begin_block = tl.cdiv(kept, BLOCK), earliest // BLOCK
    blocks = early + tl.maximum(tl.cdiv(first, BLOCK) - begin_block, 0)  # of what is stored already
    active = tl.maximum(tl.minimum(SPLITS, blocks), 1).to(tl.int32)
    if split >= active:
        return
    line, i, e = tl.arange(0, LINES), tl.arange(0, WIDTH), tl.arange(0, VALUE)
    inside, value_inside = i < width, e < value_width
    head = group * SHARE + line
    query_at = q + (head[:, None] * tokens + token) * width + i
    query = tl.load(query_at, mask=(line[:, None] < SHARE) & inside, other=0.0).to(k.dtype.element_ty)
    top, total = tl.full((LINES,), -float("inf"), tl.float32), tl.zeros((LINES,), tl.float32)
    mixed = tl.zeros((LINES, VALUE), tl.float32)
    for block in range(split, blocks, SPLITS):
        t = (begin_block + block - early) * BLOCK + tl.arange(0, BLOCK)
        within, row, more = (t >= earliest) & (t < first), ring + t, 0.0
        if STEP:
            place = tl.where(block < early, block * BLOCK + tl.arange(0, BLOCK), kept)
            row = tl.where(t - turn < length, row - turn, row - turn - length)  # t mod length
            row = tl.where(block < early, start + place, row)
            within = tl.where(block < early, place < kept, within)
            more = tl.load(bias + row, mask=place < kept, other=0.0)
        seen = within[:, None]
        key = tl.load(keys + row[:, None] * width + i, mask=seen & inside, other=0.0)
        value = tl.load(values + row[:, None] * value_width + e, mask=seen & value_inside, other=0.0)
        top, total, mixed = _more(top, total, mixed, query, key, value, more, within, scale, cap, CAP, STEP > 0)
    if split == 0:  # what is new may not be stored yet
        for at in range(0, token + 1, NEW):
            new = at + tl.arange(0, NEW)
            within, row = (new <= token) & (first + new >= earliest), group * tokens + new
            seen = within[:, None]
            key = tl.load(k + row[:, None] * width + i, mask=seen & inside, other=0.0)
            value = tl.load(v + row[:, None] * value_width + e, mask=seen & value_inside, other=0.0)
            top, total, mixed = _more(top, total, mixed, query, key, value, 0.0, within, scale, cap, CAP, False)
        own, at_row = group * tokens + token, ring + (last % length if STEP else last)
        own_key = tl.load(k + own * width + i, mask=inside, other=0.0)
        own_value = tl.load(v + own * value_width + e, mask=value_inside, other=0.0)
        tl.store(keys + at_row * width + i, own_key, mask=inside)
        tl.store(values + at_row * value_width + e, own_value, mask=value_inside)
    if SINKS and split == 0:
        sink = tl.load(sinks + g * SHARE + line, mask=line < SHARE, other=0.0)
        higher = tl.maximum(top, sink)
        shrink = tl.exp(top - higher)
        total, mixed, top = total * shrink + tl.exp(sink - higher), mixed * shrink[:, None], higher
    places = ((sequence * tokens + token) * groups + g) * SHARE
    each = (places + line)[:, None]
    if active == 1:
        y = (mixed / total[:, None]).to(out.dtype.element_ty)
        tl.store(out + each * value_width + e, y, mask=(line[:, None] < SHARE) & value_inside)
    else:
        own = (places + line) * SPLITS + split
        tl.store(parts + own[:, None] * VALUE + e, mixed, mask=line[:, None] < SHARE)
        tl.store(sums + 2 * own, top, mask=line < SHARE)
        tl.store(sums + 2 * own + 1, total, mask=line < SHARE)
        tl.debug_barrier()
        if tl.atomic_add(counters + places // SHARE, 1, sem="acq_rel") == active - 1:
            tl.store(counters + places // SHARE, 0)
            found = tl.arange(0, SPLITS)
            for one in range(SHARE):
                every, known = (places + one) * SPLITS + found, found < active
                tops = tl.load(sums + 2 * every, mask=known, other=-float("inf"), cache_modifier=".cg")
                weights = tl.exp(tops - tl.max(tops, 0))
                whole = tl.sum(weights * tl.load(sums + 2 * every + 1, mask=known, other=0.0, cache_modifier=".cg"), 0)
                part = tl.load(parts + every[:, None] * VALUE + e, mask=known[:, None], other=0.0, cache_modifier=".cg")
                y = (tl.sum(weights[:, None] * part, 0) / whole).to(out.dtype.element_ty)
                tl.store(out + (places + one) * value_width + e, y, mask=value_inside)


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cache: Tensor,
    layer: int,
    position: Tensor,
    scale: float,
    window: int = 0,
    cap: float = 0.0,
    sinks: Tensor | None = None,
) -> Tensor:
    """Store the keys and values of T tokens in `layer`; each attends to all positions up to its own, or its window.

    Args:
        q: (B, H, T, d), with H a multiple of G.
        k: (B, G, T, d).
        v: (B, G, T, e).
        cache: see `table`. Its keys and values have the dtypes of k and v.
        layer: which of its layers.
        position: (B, T) int64, one after the other, below the capacity. Not checked: the decode loop owns it.
        scale: s.
        window: w, 0 for none.
        cap: c, 0 for none.
        sinks: z, (H,) float32.

    Returns (B, T, H, e). Raises ValueError if B G T is more than 4,096.
    """
    return _launch(q, k, v, cache[3 * layer :], cache, position, scale, window, cap, sinks, 0)


def attend_held(q: Tensor, k: Tensor, v: Tensor, cache: Tensor, layer: int, position: Tensor, scale: float) -> Tensor:
    """`ops.attention.attend_held`, with what the heads of `layer` hold found through `cache`.

    Args:
        q: (1, H, T, d), with H a multiple of G.
        k: (1, G, T, d).
        v: (1, G, T, e).
        cache: see `table`.
        layer: which of its layers.
        position: (1, T) int64, one after the other, of the same step of the windows.
        scale: s.

    Returns (1, T, H, e).
    """
    return _launch(q, k, v, cache[4 * layer :], cache, position, scale, 0, 0.0, None, attention.STEP)


def _launch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layer: Tensor,
    cache: Tensor,
    position: Tensor,
    scale: float,
    window: int,
    cap: float,
    sinks: Tensor | None,
    step: int,
) -> Tensor:
    (sequences, heads, tokens, width), (_, groups, _, value_width) = q.shape, v.shape
    if sequences * groups * tokens > COUNTERS:
        raise ValueError(f"{groups} key heads for {sequences * tokens} tokens are more than {COUNTERS}")
    splits = SPLITS if step else min(SPLITS, triton.next_power_of_2(triton.cdiv(PROGRAMS, sequences * groups)))
    overlap = overlaps(q.device)
    WIDTH, VALUE = (max(16, triton.next_power_of_2(w)) for w in (width, value_width))
    out = q.new_empty((sequences, tokens, heads, value_width))
    parts = q.new_empty(sequences * heads * tokens * splits * VALUE, dtype=torch.float32)
    sums = q.new_empty(sequences * heads * tokens * splits * 2, dtype=torch.float32)
    _attend[sequences * groups, splits, tokens](
        q.contiguous(),
        k.contiguous(),
        v.contiguous(),
        layer,
        cache[-COUNTERS:],
        position,
        out,
        parts,
        sums,
        groups,
        scale,
        window,
        cap,
        q if sinks is None else sinks,
        width=width,
        value_width=value_width,
        SHARE=heads // groups,
        LINES=max(16, triton.next_power_of_2(heads // groups)),
        WIDTH=WIDTH,
        VALUE=VALUE,
        BLOCK=min(128, max(16, TILE // (max(WIDTH, VALUE) * k.element_size()))),
        SPLITS=splits,
        STEP=step,
        WINDOW=window > 0,
        CAP=cap > 0,
        SINKS=sinks is not None,
        OVERLAP=overlap,
        launch_pdl=overlap,
        num_warps=8,
    )
    return out
