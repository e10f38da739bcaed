"""One token's attention on the GPU (Triton): `ops.attention.attend`, with a cache that is found on the device.

The address of every layer's keys and values is data, in a small table, and so is the position. The launch is therefore
the same for every token of every sequence, and a CUDA graph that contains it outlives the cache it was recorded with.

A program takes one query head and every SPLITS-th block of keys. It leaves its maximum, sum and mixed values in a
scratch; the program that is through last adds up the parts of its head. Heads that share keys read them again, from
the cache of the GPU.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from rankgate import ops
from rankgate.ops.overlap_gpu import begin

PROGRAMS = 256  # about two for each multiprocessor of a large GPU
BLOCK = 128  # keys read together
HEADS = 1024  # at most


def table(buffers: list[Tensor]) -> Tensor:
    """What `attend` knows of a cache: (3 layers + HEADS,) int64 on its device.

    For each layer the address of the keys, that of the values, and the capacity; then counters for the heads of one
    layer, zero between launches.
    buffers: keys and values of every layer, alternating: (1, G, capacity, width), contiguous.
    """
    pairs = zip(buffers[::2], buffers[1::2], strict=True)
    fields = [field for k, v in pairs for field in (k.data_ptr(), v.data_ptr(), k.shape[2])]
    return torch.tensor(fields + [0] * HEADS, device=buffers[0].device)


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
    share,
    width,
    value_width,
    scale,
    WIDTH: tl.constexpr,
    VALUE: tl.constexpr,
    BLOCK: tl.constexpr,
    SPLITS: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    begin(OVERLAP)
    head, split, last = tl.program_id(0), tl.program_id(1), tl.load(position)
    active = tl.minimum(SPLITS, last // BLOCK + 1)
    if split >= active:
        return
    g, i, e = head // share, tl.arange(0, WIDTH), tl.arange(0, VALUE)
    keys = tl.multiple_of(tl.load(cache).to(k.dtype), 16)
    values = tl.multiple_of(tl.load(cache + 1).to(v.dtype), 16)
    start, inside, value_inside = g * tl.load(cache + 2), i < width, e < value_width
    query = tl.load(q + head * width + i, mask=inside, other=0.0).to(tl.float32)
    new_key = tl.load(k + g * width + i, mask=inside, other=0.0)
    new_value = tl.load(v + g * value_width + e, mask=value_inside, other=0.0)
    if split == 0 and head % share == 0:
        tl.store(keys + (start + last) * width + i, new_key, mask=inside)
        tl.store(values + (start + last) * value_width + e, new_value, mask=value_inside)
    top, total, mixed = -float("inf"), 0.0, tl.zeros((VALUE,), tl.float32)
    for first in range(split * BLOCK, last + 1, SPLITS * BLOCK):
        t = first + tl.arange(0, BLOCK)
        old, new = (t < last)[:, None], (t == last)[:, None]  # what is new may not be stored yet
        key = tl.load(keys + (start + t)[:, None] * width + i, mask=old & inside, other=0.0)
        value = tl.load(values + (start + t)[:, None] * value_width + e, mask=old & value_inside, other=0.0)
        key = tl.where(new, new_key[None, :], key).to(tl.float32)
        value = tl.where(new, new_value[None, :], value).to(tl.float32)
        score = tl.where(t <= last, tl.sum(key * query[None, :], 1) * scale, -float("inf"))
        higher = tl.maximum(top, tl.max(score, 0))
        weight, shrink = tl.exp(score - higher), tl.exp(top - higher)
        total = total * shrink + tl.sum(weight, 0)
        mixed = mixed * shrink + tl.sum(weight[:, None] * value, 0)
        top = higher
    if active == 1:
        tl.store(out + head * value_width + e, (mixed / total).to(out.dtype.element_ty), mask=value_inside)
    else:
        at = head * SPLITS + split
        tl.store(parts + at * VALUE + e, mixed)
        tl.store(sums + 2 * at, top)
        tl.store(sums + 2 * at + 1, total)
        tl.debug_barrier()
        if tl.atomic_add(counters + head, 1, sem="acq_rel") == active - 1:
            tl.store(counters + head, 0)
            s = tl.arange(0, SPLITS)
            known, every = s < active, head * SPLITS + s
            tops = tl.load(sums + 2 * every, mask=known, other=-float("inf"), cache_modifier=".cg")
            weights = tl.exp(tops - tl.max(tops, 0))
            whole = tl.sum(weights * tl.load(sums + 2 * every + 1, mask=known, other=0.0, cache_modifier=".cg"), 0)
            part = tl.load(parts + every[:, None] * VALUE + e, mask=known[:, None], other=0.0, cache_modifier=".cg")
            y = tl.sum(weights[:, None] * part, 0) / whole
            tl.store(out + head * value_width + e, y.to(out.dtype.element_ty), mask=value_inside)


def attend(q: Tensor, k: Tensor, v: Tensor, cache: Tensor, layer: int, position: Tensor, scale: float) -> Tensor:
    """Store one token's key and value in `layer` at `position`, and attend to positions 0 … `position`.

    Args:
        q: (1, H, 1, d), with H a multiple of G.
        k: (1, G, 1, d).
        v: (1, G, 1, e).
        cache: see `table`. Its keys and values have the dtypes of k and v.
        layer: which of its layers.
        position: (1, 1) int64, below the capacity. Not checked here: the decode loop owns it.
        scale: s.

    Returns (1, 1, H, e). Raises ValueError for more than 1,024 heads.
    """
    (_, heads, _, width), (_, groups, _, value_width) = q.shape, v.shape
    if heads > HEADS:
        raise ValueError(f"{heads} heads are more than {HEADS}")
    splits = min(64, triton.next_power_of_2(triton.cdiv(PROGRAMS, heads)))
    overlap = ops.overlaps(q.device)
    VALUE = triton.next_power_of_2(value_width)
    out = q.new_empty((1, 1, heads, value_width))
    parts = q.new_empty(heads * splits * VALUE, dtype=torch.float32)
    sums = q.new_empty(heads * splits * 2, dtype=torch.float32)
    _attend[heads, splits](
        q.contiguous(),
        k.contiguous(),
        v.contiguous(),
        cache[3 * layer :],
        cache[-HEADS:],
        position,
        out,
        parts,
        sums,
        heads // groups,
        width,
        value_width,
        scale,
        WIDTH=triton.next_power_of_2(width),
        VALUE=VALUE,
        BLOCK=BLOCK,
        SPLITS=splits,
        OVERLAP=overlap,
        launch_pdl=overlap,
        num_warps=8,
    )
    return out
