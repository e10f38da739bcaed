"""Attention of new tokens, mostly one, over a preallocated cache, on the CPU.

    out_h = Σ_t softmax_t(s q_h · k_t) v_t,    t = 0 … p,    h = 0 … H − 1

Query heads share key heads in groups of H / G. The op also stores the new key and value at position p, so that a
traced decode step has one node per layer, whose shapes do not depend on p: p is read from a tensor.

One thread, every key and value read once per group of query heads, float32 accumulation. Not covered: masks, windows,
soft caps, sinks; and, but for the definition, more than one new token.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from numba import carray, njit, types
from numba.extending import intrinsic
from torch import Tensor
from torch.nn import functional as F

# sums in any order, but a value that is not finite stays one
FAST: dict[str, Any] = {
    "cache": True,
    "nogil": True,
    "error_model": "numpy",
    "fastmath": {"reassoc", "contract", "nsz", "arcp", "afn"},
}


def _pointer_to(kind: Any) -> Any:
    @intrinsic
    def pointer(_: Any, address: Any) -> Any:
        """The integer address as a pointer."""

        def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            return builder.inttoptr(arguments[0], context.get_value_type(signature.return_type))

        return types.CPointer(kind)(address), codegen

    return pointer


float_pointer, _halves, _integers = (_pointer_to(kind) for kind in (types.float32, types.uint16, types.int64))


@njit(inline="always", **FAST)
def _widen(address: int, rows: int, width: int, half: bool, row: int, out: Any) -> None:
    """Row `row` of a (rows × width) array of bfloat16 (`half`) or float32, as float32."""
    if half:
        source, words = carray(_halves(address), (rows, width)), out.view(np.uint32)
        for i in range(width):
            words[i] = np.uint32(source[row, i]) << np.uint32(16)
    else:
        source32 = carray(float_pointer(address), (rows, width))
        for i in range(width):
            out[i] = source32[row, i]


@njit(**FAST)
def _store(address: int, rows: int, width: int, half: bool, row: int, new: int, new_row: int) -> None:
    """Row `new_row` of the array at `new`, of the same type, into row `row`."""
    if half:
        carray(_halves(address), (rows, width))[row] = carray(_halves(new), (new_row + 1, width))[new_row]
    else:
        carray(float_pointer(address), (rows, width))[row] = carray(float_pointer(new), (new_row + 1, width))[new_row]


@njit(**FAST)
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
    last = carray(_integers(position), 1)[0]
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


def attend_reference(
    q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, position: Tensor, scale: float
) -> Tensor:
    """The definition; also the path of dtypes, devices and numbers of tokens without a kernel."""
    at = position.flatten()
    keys.index_copy_(2, at, k)
    values.index_copy_(2, at, v)
    end = int(at[-1]) + 1
    seen = torch.arange(end, device=at.device) <= at[:, None]
    known = keys[:, :, :end], values[:, :, :end]
    out = F.scaled_dot_product_attention(q, *known, attn_mask=seen, scale=scale, enable_gqa=True)
    return out.transpose(1, 2).contiguous()


def attend(q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, position: Tensor, scale: float) -> Tensor:
    """Store the keys and values of T tokens at their positions; each attends to all positions up to its own.

    Args:
        q: (1, H, T, d), with H a multiple of G.
        k: (1, G, T, d).
        v: (1, G, T, e).
        keys: (1, G, capacity, d), contiguous; written in place.
        values: (1, G, capacity, e), contiguous; written in place.
        position: (1, T) int64, ascending, below the capacity. Not checked here: the decode loop owns it.
        scale: s.

    Returns (1, T, H, e).
    """
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


torch.library.define(
    "rankgate::attend",
    "(Tensor q, Tensor k, Tensor v, Tensor(a!) keys, Tensor(b!) values, Tensor position, float scale) -> Tensor",
)
torch.library.impl("rankgate::attend", "default", attend)
