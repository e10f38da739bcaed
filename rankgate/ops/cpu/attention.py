"""`ops.attention` of one token on the CPU (Numba).

One thread, every key and value read once per group of query heads, float32 accumulation.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from numba import carray
from torch import Tensor

from rankgate.ops.attention import attend_reference
from rankgate.ops.cpu.compile import jit
from rankgate.ops.cpu.vector import float_pointer, half_pointer, integer_pointer


@jit(inline="always")
def _widen(address: int, rows: int, width: int, half: bool, row: int, out: Any) -> None:
    """Row `row` of a (rows × width) array of bfloat16 (`half`) or float32, as float32."""
    if half:
        source, words = carray(half_pointer(address), (rows, width)), out.view(np.uint32)
        for i in range(width):
            words[i] = np.uint32(source[row, i]) << np.uint32(16)
    else:
        source32 = carray(float_pointer(address), (rows, width))
        for i in range(width):
            out[i] = source32[row, i]


@jit
def _store(address: int, rows: int, width: int, half: bool, row: int, new: int, new_row: int) -> None:
    """Row `new_row` of the array at `new`, of the same type, into row `row`."""
    if half:
        carray(half_pointer(address), (rows, width))[row] = carray(half_pointer(new), (new_row + 1, width))[new_row]
    else:
        carray(float_pointer(address), (rows, width))[row] = carray(float_pointer(new), (new_row + 1, width))[new_row]


@jit
def _attend(
    q: int,
    k: int,
    v: int,
    keys: int,
    values: int,
    position: int,
    out: int,
    half: bool,
    heads: int,
    groups: int,
    capacity: int,
    width: int,
    value_width: int,
    scale: float,
) -> None:
    """All pointers are addresses; q (heads × width) and out (heads × value_width) are float32."""
    last = carray(integer_pointer(position), 1)[0]
    queries, outputs = carray(float_pointer(q), (heads, width)), carray(float_pointer(out), (heads, value_width))
    share = heads // groups
    scores = np.empty((share, last + 1), np.float32)
    key, value = np.empty(width, np.float32), np.empty(value_width, np.float32)
    for g in range(groups):
        _store(keys, groups * capacity, width, half, g * capacity + last, k, g)
        _store(values, groups * capacity, value_width, half, g * capacity + last, v, g)
        for t in range(last + 1):
            _widen(keys, groups * capacity, width, half, g * capacity + t, key)
            for h in range(share):
                dot = np.float32(0)
                for i in range(width):
                    dot += queries[g * share + h, i] * key[i]
                scores[h, t] = dot * scale
        for h in range(share):
            top = scores[h].max()
            total = np.float32(0)
            for t in range(last + 1):
                scores[h, t] = math.exp(scores[h, t] - top)
                total += scores[h, t]
            for t in range(last + 1):
                scores[h, t] /= total
            outputs[g * share + h, :] = 0
        for t in range(last + 1):
            _widen(values, groups * capacity, value_width, half, g * capacity + t, value)
            for h in range(share):
                weight = scores[h, t]
                for i in range(value_width):
                    outputs[g * share + h, i] += weight * value[i]


def attend(q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, position: Tensor, scale: float) -> Tensor:
    """`ops.attention.attend_reference`; what this kernel does not take is computed by that."""
    half = keys.dtype == torch.bfloat16
    if not (half or keys.dtype == torch.float32) or keys.device.type != "cpu" or q.shape[2] > 1:
        return attend_reference(q, k, v, keys, values, position, scale)
    _, groups, capacity, width = keys.shape
    heads, value_width = q.shape[1], values.shape[3]
    query, k, v = q.float().contiguous(), k.contiguous(), v.contiguous()
    out = torch.empty((1, 1, heads, value_width))
    _attend(
        query.data_ptr(),
        k.data_ptr(),
        v.data_ptr(),
        keys.data_ptr(),
        values.data_ptr(),
        position.data_ptr(),
        out.data_ptr(),
        half,
        heads,
        groups,
        capacity,
        width,
        value_width,
        scale,
    )
    return out.to(q.dtype)
