"""`ops.attention` of one token on the CPU (Numba): scores and sums are products of a matrix and a vector (`dense`).

A chunk is a part of the text, for one group of heads: keys and values come from memory once, some KiB at a time, for
all heads of the group. It keeps for each head the largest score, the sum of the weights relative to that, and the
weighted values; a last row of one chunk puts the parts together. Accumulation is in float32.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numba import carray
from torch import Tensor

from rankgate.ops.attention import attend_reference
from rankgate.ops.cpu import team
from rankgate.ops.cpu.compile import Kernel, address_of, jit, keep
from rankgate.ops.cpu.dense import BFLOAT16, FLOAT16, FLOAT32, combine_rows, dot_rows
from rankgate.ops.cpu.elementwise import exp, tanh
from rankgate.ops.cpu.memory import scratch
from rankgate.ops.cpu.vector import LINE, ask, bits_of, byte_pointer, float_pointer, read_int32, read_int64
from rankgate.ops.cpu.vnni import as_float

KINDS = {torch.float32: FLOAT32, torch.bfloat16: BFLOAT16, torch.float16: FLOAT16}
# words of the arguments: how keys and values are stored; query heads, groups of them, room of the cache, d, e, bits of
# s (float32), window; addresses of q (H × d) and the result (H × e), float32, of k (G × d), v (G × e), keys, values and
# positions; parts of a text, the address of what each leaves for each head (largest score, sum, e weighted values), and
# groups of a sequence: those of all sequences are numbered, and so are the heads; bits of the soft cap (float32), and
# the address of the sinks of a sequence's heads, float32, or 0
STORED, HEADS, GROUPS, CAPACITY, WIDTH, VALUE_WIDTH, SCALE, WINDOW, Q, OUT, K, V, KEYS, VALUES, POSITION = range(15)
PARTS, FOUND, OWN, CAP, SINKS = 15, 16, 17, 18, 19
TILE = 16 << 10  # bytes of keys that are read at once, while the next ones are on their way
LOWEST = np.float32(-3e38)
LOWEST_KEY, MAGNITUDE = np.int32(-(2**31)), np.int32(0x7FFFFFFF)


@jit
def _remember(new: int, cache: int, row: int, at: int) -> None:
    """Store a row of so many bytes at its position."""
    source, target = carray(byte_pointer(new), row), carray(byte_pointer(cache + at * row), row)
    for i in range(row):
        target[i] = source[i]


@jit(inline="always")
def _in_order(bits: int) -> Any:
    """The bits of a float32 as a whole number in the order of such, and back: a largest one is found in vectors."""
    return bits ^ ((bits >> np.int32(31)) & MAGNITUDE)


@jit
def _weigh(scores: int, count: int, scale: float, cap: float, found: int, value_width: int) -> None:
    """Turn scores into weights relative to the largest one so far, and what has been found with them."""
    values, part = carray(float_pointer(scores), count), carray(float_pointer(found), value_width + 2)
    largest = LOWEST_KEY
    for t in range(count):
        values[t] *= scale
    if cap > 0:
        for t in range(count):
            values[t] = cap * tanh(values[t] / cap)
    for t in range(count):
        largest = max(largest, _in_order(read_int32(scores, 4 * t)))
    top = max(part[0], as_float(_in_order(largest)))
    shrink = exp(part[0] - top)
    for t in range(count):
        values[t] = exp(values[t] - top)
    total = np.float32(0)
    for t in range(count):
        total += values[t]
    part[0], part[1] = top, part[1] * shrink + total
    for i in range(2, value_width + 2):
        part[i] *= shrink


@jit
def _ask(keys: int, values: int, length: int, row: int, value_row: int) -> None:
    """Ask for so many keys and values."""
    for line in range(0, length * row, LINE):
        ask(keys + line)
    for line in range(0, length * value_row, LINE):
        ask(values + line)


@Kernel
def attend_part(arguments: int, chunk: int) -> None:
    """Store k and v of a group, if their position is in this part; then the part of all its heads."""
    kind, groups = read_int64(arguments, 8 * STORED), read_int64(arguments, 8 * GROUPS)
    width, value_width = read_int64(arguments, 8 * WIDTH), read_int64(arguments, 8 * VALUE_WIDTH)
    parts, together = read_int64(arguments, 8 * PARTS), read_int64(arguments, 8 * HEADS) // groups
    group, part = chunk // parts, chunk % parts
    size = 4 if kind == FLOAT32 else 2
    row, value_row = size * width, size * value_width
    start = read_int64(arguments, 8 * CAPACITY) * group
    keys = read_int64(arguments, 8 * KEYS) + row * start
    values = read_int64(arguments, 8 * VALUES) + value_row * start
    sequence, window = group // read_int64(arguments, 8 * OWN), read_int64(arguments, 8 * WINDOW)
    count = read_int64(read_int64(arguments, 8 * POSITION), 8 * sequence) + 1
    first = max(count - window, 0) if window else 0
    share = -(-(count - first) // parts)
    stop = min(first + part * share + share, count)
    first = min(first + part * share, count)
    if first < stop == count:
        _remember(read_int64(arguments, 8 * K) + row * group, keys, row, count - 1)
        _remember(read_int64(arguments, 8 * V) + value_row * group, values, value_row, count - 1)
    scale = carray(float_pointer(arguments + 8 * SCALE), 1)[0]
    cap = carray(float_pointer(arguments + 8 * CAP), 1)[0]
    step = (value_width + 2) * 4
    found = read_int64(arguments, 8 * FOUND) + step * together * chunk
    for h in range(together):
        empty = carray(float_pointer(found + step * h), value_width + 2)
        empty[:] = 0
        empty[0] = LOWEST
    tile = max(TILE // row, 1)
    buffer = np.empty(tile + value_width, np.float32)
    scores = address_of(buffer)
    sums = carray(float_pointer(scores + 4 * tile), value_width)
    _ask(keys + row * first, values + value_row * first, min(tile, stop - first), row, value_row)
    for t in range(first, stop, tile):
        length, after = min(tile, stop - t), t + tile
        _ask(keys + row * after, values + value_row * after, min(tile, stop - after), row, value_row)
        for h in range(together):
            query = read_int64(arguments, 8 * Q) + 4 * width * (group * together + h)
            dot_rows(kind, keys + row * t, row, query, width, length, scores)
            _weigh(scores, length, scale, cap, found + step * h, value_width)
            combine_rows(kind, values + value_row * t, value_row, scores, length, value_width, scores + 4 * tile)
            weighted = carray(float_pointer(found + step * h + 8), value_width)
            for i in range(value_width):
                weighted[i] += sums[i]
    keep(buffer)


@Kernel
def put_together(arguments: int, _: int) -> None:
    """The result of all heads, from their parts."""
    heads, groups = read_int64(arguments, 8 * HEADS), read_int64(arguments, 8 * GROUPS)
    parts, value_width = read_int64(arguments, 8 * PARTS), read_int64(arguments, 8 * VALUE_WIDTH)
    together, own = heads // groups, heads // groups * read_int64(arguments, 8 * OWN)
    sinks = read_int64(arguments, 8 * SINKS)
    found = carray(float_pointer(read_int64(arguments, 8 * FOUND)), (groups, parts, together, value_width + 2))
    out = carray(float_pointer(read_int64(arguments, 8 * OUT)), (heads, value_width))
    for head in range(heads):
        group, h = head // together, head % together
        sink = carray(float_pointer(sinks), own)[head % own] if sinks else LOWEST
        top = sink
        for part in range(parts):
            top = max(top, found[group, part, h, 0])
        total = exp(sink - top) if sinks else np.float32(0)
        out[head, :] = 0
        for part in range(parts):
            weight = exp(found[group, part, h, 0] - top)
            total += weight * found[group, part, h, 1]
            for i in range(value_width):
                out[head, i] += weight * found[group, part, h, i + 2]
        inverse = np.float32(1) / total
        for i in range(value_width):
            out[head, i] *= inverse


class Attention:
    """Attention as two rows of a program, and the memory that they need.

    The tensors are contiguous; q, sinks and the result are float32, the others of the cache's dtype. memory: bytes for
    what the first row leaves for the second, from their number.
    """

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        keys: Tensor,
        values: Tensor,
        position: Tensor,
        *,
        scale: float,
        window: int,
        cap: float,
        sinks: Tensor | None,
        out: Tensor,
        memory: Callable[[int], Tensor] = scratch,
    ) -> None:
        sequences, own, capacity, width = keys.shape
        groups, heads, value_width = sequences * own, sequences * q.shape[1], values.shape[3]
        parts = -(-2 * team.size() // groups)
        self.found = memory(4 * heads * parts * (value_width + 2))
        sizes = [KINDS[keys.dtype], heads, groups, capacity, width, value_width, bits_of(scale), window]
        addresses = [t.data_ptr() for t in (q, out, k, v, keys, values, position)]
        more = [bits_of(cap), 0 if sinks is None else sinks.data_ptr()]
        self.arguments = np.array([*sizes, *addresses, parts, self.found.data_ptr(), own, *more], np.int64)
        self.rows = [team.row(attend_part, self.arguments, groups * parts), team.row(put_together, self.arguments, 1)]

    def bind(self, keys: Tensor, values: Tensor) -> None:
        """Take these keys and values from now on: of the same shape, but for their room."""
        self.arguments[[KEYS, VALUES, CAPACITY]] = keys.data_ptr(), values.data_ptr(), keys.shape[2]


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    keys: Tensor,
    values: Tensor,
    position: Tensor,
    scale: float,
    window: int = 0,
    cap: float = 0.0,
    sinks: Tensor | None = None,
) -> Tensor:
    """`ops.attention.attend_reference`; what these kernels do not take is computed by that."""
    if keys.dtype not in KINDS or keys.device.type != "cpu" or q.shape[2] > 1:
        return attend_reference(q, k, v, keys, values, position, scale, window, cap, sinks)
    query, k, v = q.float().contiguous(), k.contiguous(), v.contiguous()
    out = torch.empty((len(q), 1, q.shape[1], values.shape[3]))
    rule: dict[str, Any] = {"scale": scale, "window": window, "cap": cap, "sinks": sinks}
    found = Attention(query, k, v, keys, values, position.contiguous(), **rule, out=out)
    team.run_between(team.program(found.rows))
    return out.to(q.dtype)
