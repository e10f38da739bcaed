"""`ops.attention` of one token on the CPU (Numba): scores and sums are products of a matrix and a vector (`dense`).

Heads are shared out to threads. Accumulation is in float32.
"""

from __future__ import annotations

import numpy as np
import torch
from numba import carray
from torch import Tensor

from rankgate.ops.attention import attend_reference
from rankgate.ops.cpu import team
from rankgate.ops.cpu.compile import Kernel, jit
from rankgate.ops.cpu.dense import BFLOAT16, FLOAT16, FLOAT32, combine_rows, dot_rows
from rankgate.ops.cpu.elementwise import exp
from rankgate.ops.cpu.vector import bits_of, byte_pointer, float_pointer, read_int64

KINDS = {torch.float32: FLOAT32, torch.bfloat16: BFLOAT16, torch.float16: FLOAT16}
# words of the arguments: how keys and values are stored; query heads, groups of them, room of the cache, d, e, bits of
# s (float32), window; addresses of q (H × d) and the result (H × e), float32, of k (G × d), v (G × e), keys, values and
# position
STORED, HEADS, GROUPS, CAPACITY, WIDTH, VALUE_WIDTH, SCALE, WINDOW, Q, OUT, K, V, KEYS, VALUES, POSITION = range(15)


@Kernel
def remember(arguments: int, _: int) -> None:
    """Store k and v at their position."""
    size = 4 if read_int64(arguments, 8 * STORED) == FLOAT32 else 2
    groups, capacity = read_int64(arguments, 8 * GROUPS), read_int64(arguments, 8 * CAPACITY)
    at = read_int64(read_int64(arguments, 8 * POSITION), 0)
    for width, new, cache in ((WIDTH, K, KEYS), (VALUE_WIDTH, V, VALUES)):
        row = size * read_int64(arguments, 8 * width)
        source = carray(byte_pointer(read_int64(arguments, 8 * new)), (groups, row))
        target = carray(byte_pointer(read_int64(arguments, 8 * cache)), (groups, capacity, row))
        for g in range(groups):
            target[g, at, :] = source[g, :]


@jit
def _softmax(scores: int, count: int, scale: float) -> None:
    """Of `scale` times the scores, in place."""
    values = carray(float_pointer(scores), count)
    top = np.float32(-np.inf)
    for t in range(count):
        values[t] *= scale
        top = max(top, values[t])
    for t in range(count):
        values[t] = exp(values[t] - top)
    total = np.float32(0)
    for t in range(count):
        total += values[t]
    inverse = np.float32(1) / total
    for t in range(count):
        values[t] *= inverse


@Kernel
def attend_head(arguments: int, head: int) -> None:
    """The result of one query head."""
    kind, groups = read_int64(arguments, 8 * STORED), read_int64(arguments, 8 * GROUPS)
    width, value_width = read_int64(arguments, 8 * WIDTH), read_int64(arguments, 8 * VALUE_WIDTH)
    capacity, group = read_int64(arguments, 8 * CAPACITY), head * groups // read_int64(arguments, 8 * HEADS)
    count, window = read_int64(read_int64(arguments, 8 * POSITION), 0) + 1, read_int64(arguments, 8 * WINDOW)
    first = max(count - window, 0) if window else 0
    count -= first
    scale = carray(float_pointer(arguments + 8 * SCALE), 1)[0]
    size = 4 if kind == FLOAT32 else 2
    weights = np.empty(count, np.float32)
    scores = weights.ctypes.data
    keys = read_int64(arguments, 8 * KEYS) + size * width * (capacity * group + first)
    dot_rows(kind, keys, size * width, read_int64(arguments, 8 * Q) + 4 * width * head, width, count, scores)
    _softmax(scores, count, scale)
    values = read_int64(arguments, 8 * VALUES) + size * value_width * (capacity * group + first)
    out = read_int64(arguments, 8 * OUT) + 4 * value_width * head
    combine_rows(kind, values, size * value_width, scores, count, value_width, out)


def arguments_of(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    keys: Tensor,
    values: Tensor,
    position: Tensor,
    *,
    scale: float,
    window: int,
    out: Tensor,
) -> np.ndarray:
    """Of both kernels, for contiguous tensors; q and the result are float32, the others of the cache's dtype."""
    _, groups, capacity, width = keys.shape
    sizes = [KINDS[keys.dtype], q.shape[1], groups, capacity, width, values.shape[3], bits_of(scale), window]
    return np.array(sizes + [t.data_ptr() for t in (q, out, k, v, keys, values, position)], np.int64)


def attend(
    q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, position: Tensor, scale: float, window: int = 0
) -> Tensor:
    """`ops.attention.attend_reference`; what these kernels do not take is computed by that."""
    if keys.dtype not in KINDS or keys.device.type != "cpu" or q.shape[2] > 1:
        return attend_reference(q, k, v, keys, values, position, scale, window)
    query, k, v = q.float().contiguous(), k.contiguous(), v.contiguous()
    out = torch.empty((1, 1, q.shape[1], values.shape[3]))
    words = arguments_of(query, k, v, keys, values, position, scale=scale, window=window, out=out)
    team.run_between(np.array([team.row(remember, words, 1), team.row(attend_head, words, q.shape[1])], np.int64))
    return out.to(q.dtype)
