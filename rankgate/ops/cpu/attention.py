"""`ops.attention` of one token on the CPU (Numba): scores and sums are products of a matrix and a vector (`dense`).

A group of heads shares the keys that it reads: kept rows, which dense attention has none of, and then recent tokens,
which lie in a ring; dense attention's is as long as the cache. A chunk is an even share of what all groups read, one
after the other: keys and values come from memory once, some KiB at a time, for all heads of a group. Of each group in
it a chunk keeps for each head the largest score, the sum of the weights relative to that, and the weighted values; a
last row of one chunk puts the parts together. Accumulation is in float32.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numba import carray
from torch import Tensor

from rankgate.ops import attention as definition
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
# positions; chunks, the address of what each leaves for each head (largest score, sum, e weighted values), and groups
# of a sequence: those of all sequences are numbered, and so are the heads; bits of the soft cap (float32), and the
# addresses of the sinks of a sequence's heads, float32, or 0, and of the bias and the rows of `attend_held`, or 0; STEP
STORED, HEADS, GROUPS, CAPACITY, WIDTH, VALUE_WIDTH, SCALE, WINDOW, Q, OUT, K, V, KEYS, VALUES, POSITION = range(15)
PARTS, FOUND, OWN, CAP, SINKS, BIAS, ROWS, STEP = range(15, 23)
MOST_PARTS = 8  # chunks for each thread: each looks at what all groups read
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
def _weigh(scores: int, count: int, scale: float, cap: float, bias: int, found: int, value_width: int) -> None:
    """Turn scores into weights relative to the largest one so far, and what has been found with them.

    bias: address of what is added to the scores, or 0.
    """
    values, part = carray(float_pointer(scores), count), carray(float_pointer(found), value_width + 2)
    largest = LOWEST_KEY
    for t in range(count):
        values[t] *= scale
    if cap > 0:
        for t in range(count):
            values[t] = cap * tanh(values[t] / cap)
    if bias:
        added = carray(float_pointer(bias), count)
        for t in range(count):
            values[t] += added[t]
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


@jit
def _reads(arguments: int, group: int) -> Any:
    """What a group reads: the first of its kept rows, their number; the first row of its ring, its length; of the
    tokens in that the first, and one past the last.
    """
    sequence = group // read_int64(arguments, 8 * OWN)
    stop = read_int64(read_int64(arguments, 8 * POSITION), 8 * sequence) + 1
    rows, window = read_int64(arguments, 8 * ROWS), read_int64(arguments, 8 * WINDOW)
    if rows:
        row, step = rows + 48 * group, read_int64(arguments, 8 * STEP)
        first = max(read_int64(row, 40), (stop - 1) // step * step - read_int64(row, 32))
        return read_int64(row, 0), read_int64(row, 8), read_int64(row, 16), read_int64(row, 24), first, stop
    capacity = read_int64(arguments, 8 * CAPACITY)
    return 0, 0, capacity * group, capacity, max(stop - window, 0) if window else 0, stop


@jit
def _share(arguments: int) -> Any:
    """How many keys a chunk reads."""
    total = 0
    for group in range(read_int64(arguments, 8 * GROUPS)):
        _, kept, _, _, first, stop = _reads(arguments, group)
        total += kept + stop - first
    return -(-total // read_int64(arguments, 8 * PARTS))


@jit
def _attend_rows(arguments: int, group: int, found: int, row: int, count: int, biased: bool, buffer: int) -> None:
    """Add the keys and values in so many rows to what the heads of a group have found.

    buffer: address of room for the scores of a tile, and for sums of its values (float32).
    """
    kind, groups = read_int64(arguments, 8 * STORED), read_int64(arguments, 8 * GROUPS)
    together = read_int64(arguments, 8 * HEADS) // groups
    width, value_width = read_int64(arguments, 8 * WIDTH), read_int64(arguments, 8 * VALUE_WIDTH)
    size = 4 if kind == FLOAT32 else 2
    row_bytes, value_bytes = size * width, size * value_width
    keys = read_int64(arguments, 8 * KEYS) + row_bytes * row
    values = read_int64(arguments, 8 * VALUES) + value_bytes * row
    scale = carray(float_pointer(arguments + 8 * SCALE), 1)[0]
    cap = carray(float_pointer(arguments + 8 * CAP), 1)[0]
    bias = read_int64(arguments, 8 * BIAS) + 4 * row if biased else 0
    tile = max(TILE // row_bytes, 1)
    sums = carray(float_pointer(buffer + 4 * tile), value_width)
    _ask(keys, values, min(tile, count), row_bytes, value_bytes)
    for t in range(0, count, tile):
        length, after = min(tile, count - t), t + tile
        _ask(keys + row_bytes * after, values + value_bytes * after, min(tile, count - after), row_bytes, value_bytes)
        for h in range(together):
            query = read_int64(arguments, 8 * Q) + 4 * width * (group * together + h)
            own = found + 4 * (value_width + 2) * h
            dot_rows(kind, keys + row_bytes * t, row_bytes, query, width, length, buffer)
            _weigh(buffer, length, scale, cap, bias + 4 * t if biased else 0, own, value_width)
            combine_rows(kind, values + value_bytes * t, value_bytes, buffer, length, value_width, buffer + 4 * tile)
            weighted = carray(float_pointer(own + 8), value_width)
            for i in range(value_width):
                weighted[i] += sums[i]


@jit
def _attend_group(arguments: int, group: int, found: int, begin: int, end: int) -> None:
    """What heads of a group find in the keys `begin` … `end` − 1 of those that they read; the last is the new one."""
    kind, groups = read_int64(arguments, 8 * STORED), read_int64(arguments, 8 * GROUPS)
    together = read_int64(arguments, 8 * HEADS) // groups
    width, value_width = read_int64(arguments, 8 * WIDTH), read_int64(arguments, 8 * VALUE_WIDTH)
    start, kept, ring, length, first, stop = _reads(arguments, group)
    size = 4 if kind == FLOAT32 else 2
    if end == kept + stop - first:
        row, keys, values = ring + (stop - 1) % length, size * width, size * value_width  # bytes of such
        _remember(read_int64(arguments, 8 * K) + keys * group, read_int64(arguments, 8 * KEYS), keys, row)
        _remember(read_int64(arguments, 8 * V) + values * group, read_int64(arguments, 8 * VALUES), values, row)
    for h in range(together):
        empty = carray(float_pointer(found + 4 * (value_width + 2) * h), value_width + 2)
        empty[:] = 0
        empty[0] = LOWEST
    buffer = np.empty(max(TILE // (size * width), 1) + value_width, np.float32)
    if begin < kept:
        _attend_rows(arguments, group, found, start + begin, min(end, kept) - begin, True, address_of(buffer))
    t, last = first + max(begin - kept, 0), first + end - kept
    while t < last:  # at most twice: to the end of the ring, and from its beginning
        count = min(last - t, length - t % length)
        _attend_rows(arguments, group, found, ring + t % length, count, False, address_of(buffer))
        t += count
    keep(buffer)


@Kernel
def attend_part(arguments: int, chunk: int) -> None:
    """A share of what all groups read, each group's found in a place of its own: their number and the chunk's."""
    groups, share = read_int64(arguments, 8 * GROUPS), _share(arguments)
    place = 4 * (read_int64(arguments, 8 * VALUE_WIDTH) + 2) * (read_int64(arguments, 8 * HEADS) // groups)
    begin = chunk * share
    for group in range(groups):
        _, kept, _, _, first, stop = _reads(arguments, group)
        count = kept + stop - first
        if begin < count and begin + share > 0:
            found = read_int64(arguments, 8 * FOUND) + place * (group + chunk)
            _attend_group(arguments, group, found, max(begin, 0), min(begin + share, count))
        begin -= count


@Kernel
def put_together(arguments: int, _: int) -> None:
    """The result of all heads, from their parts."""
    heads, groups = read_int64(arguments, 8 * HEADS), read_int64(arguments, 8 * GROUPS)
    parts, value_width = read_int64(arguments, 8 * PARTS), read_int64(arguments, 8 * VALUE_WIDTH)
    together, own = heads // groups, heads // groups * read_int64(arguments, 8 * OWN)
    sinks, share, begin = read_int64(arguments, 8 * SINKS), _share(arguments), 0
    found = carray(float_pointer(read_int64(arguments, 8 * FOUND)), (groups + parts, together, value_width + 2))
    out = carray(float_pointer(read_int64(arguments, 8 * OUT)), (heads, value_width))
    for group in range(groups):
        _, kept, _, _, token, stop = _reads(arguments, group)
        end = begin + kept + stop - token
        first, last = group + begin // share, group + (end - 1) // share
        begin = end
        for h in range(together):
            head = group * together + h
            sink = carray(float_pointer(sinks), own)[head % own] if sinks else LOWEST
            top = sink
            for part in range(first, last + 1):
                top = max(top, found[part, h, 0])
            total = exp(sink - top) if sinks else np.float32(0)
            out[head, :] = 0
            for part in range(first, last + 1):
                weight = exp(found[part, h, 0] - top)
                total += weight * found[part, h, 1]
                for i in range(value_width):
                    out[head, i] += weight * found[part, h, i + 2]
            inverse = np.float32(1) / total
            for i in range(value_width):
                out[head, i] *= inverse


class Attention:
    """Attention as two rows of a program, and the memory that they need.

    q (B × H × 1 × d), the result, sinks and bias are float32, k, v and the buffers of the cache's dtype; contiguous.
    cache: keys and values (B × G × capacity × d or e), or keys, values, bias and rows of `attend_held`.
    memory: bytes for what the first row leaves for the second, from their number.
    """

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cache: Sequence[Tensor],
        position: Tensor,
        *,
        scale: float,
        window: int,
        cap: float,
        sinks: Tensor | None,
        out: Tensor,
        memory: Callable[[int], Tensor] = scratch,
    ) -> None:
        sequences, heads, own, value_width = len(q), len(q) * q.shape[1], k.shape[1], v.shape[3]
        groups = sequences * own
        parts = min(-(-2 * team.size() // groups) * groups, MOST_PARTS * team.size())
        self.found = memory(4 * (groups + parts) * (heads // groups) * (value_width + 2))
        sizes = [KINDS[k.dtype], heads, groups, 0, q.shape[3], value_width, bits_of(scale), window]
        addresses = [*(t.data_ptr() for t in (q, out, k, v)), 0, 0, position.data_ptr()]
        more = [bits_of(cap), 0 if sinks is None else sinks.data_ptr(), 0, 0, definition.STEP]
        self.arguments = np.array([*sizes, *addresses, parts, self.found.data_ptr(), own, *more], np.int64)
        self.bind(*cache)
        self.rows = [team.row(attend_part, self.arguments, parts), team.row(put_together, self.arguments, 1)]

    def bind(self, keys: Tensor, values: Tensor, *held: Tensor) -> None:
        """Take this cache from now on: of the same shape, but for its room."""
        self.arguments[[KEYS, VALUES, CAPACITY]] = keys.data_ptr(), values.data_ptr(), keys.shape[-2]
        if held:
            self.arguments[[BIAS, ROWS]] = [t.data_ptr() for t in held]


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
        return definition.attend_reference(q, k, v, keys, values, position, scale, window, cap, sinks)
    return _attend(q, k, v, (keys, values), position, scale, window, cap, sinks)


def attend_held(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    keys: Tensor,
    values: Tensor,
    bias: Tensor,
    rows: Tensor,
    position: Tensor,
    scale: float,
) -> Tensor:
    """`ops.attention.attend_held_reference`; what these kernels do not take is computed by that."""
    if keys.dtype not in KINDS or q.shape[2] > 1:
        return definition.attend_held_reference(q, k, v, keys, values, bias, rows, position, scale)
    return _attend(q, k, v, (keys, values, bias, rows), position, scale, 0, 0.0, None)


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cache: tuple[Tensor, ...],
    position: Tensor,
    scale: float,
    window: int,
    cap: float,
    sinks: Tensor | None,
) -> Tensor:
    query, key, value, at = q.float().contiguous(), k.contiguous(), v.contiguous(), position.contiguous()
    out = torch.empty((len(q), 1, q.shape[1], v.shape[3]))
    rule: dict[str, Any] = {"scale": scale, "window": window, "cap": cap, "sinks": sinks}
    found = Attention(query, key, value, cache, at, **rule, out=out)
    team.run_between(team.program(found.rows))
    return out.to(q.dtype)
