"""Several tokens on the CPU: the product of a quantised input group with a batch or a prompt, from its packed bytes.

    Y = X Qᵀ + (X Bᵀ) s Aᵀ + Σ over the open channels of each token      X: T × n   Y: T × m

Two rows of a program (`team`). `prepare` turns some tokens at a time into integers: x in blocks of 64, z = s B x, and
x_j column_j of the channels whose gate is open, one behind the other. `multiply` unpacks 64 rows of Q into a buffer
that stays in cache and multiplies it with some dozens of tokens: nothing of the size of the matrix is ever written.
Meanwhile it asks for the next 64 rows, which the processor does not guess. A z is one more block of inputs, whose
weights are A. Of the refinement every token reads the columns that it opens, and no others, four at a time; but where
most gates of a tile are open, v is one more x and the plane one more Q.

All three are rounded to 14 bits: x to half a step of max|x| / 8191 in each block of 64 inputs, z of 64 components, open
channels of 64 of them. So row i is off by at most

    Σ_j δ(x) |Q_ij|  +  Σ_c |A_ic| (s_c Σ_j δ(x) |B_cj| + δ(z))  +  Σ_j open δ(v) |E_ij / column_j|

with δ(x) = max|x| / 16382 of a block and v the x_j column_j that are open, and by float32 rounding. Sums of integers
are exact, so a token's result does not depend on its neighbours, except that they may decide which channels share a
block of v. A token that is not finite is NaN, no other one is.
"""

from __future__ import annotations

import ctypes
import itertools

import numpy as np
import torch
from numba import carray
from torch import Tensor

from rankgate.ops.cpu import team
from rankgate.ops.cpu.compile import Kernel, address_of, jit, keep
from rankgate.ops.cpu.quantized import (
    BITS,
    CODES,
    COLUMN,
    COMPONENT,
    GROUPS,
    PLANE,
    RANK,
    TABLE_WORDS,
    THRESHOLD,
    ZERO,
    B,
    M,
    N,
    columns_of,
    gemv,
)
from rankgate.ops.cpu.strips import (
    ASKED,
    TABLE,
    blocks_of,
    floats,
    of_table,
    row_factors,
    unpack,
    unpack_factor,
    unpack_plane,
)
from rankgate.ops.cpu.tiles import (
    DIGITS,
    GROUP,
    LANES,
    ROWS,
    STEP,
    TILE,
    add_columns,
    narrow_tile,
    round_block,
    tiles,
    unpack_bytes,
)
from rankgate.ops.cpu.vector import (
    byte_pointer,
    read_bfloat16,
    read_int32,
    read_int64,
    write_int32,
)
from rankgate.quantized import linear as definition
from rankgate.quantized import table_of

# Words of the arguments: the table, x and y, float32, and how many tokens; what `prepare` hands to `multiply`: x, z and
# v, each as digits, scales and sums, the channels of v and how many; tokens of a chunk of `prepare` and of `multiply`,
# and strips of the latter.
_, X, Y, TOKENS, X_DIGITS, Z_DIGITS, V_DIGITS, CHANNELS, OPEN, PREPARED, TOGETHER, STRIPS = range(12)
MANY = 0.4  # share of open channels from which on it is faster to read all columns for a tile
MOST_TOKENS = 4096  # at once, which bounds the memory
SLOT = DIGITS + 16  # bytes of a block of one token: digits, and elsewhere its scale and sums
tile_1, tile_2, tile_3, *_more = tiles
tile_4, tile_5, tile_6 = _more or tiles


@jit
def _slots(arguments: int) -> int:
    """Tokens, to whole tiles."""
    return (read_int64(arguments, 8 * TOKENS) + TILE - 1) // TILE * TILE


@jit
def _round(source: int, digits: int, slots: int, at: int) -> None:
    """64 values as block `at` of as many as there are slots: all digits, then all scales, then all sums by kind."""
    scale = digits + DIGITS * slots
    round_block(source, digits + DIGITS * at, scale + 4 * at, scale + 4 * slots + 4 * at, 4 * slots)


