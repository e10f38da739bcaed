"""One token's attention on the GPU (Triton): `ops.attention.attend`, with a cache that is found on the device.

The address of every layer's keys and values is data, in a small table, and so is the position. The launch is therefore
the same for every token of every sequence, and a CUDA graph that contains it outlives the cache it was recorded with.

A program takes one head of keys, the query heads that share it, and every SPLITS-th block of keys. It leaves its
running maximum, sum and mixed values in a scratch; the program that is through last adds up the parts of its head.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

PROGRAMS = 256  # about two for each multiprocessor of a large GPU
FIELDS = 3  # of a layer in the table, before one counter per head of keys


def table(buffers: list[Tensor]) -> Tensor:
    """What `attend` knows of a cache: (layers, 3 + G) int64 on its device.

    A row: address of the keys, address of the values, capacity, and G counters that are zero between launches.
    buffers: keys and values of every layer, alternating: (1, G, capacity, width), contiguous.
    """
    pairs = zip(buffers[::2], buffers[1::2], strict=True)
    rows = [[k.data_ptr(), v.data_ptr(), k.shape[2]] + [0] * k.shape[1] for k, v in pairs]
    return torch.tensor(rows, device=buffers[0].device)


@triton.jit
def _attend(
    q,
    k,
    v,
    cache,
    position,
    out,
    parts,
    sums,
    share,
    width,
    value_width,
    scale,
    SHARE: tl.constexpr,
    WIDTH: tl.constexpr,
    VALUE: tl.constexpr,
    BLOCK: tl.constexpr,
    SPLITS: tl.constexpr,
):
    g, split = tl.program_id(0), tl.program_id(1)
    keys = tl.multiple_of(tl.load(cache).to(k.dtype), 16)
    values = tl.multiple_of(tl.load(cache + 1).to(v.dtype), 16)
    start, last = g * tl.load(cache + 2), tl.load(position)
    h, i, e = tl.arange(0, SHARE), tl.arange(0, WIDTH), tl.arange(0, VALUE)
    head = g * share + h
    query = tl.load(q + head[:, None] * width + i, mask=(h < share)[:, None] & (i < width), other=0.0).to(tl.float32)
    new_key = tl.load(k + g * width + i, mask=i < width, other=0.0)
    new_value = tl.load(v + g * value_width + e, mask=e < value_width, other=0.0)
    if split == 0:
        tl.store(keys + (start + last) * width + i, new_key, mask=i < width)
        tl.store(values + (start + last) * value_width + e, new_value, mask=e < value_width)
    top = tl.full((SHARE,), -1e30, tl.float32)  # of a program without keys, too: infinities would make NaN
    total = tl.zeros((SHARE,), tl.float32)
    mixed = tl.zeros((SHARE, VALUE), tl.float32)
    for first in range(split * BLOCK, last + 1, SPLITS * BLOCK):
        t = first + tl.arange(0, BLOCK)
        old, new = (t < last)[:, None], (t == last)[:, None]  # what is new may not be stored yet
        key = tl.load(keys + (start + t)[:, None] * width + i, mask=old & (i < width), other=0.0)
        value = tl.load(values + (start + t)[:, None] * value_width + e, mask=old & (e < value_width), other=0.0)
        key = tl.where(new, new_key[None, :], key).to(tl.float32)
        value = tl.where(new, new_value[None, :], value).to(tl.float32)
        score = tl.sum(query[:, None, :] * key[None], 2) * scale  # (SHARE, BLOCK)
        score = tl.where((t <= last)[None, :], score, -1e30)
        higher = tl.maximum(top, tl.max(score, 1))
        weight = tl.where((t <= last)[None, :], tl.exp(score - higher[:, None]), 0.0)
        shrink = tl.exp(top - higher)
        total = total * shrink + tl.sum(weight, 1)
        mixed = mixed * shrink[:, None] + tl.sum(weight[:, :, None] * value[None], 1)
        top = higher
    at = (g * SPLITS + split) * SHARE + h
    tl.store(parts + at[:, None] * VALUE + e, mixed)
    tl.store(sums + 2 * at, top)
    tl.store(sums + 2 * at + 1, total)
    tl.debug_barrier()
    if tl.atomic_add(cache + 3 + g, 1, sem="acq_rel") == SPLITS - 1:
        tl.store(cache + 3 + g, 0)
        every = (g * SPLITS + tl.arange(0, SPLITS)[:, None]) * SHARE + h  # (SPLITS, SHARE)
        tops = tl.load(sums + 2 * every, cache_modifier=".cg")
        weight = tl.exp(tops - tl.max(tops, 0)[None, :])
        total = tl.sum(weight * tl.load(sums + 2 * every + 1, cache_modifier=".cg"), 0)
        part = tl.load(parts + every[:, :, None] * VALUE + e, cache_modifier=".cg")
        y = tl.sum(weight[:, :, None] * part, 0) / total[:, None]
        inside = (h < share)[:, None] & (e < value_width)
        tl.store(out + head[:, None] * value_width + e, y.to(out.dtype.element_ty), mask=inside)


def attend(q: Tensor, k: Tensor, v: Tensor, cache: Tensor, layer: int, position: Tensor, scale: float) -> Tensor:
    """Store one token's key and value in `layer` at `position`, and attend to positions 0 … `position`.

    Args:
        q: (1, H, 1, d), with H a multiple of G.
        k: (1, G, 1, d).
        v: (1, G, 1, e).
        cache: see `table`. The keys and values have the dtypes of k and v.
        layer: its row in `cache`.
        position: (1, 1) int64, below the capacity. Not checked here: the decode loop owns it.
        scale: s.

    Returns (1, 1, H, e).
    """
    (_, heads, _, width), (_, groups, _, value_width) = q.shape, v.shape
    share = heads // groups
    SHARE, VALUE = triton.next_power_of_2(share), triton.next_power_of_2(value_width)
    splits = min(64, triton.next_power_of_2(triton.cdiv(PROGRAMS, groups)))
    out = q.new_empty((1, 1, heads, value_width))
    parts = q.new_empty(groups * splits * SHARE * VALUE, dtype=torch.float32)
    sums = q.new_empty(groups * splits * SHARE * 2, dtype=torch.float32)
    _attend[groups, splits](
        q.contiguous(),
        k.contiguous(),
        v.contiguous(),
        cache[layer],
        position,
        out,
        parts,
        sums,
        share,
        width,
        value_width,
        scale,
        SHARE=SHARE,
        WIDTH=triton.next_power_of_2(width),
        VALUE=VALUE,
        BLOCK=max(16, 64 // SHARE),
        SPLITS=splits,
    )
    return out
