"""Attention of new tokens on the GPU (Triton): `ops.attention`, with a cache that is found on the device.

The address of every layer's keys and values is data, in a small table, and so is the position. The launch is therefore
the same for every step of whatever sequences, and a CUDA graph that has it outlives the cache it was recorded with.

A program takes one query head of one sequence, one token and every SPLITS-th block of keys. It leaves its maximum, sum
and mixed values in a scratch; the program that is through last adds up the parts of its head and token. Heads that
share keys, and tokens, read them again, from the cache of the GPU.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from rankgate.ops.gpu.overlap import begin, overlaps

PROGRAMS = 256  # about two for each multiprocessor of a large GPU
BLOCK = 128  # keys read together
COUNTERS = 4096  # heads times new tokens, at most


def table(buffers: list[Tensor]) -> Tensor:
    """What `attend` knows of a cache: (3 layers + COUNTERS,) int64 on its device.

    For each layer the address of the keys, that of the values, and the capacity; then counters for the heads and new
    tokens of one layer, zero between launches.
    buffers: keys and values of every layer, alternating: (B, G, capacity, width), contiguous.
    """
    pairs = zip(buffers[::2], buffers[1::2], strict=True)
    fields = [field for k, v in pairs for field in (k.data_ptr(), v.data_ptr(), k.shape[2])]
    return torch.tensor(fields + [0] * COUNTERS, device=buffers[0].device)


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
    heads,
    share,
    width,
    value_width,
    scale,
    window,
    cap,
    sinks,
    WIDTH: tl.constexpr,
    VALUE: tl.constexpr,
    BLOCK: tl.constexpr,
    SPLITS: tl.constexpr,
    WINDOW: tl.constexpr,
    CAP: tl.constexpr,
    SINKS: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    begin(OVERLAP)
    head, split, token, tokens = tl.program_id(0), tl.program_id(1), tl.program_id(2), tl.num_programs(2)
    sequence = head // heads
    first = tl.load(position + sequence * tokens)
    last = first + token
    earliest = tl.maximum(last + 1 - window, 0) if WINDOW else last * 0
    begin_block = earliest // BLOCK
    active = tl.minimum(SPLITS, last // BLOCK + 1 - begin_block)
    if split >= active:
        return
    g, i, e = head // share, tl.arange(0, WIDTH), tl.arange(0, VALUE)
    keys = tl.multiple_of(tl.load(cache).to(k.dtype), 16)
    values = tl.multiple_of(tl.load(cache + 1).to(v.dtype), 16)
    start, inside, value_inside = g * tl.load(cache + 2), i < width, e < value_width
    query = tl.load(q + (head * tokens + token) * width + i, mask=inside, other=0.0).to(tl.float32)
    new_keys, new_values = k + g * tokens * width, v + g * tokens * value_width
    if split == 0 and head % share == 0:
        own_key = tl.load(new_keys + token * width + i, mask=inside, other=0.0)
        own_value = tl.load(new_values + token * value_width + e, mask=value_inside, other=0.0)
        tl.store(keys + (start + last) * width + i, own_key, mask=inside)
        tl.store(values + (start + last) * value_width + e, own_value, mask=value_inside)
    top, total, mixed = -float("inf"), 0.0, tl.zeros((VALUE,), tl.float32)
    for at in range((begin_block + split) * BLOCK, last + 1, SPLITS * BLOCK):
        t = at + tl.arange(0, BLOCK)
        within = (t >= earliest) & (t <= last)
        old, seen = t < first, within[:, None]  # what is new may not be stored yet
        key_rows = tl.where(old, keys + (start + t) * width, new_keys + (t - first) * width)
        value_rows = tl.where(old, values + (start + t) * value_width, new_values + (t - first) * value_width)
        key = tl.load(key_rows[:, None] + i, mask=seen & inside, other=0.0).to(tl.float32)
        value = tl.load(value_rows[:, None] + e, mask=seen & value_inside, other=0.0).to(tl.float32)
        score = tl.sum(key * query[None, :], 1) * scale
        if CAP:
            score = cap * (2 * tl.sigmoid(2 * score / cap) - 1)
        score = tl.where(within, score, -float("inf"))
        higher = tl.maximum(top, tl.max(score, 0))
        weight, shrink = tl.exp(score - higher), tl.exp(top - higher)
        total = total * shrink + tl.sum(weight, 0)
        mixed = mixed * shrink + tl.sum(weight[:, None] * value, 0)
        top = higher
    if SINKS and split == 0:
        sink = tl.load(sinks + head % heads)
        higher = tl.maximum(top, sink)
        shrink = tl.exp(top - higher)
        total, mixed, top = total * shrink + tl.exp(sink - higher), mixed * shrink, higher
    place, line = (sequence * tokens + token) * heads + head % heads, tl.arange(0, SPLITS)
    if active == 1:
        tl.store(out + place * value_width + e, (mixed / total).to(out.dtype.element_ty), mask=value_inside)
    else:
        own, every = place * SPLITS + split, place * SPLITS + line
        tl.store(parts + own * VALUE + e, mixed)
        tl.store(sums + 2 * own, top)
        tl.store(sums + 2 * own + 1, total)
        tl.debug_barrier()
        if tl.atomic_add(counters + place, 1, sem="acq_rel") == active - 1:
            tl.store(counters + place, 0)
            known = line < active
            tops = tl.load(sums + 2 * every, mask=known, other=-float("inf"), cache_modifier=".cg")
            weights = tl.exp(tops - tl.max(tops, 0))
            whole = tl.sum(weights * tl.load(sums + 2 * every + 1, mask=known, other=0.0, cache_modifier=".cg"), 0)
            part = tl.load(parts + every[:, None] * VALUE + e, mask=known[:, None], other=0.0, cache_modifier=".cg")
            y = tl.sum(weights[:, None] * part, 0) / whole
            tl.store(out + place * value_width + e, y.to(out.dtype.element_ty), mask=value_inside)


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

    Returns (B, T, H, e). Raises ValueError if B H T is more than 4,096.
    """
    (sequences, heads, tokens, width), (_, groups, _, value_width) = q.shape, v.shape
    everything = sequences * heads * tokens
    if everything > COUNTERS:
        raise ValueError(f"{heads} heads for {sequences * tokens} tokens are more than {COUNTERS}")
    splits = min(64, triton.next_power_of_2(triton.cdiv(PROGRAMS, sequences * heads)))
    overlap = overlaps(q.device)
    VALUE = triton.next_power_of_2(value_width)
    out = q.new_empty((sequences, tokens, heads, value_width))
    parts = q.new_empty(everything * splits * VALUE, dtype=torch.float32)
    sums = q.new_empty(everything * splits * 2, dtype=torch.float32)
    _attend[sequences * heads, splits, tokens](
        q.contiguous(),
        k.contiguous(),
        v.contiguous(),
        cache[3 * layer :],
        cache[-COUNTERS:],
        position,
        out,
        parts,
        sums,
        heads,
        heads // groups,
        width,
        value_width,
        scale,
        window,
        cap,
        q if sinks is None else sinks,
        WIDTH=triton.next_power_of_2(width),
        VALUE=VALUE,
        BLOCK=BLOCK,
        SPLITS=splits,
        WINDOW=window > 0,
        CAP=cap > 0,
        SINKS=sinks is not None,
        OVERLAP=overlap,
        launch_pdl=overlap,
        num_warps=8,
    )
    return out