@jit
def _tile(
    tokens: int,
    w: int,
    scale: int,
    zero: int,
    digits: int,
    slots: int,
    at: int,
    blocks: int,
    groups: int,
    steps: int,
    sums: int,
    ahead: int,
) -> None:
    """What `tiles` add for the tile whose first block is `at`."""
    x_scale = digits + DIGITS * slots + 4 * at
    x, apart = digits + DIGITS * at, 4 * slots
    x_sum = x_scale + apart
    if tokens == 1:
        tile_1(w, scale, zero, x, x_scale, x_sum, apart, blocks, groups, steps, sums, ahead)
    elif tokens == 2:
        tile_2(w, scale, zero, x, x_scale, x_sum, apart, blocks, groups, steps, sums, ahead)
    elif tokens == 3:
        tile_3(w, scale, zero, x, x_scale, x_sum, apart, blocks, groups, steps, sums, ahead)
    elif tokens == 4:
        tile_4(w, scale, zero, x, x_scale, x_sum, apart, blocks, groups, steps, sums, ahead)
    elif tokens == 5:
        tile_5(w, scale, zero, x, x_scale, x_sum, apart, blocks, groups, steps, sums, ahead)
    else:
        tile_6(w, scale, zero, x, x_scale, x_sum, apart, blocks, groups, steps, sums, ahead)


@Kernel
def prepare(arguments: int, chunk: int) -> None:
    """Some tokens as integers."""
    tokens, count = read_int64(arguments, 8 * TOKENS), read_int64(arguments, 8 * PREPARED)
    start, stop = chunk * count, min((chunk + 1) * count, tokens)
    _round_inputs(arguments, start, stop)
    if of_table(arguments, RANK):
        _project(arguments, start // TILE, (stop + TILE - 1) // TILE)
    if of_table(arguments, PLANE):
        _open_channels(arguments, start, stop)


@jit
def _round_inputs(arguments: int, start: int, stop: int) -> None:
    n, blocks = of_table(arguments, N), blocks_of(arguments, N)
    slots, digits = _slots(arguments) * blocks, read_int64(arguments, 8 * X_DIGITS)
    rest = np.zeros(GROUP, np.float32)
    for t in range(start, stop):
        for g in range(blocks):
            source = read_int64(arguments, 8 * X) + 4 * (t * n + g * GROUP)
            if n - g * GROUP < GROUP:
                rest[: n - g * GROUP] = floats(source, n - g * GROUP)
                source = address_of(rest)
            _round(source, digits, slots, (t // TILE * blocks + g) * TILE + t % TILE)
    keep(rest)


@jit
def _project(arguments: int, start: int, stop: int) -> None:
    """Z of tiles start … stop."""
    n, rank = of_table(arguments, N), of_table(arguments, RANK)
    blocks, z_blocks, slots = blocks_of(arguments, N), blocks_of(arguments, RANK), _slots(arguments)
    factor, component = of_table(arguments, B), of_table(arguments, COMPONENT)
    x, digits = read_int64(arguments, 8 * X_DIGITS), read_int64(arguments, 8 * Z_DIGITS)
    of_x, stride = slots * blocks, blocks * GROUP
    padded, w = np.zeros((GROUP, stride), np.int8), np.empty(GROUP * stride, np.uint8)
    scale, z = np.empty((blocks, GROUP), np.float32), np.empty((TILE, GROUP), np.float32)
    for c in range(z_blocks):
        count = min(GROUP, rank - c * GROUP)
        for i in range(count):
            padded[i, :n] = carray(byte_pointer(factor + (c * GROUP + i) * n), n)
        scale[:, :count] = floats(component + 4 * c * GROUP, count)
        for i in range(0, count, 16):
            rows = address_of(padded) + i * stride
            unpack_bytes(rows, stride, count - 1 - i, blocks, address_of(w) + STEP * i, rows)
        for tile in range(start, stop):
            z[:] = 0
            at = tile * blocks * TILE
            x_scale = x + DIGITS * of_x + 4 * at
            for i in range(0, count, LANES):
                rows, scales, sums = address_of(w) + STEP * i, address_of(scale) + 4 * i, address_of(z) + 4 * i
                digits_at, x_sum, apart = x + DIGITS * at, x_scale + 4 * of_x, 4 * of_x
                narrow_tile(rows, scales, 0, digits_at, x_scale, x_sum, apart, blocks, 1, GROUP // STEP, sums, rows)
            z[:, count:] = 0
            for t in range(TILE):
                at = (tile * z_blocks + c) * TILE + t
                _round(address_of(z) + 4 * GROUP * t, digits, slots * z_blocks, at)
    keep(padded)
    keep(w)
    keep(scale)
    keep(z)


@jit
def _open_channels(arguments: int, start: int, stop: int) -> None:
    """v = x_j column_j of the channels that tokens open, and which these are, to a multiple of four.

    Tiles that open many get v as they have x, zero where a gate is closed, and −1 for the number of channels.
    """
    n, blocks, slots = of_table(arguments, N), blocks_of(arguments, N), _slots(arguments)
    opened, digits = read_int64(arguments, 8 * OPEN), read_int64(arguments, 8 * V_DIGITS)
    threshold, column = np.empty(n, np.float32), np.empty(n, np.float32)
    for j in range(n):
        threshold[j] = read_bfloat16(of_table(arguments, THRESHOLD), 2 * j)
        column[j] = read_bfloat16(of_table(arguments, COLUMN), 2 * j)
    v = np.zeros(blocks * GROUP + GROUP, np.float32)
    for tile in range(start, stop, TILE):
        end, total = min(tile + TILE, stop), 0
        for t in range(tile, end):
            x = floats(read_int64(arguments, 8 * X) + 4 * t * n, n)
            for j in range(n):
                total += int(abs(x[j]) > threshold[j])
        dense = total > MANY * n * (end - tile)
        for t in range(tile, end):
            x = floats(read_int64(arguments, 8 * X) + 4 * t * n, n)
            channels = read_int64(arguments, 8 * CHANNELS) + 4 * t * blocks * GROUP
            count = 0
            if dense:
                for j in range(n):
                    v[j] = x[j] * column[j] if abs(x[j]) > threshold[j] else np.float32(0)
                count = n
            else:
                for j in range(n):  # without a branch: what is not open is written over
                    v[count] = x[j] * column[j]
                    write_int32(channels, 4 * count, j)
                    count += int(abs(x[j]) > threshold[j])
            v[count : count + GROUP] = 0
            for g in range((count + GROUP - 1) // GROUP):
                at = (t // TILE * blocks + g) * TILE + t % TILE if dense else t * blocks + g
                _round(address_of(v) + 4 * GROUP * g, digits, slots * blocks, at)
            while not dense and count % STEP:
                write_int32(channels, 4 * count, 0)
                count += 1
            write_int32(opened, 4 * t, -1 if dense else count)
    keep(v)


@Kernel
def multiply(arguments: int, chunk: int) -> None:
    """Some strips of y for some tokens."""
    strips, count = blocks_of(arguments, M), read_int64(arguments, 8 * STRIPS)
    parts = (strips + count - 1) // count
    start, begin = chunk % parts * count, chunk // parts * read_int64(arguments, 8 * TOGETHER)
    for strip in range(start, min(start + count, strips)):
        _strip(arguments, strip * GROUP, begin)


@jit
def _strip(arguments: int, first: int, begin: int) -> None:
    """64 rows of y for some tokens."""
    m, rank, plane = of_table(arguments, M), of_table(arguments, RANK), of_table(arguments, PLANE)
    tokens, together = read_int64(arguments, 8 * TOKENS), read_int64(arguments, 8 * TOGETHER)
    blocks, z_blocks = blocks_of(arguments, N), blocks_of(arguments, RANK)
    slots, groups = _slots(arguments), of_table(arguments, GROUPS)
    count, of_block = min(GROUP, m - first), 4 * GROUP
    one_block = GROUP * GROUP + of_block  # weights, and their scales
    others = (2 * groups * blocks + TILE) * of_block  # scales, zeros and sums
    room = np.empty(2 * blocks * GROUP * GROUP + z_blocks * one_block + blocks * of_block + others + 64, np.uint8)
    w = (address_of(room) + 63) // 64 * 64
    a = w + blocks * GROUP * GROUP
    e = a + z_blocks * GROUP * GROUP
    scale = e + blocks * GROUP * GROUP
    one = scale + groups * blocks * of_block
    row = one + z_blocks * of_block
    zero = row + blocks * of_block
    sums = zero + groups * blocks * of_block
    unpack(arguments, first, w, scale, zero)
    if not of_table(arguments, ZERO):
        zero = 0
    steps, z_steps = GROUP // STEP // groups, (min(rank, GROUP) + STEP - 1) // STEP
    if rank:
        unpack_factor(arguments, first, a)
        floats(one, z_blocks * GROUP)[:] = 1
    if plane:
        row_factors(arguments, first, row)
    unpacked = False
    ahead = of_table(arguments, CODES) + (first + GROUP + ASKED) * blocks * GROUP * of_table(arguments, BITS) // 8
    x, z = read_int64(arguments, 8 * X_DIGITS), read_int64(arguments, 8 * Z_DIGITS)
    v = read_int64(arguments, 8 * V_DIGITS)
    y, opened = read_int64(arguments, 8 * Y) + 4 * first, read_int64(arguments, 8 * OPEN)
    for t in range(begin, min(begin + together, tokens), TILE):
        width = min(TILE, tokens - t)
        dense = plane != 0 and read_int32(opened, 4 * t) < 0
        if dense and not unpacked:
            unpack_plane(arguments, first, e, row)
            unpacked = True
        floats(sums, TILE * GROUP)[:] = 0
        for i in range(0, 4 * GROUP, 4 * ROWS):
            z_i = zero + i if zero else 0
            asked = ahead if t == begin else w
            _tile(width, w + i, scale + i, z_i, x, slots * blocks, t * blocks, blocks, groups, steps, sums + i, asked)
            if rank:
                _tile(width, a + i, one + i, 0, z, slots * z_blocks, t * z_blocks, z_blocks, 1, z_steps, sums + i, a)
            if dense:
                _tile(width, e + i, row + i, 0, v, slots * blocks, t * blocks, blocks, 1, GROUP // STEP, sums + i, e)
        for u in range(width):
            if plane and not dense:
                _refine(arguments, first, t + u, row, sums + of_block * u)
            floats(y + 4 * (t + u) * m, count)[:] = floats(sums + of_block * u, count)
    keep(room)


@jit
def _refine(arguments: int, first: int, t: int, row: int, sums: int) -> None:
    """Add to 64 rows of token t what its open channels restore."""
    blocks, slots = blocks_of(arguments, N), _slots(arguments)
    codes, stride = columns_of(read_int64(arguments, 8 * TABLE), first)
    channels = read_int64(arguments, 8 * CHANNELS) + 4 * t * blocks * GROUP
    digits = read_int64(arguments, 8 * V_DIGITS)
    scale = digits + DIGITS * slots * blocks
    count = read_int32(read_int64(arguments, 8 * OPEN), 4 * t)
    for start in range(0, count, GROUP):
        at = t * blocks + start // GROUP
        v, s, total = digits + DIGITS * at, scale + 4 * at, scale + 4 * (slots * blocks + at)
        add_columns(codes, stride, channels + 4 * start, v, s, total, min(GROUP, count - start), row, sums)


class Products:
    """The product of so many tokens as two rows of a program, its x and y to be given, and the memory that it needs."""

    def __init__(self, table: int, tokens: int) -> None:
        m, n, _, _, rank, *parts = (ctypes.c_int64 * TABLE_WORDS).from_address(table)
        blocks, z_blocks, strips = (-(-size // GROUP) for size in (n, rank, m))
        slots = -(-tokens // TILE) * TILE
        sizes = [slots * blocks * SLOT, slots * z_blocks * SLOT]
        sizes += [slots * blocks * SLOT, 4 * slots * blocks * GROUP, 4 * slots] if parts[PLANE - CODES] else [0] * 3
        self.scratch = torch.empty(sum(sizes), dtype=torch.uint8)
        starts = itertools.accumulate(sizes[:-1], initial=self.scratch.data_ptr())
        prepared = TILE if tokens <= 8 * TILE else 4 * TILE
        together = 32 * TILE
        while strips * -(-tokens // together) > team.MOST_CHUNKS:
            together *= 2
        each = max(1, strips // (4 * team.size()))
        self.arguments = np.array([table, 0, 0, tokens, *starts, prepared, together, each], np.int64)
        self.rows = [
            team.row(prepare, self.arguments, -(-tokens // prepared)),
            team.row(multiply, self.arguments, -(-strips // each) * -(-tokens // together)),
        ]


def gemm(x: Tensor, table: int, m: int) -> Tensor:
    """y (…, m) of x (…, n); `table` is the address of a `table_of`."""
    wide = x.detach().float().contiguous()
    y = torch.empty((*x.shape[:-1], m))
    n = x.shape[-1]
    tokens = x.numel() // n
    for start in range(0, tokens, MOST_TOKENS):
        products = Products(table, min(MOST_TOKENS, tokens - start))
        products.arguments[[X, Y]] = wide.data_ptr() + 4 * n * start, y.data_ptr() + 4 * m * start
        team.run_between(team.program(products.rows))
    return y.to(x.dtype)


def linear(x: Tensor, table: int, m: int) -> Tensor:
    """The same of any number of tokens."""
    return (gemv if x.numel() == x.shape[-1] else gemm)(x, table, m)


def linear_of(x: Tensor, parts: list[Tensor | None]) -> Tensor:
    """The same from `QuantizedGroup.parts`."""
    if x.dtype == torch.float64:
        return definition(x, parts)
    table = table_of(x.shape[-1], parts)
    return linear(x, table.ctypes.data, int(table[M]))
