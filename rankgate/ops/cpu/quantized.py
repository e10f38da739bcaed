"""One token on the CPU: the matrix-vector product of a quantised input group, straight from its packed bytes.

At batch 1 a layer costs what its bytes cost to read, so codes are unpacked in registers and never stored. A whole
group (q/k/v, gate/up) is two rows of a program (`team`): x as integers, z = B x and the list of open channels are small
and come first, then threads take chunks of rows and do for them Q x, A z and the open columns of the refinement plane.
Channels whose gate is closed are not read.

The result is `QuantizedGroup.reference` but for float32 rounding and integer x: in each block of 64 inputs x is rounded
to steps of max|x| / 16319 (8-bit dot products, `vnni`) or max|x| / 32767 (16-bit ones, processors without them), so row
i is off by at most half a step of each block times Σ_j |Q_ij|.

A group is described to the kernel by a table of addresses: unpacking ten tensors would cost more than a small product.
Numba compiles at the first call, some seconds, and keeps the result on disk.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from rankgate.ops.cpu import team, vnni
from rankgate.ops.cpu.compile import Kernel, address_of, jit, keep
from rankgate.ops.cpu.memory import scratch
from rankgate.ops.cpu.vector import (
    GROUP,
    LANES,
    LINE,
    add_columns,
    column_order,
    dot_bytes,
    dot_bytes_four,
    prefetch_columns,
    read_bfloat16,
    read_float,
    read_int8,
    read_int32,
    read_int64,
    row_dot,
    row_order,
    write_float,
    write_int16,
    write_int32,
    write_int64,
)
from rankgate.ops.cpu.vnni import rows_dot, split_x

# words of `quantized.table_of`
M, N, BITS, GROUPS, RANK, CODES, SCALE, ZERO, A, B, COMPONENT, PLANE, ROW, COLUMN, THRESHOLD = range(15)
TABLE_WORDS = 15
# words of the arguments of `prepare` and `multiply`: the table, x and y, float32; what the first hands to the second:
# x as codes, z, channels and coefficients, and how many channels are open, or -1 if x is not finite; how codes meet x,
# and the rows of a chunk
TABLE, X, Y, ROUNDED, Z, CHANNELS, COEFFICIENTS, OPEN, PATH, ROWS = range(10)
PLAIN, SHORT, VNNI = range(3)
PATHS = [VNNI] * vnni.AVAILABLE + [SHORT, PLAIN]  # that this processor has, the best first
ROW_ORDER, COLUMN_ORDER = np.array(row_order()), np.array(column_order())
LARGEST, SMALLEST = np.float32(32767), np.float32(1e-30)  # code of x; and x that is not 0
EXPONENT = np.int32(0x7F800000)


@jit
def _is_finite(x: int, n: int) -> bool:
    """Whether the exponent of no float32 at `x` is all ones: arithmetic below assumes it and would hide a NaN."""
    found = np.int32(0)
    for j in range(n):
        found |= np.int32((read_int32(x, 4 * j) & EXPONENT) == EXPONENT)
    return found == 0


@jit
def _round_blocks(x: int, n: int, bits: int, groups: int, zero: int, out: int) -> bool:
    """X (n, float32) for `_short_rows`: 16-bit codes with a scale per block, and what is added to Σ q c for each group.

    Like `vnni.split_x`, from which this is the way of processors without it: where codes, scales and sums lie, see
    `_places`.
    """
    if not _is_finite(x, n):
        return False
    blocks = (n + GROUP - 1) // GROUP
    codes, scale, shifts = _places(out, blocks)
    block = np.zeros(GROUP, np.float32)
    for g in range(blocks):
        start, count = g * GROUP, min(GROUP, n - g * GROUP)
        block[count:] = 0
        largest = np.float32(0)
        for i in range(count):
            block[i] = read_float(x, 4 * (start + i))
            largest = max(largest, abs(block[i]))
        write_float(scale, 4 * g, largest / LARGEST)
        inverse = LARGEST / largest if largest > SMALLEST else np.float32(0)
        total, second, times = np.int32(0), np.int32(0), 1 if zero < 0 else zero
        for i in range(GROUP):
            j = ROW_ORDER[i] if bits == 4 else i
            code = np.int32(np.rint(block[j] * inverse))
            write_int16(codes, 2 * (start + i), np.int16(code))
            total += code
            second += code if 2 * j >= GROUP else 0
        if groups == 2:
            write_int32(shifts, 4 * (2 * g + 1), np.int32(-times * second))
            total -= second
        write_int32(shifts, 4 * groups * g, np.int32(-times * total))
    return True


@jit
def _places(out: int, blocks: int) -> tuple[int, int, int]:
    """Codes, scales and sums of `_round_blocks`."""
    return out, out + 2 * GROUP * blocks, out + (2 * GROUP + 4) * blocks


@jit
def _project(table: int, x: int, z: int) -> None:
    """Z = s B x."""
    n, rank = read_int64(table, 8 * N), read_int64(table, 8 * RANK)
    factor, component = read_int64(table, 8 * B), read_int64(table, 8 * COMPONENT)
    for c in range(0, rank // 4 * 4, 4):
        dot_bytes_four(factor + c * n, n, x, n // LANES, z + 4 * c)
    for c in range(rank // 4 * 4, rank):
        dot_bytes(factor + c * n, n, x, n // LANES, z + 4 * c)
    for c in range(rank):
        total = read_float(z, 4 * c)
        for j in range(n // LANES * LANES, n):
            total += read_int8(factor, c * n + j) * read_float(x, 4 * j)
        write_float(z, 4 * c, total * read_float(component, 4 * c))


@jit
def _open_channels(table: int, x: int, channels: int, coefficients: int) -> int:
    """The channels whose gate is open, what each column is multiplied with, and how many there are."""
    threshold, column = read_int64(table, 8 * THRESHOLD), read_int64(table, 8 * COLUMN)
    count = 0
    for j in range(read_int64(table, 8 * N)):
        value = read_float(x, 4 * j)
        write_int64(channels, 8 * count, j)
        write_float(coefficients, 4 * count, value * read_bfloat16(column, 2 * j))
        count += abs(value) > read_bfloat16(threshold, 2 * j)
    return count


@jit
def _short_rows(table: int, start: int, stop: int, x: int, z: int, y: int, plain: bool) -> None:
    """Rows `start` to `stop` of Q x + A z, without the last columns of A that are not 16; x: `_round_blocks`."""
    codes, scale, zero = read_int64(table, 8 * CODES), read_int64(table, 8 * SCALE), read_int64(table, 8 * ZERO)
    rank, bits = read_int64(table, 8 * RANK), read_int64(table, 8 * BITS)
    blocks, groups = (read_int64(table, 8 * N) + GROUP - 1) // GROUP, read_int64(table, 8 * GROUPS)
    variant = (bits == 4) + 2 * (zero != 0) + 4 * plain + 8 * (groups - 1)
    x_codes, x_scale, shifts = _places(x, blocks)
    low = np.empty(1, np.float32)
    for r in range(start, stop):
        i, group = r * blocks, r * blocks * groups
        s, z_ = scale + 2 * group, zero + group
        value = row_dot(variant, codes + 8 * bits * i, s, z_, x_codes, x_scale, shifts, blocks)
        dot_bytes(read_int64(table, 8 * A) + r * rank, rank, z, rank // 16 * 2, address_of(low))
        write_float(y, 4 * r, value + low[0])
    keep(low)


@jit
def _vnni_rows(table: int, start: int, stop: int, x: int, z: int, y: int) -> None:
    """The same; x: `split_x`."""
    codes, scale, zero = read_int64(table, 8 * CODES), read_int64(table, 8 * SCALE), read_int64(table, 8 * ZERO)
    rank, factor, bits = read_int64(table, 8 * RANK), read_int64(table, 8 * A), read_int64(table, 8 * BITS)
    blocks, groups = (read_int64(table, 8 * N) + GROUP - 1) // GROUP, read_int64(table, 8 * GROUPS)
    variant = (bits == 4) + 2 * (zero != 0) + 8 * (groups - 1)
    r = start
    while r < stop:
        i, group, four = r * blocks, r * blocks * groups, r + 4 <= stop
        s, a, out = scale + 2 * group, factor + r * rank, y + 4 * r
        rows_dot(variant + 4 * four, codes + 8 * bits * i, s, zero + group, blocks, x, a, z, rank, out)
        r += 4 if four else 1


@jit
def columns_of(table: int, chunk: int) -> tuple[int, int]:
    """Where the 64 rows from `chunk` on begin in column 0 of the refinement plane, and the bytes to the next column."""
    m, n = read_int64(table, 8 * M), read_int64(table, 8 * N)
    strip, pairs = chunk // (2 * GROUP), (m + GROUP - 1) // GROUP // 2
    address = read_int64(table, 8 * PLANE) + strip * n * GROUP + chunk % (2 * GROUP) // 2
    return address, GROUP if strip < pairs else GROUP // 2


@jit
def _refine(table: int, chunk: int, stop: int, channels: int, coefficients: int, count: int, y: int) -> None:
    """Add the open columns to the 64 rows that start at `chunk`."""
    row = read_int64(table, 8 * ROW)
    total = np.float32(0)
    for k in range(count):
        total += read_float(coefficients, 4 * k)
    sums = np.empty(GROUP, np.float32)
    address, stride = columns_of(table, chunk)
    add_columns(address, stride, channels, coefficients, count, address_of(sums))
    for i in range(GROUP):
        r = chunk + COLUMN_ORDER[i]
        if r < stop:
            refined = 16 * read_bfloat16(row, 2 * r) * (sums[i] - np.float32(1.5) * total)
            write_float(y, 4 * r, read_float(y, 4 * r) + refined)
    keep(sums)


@Kernel
def prepare(arguments: int, _: int) -> None:
    """What all chunks share: x as codes, z = B x and the open channels. For the arguments see `product`."""
    table, x = read_int64(arguments, 8 * TABLE), read_int64(arguments, 8 * X)
    n, bits, groups = read_int64(table, 8 * N), read_int64(table, 8 * BITS), read_int64(table, 8 * GROUPS)
    zero = -1 if read_int64(table, 8 * ZERO) else 8 if bits == 4 else 0
    codes = read_int64(arguments, 8 * ROUNDED)
    if read_int64(arguments, 8 * PATH) == VNNI:
        finite = split_x(x, n, bits, groups, zero, codes)
    else:
        finite = _round_blocks(x, n, bits, groups, zero, codes)
    count = -1
    if finite:
        count = 0
        _project(table, x, read_int64(arguments, 8 * Z))
        if read_int64(table, 8 * PLANE):
            channels, coefficients = read_int64(arguments, 8 * CHANNELS), read_int64(arguments, 8 * COEFFICIENTS)
            count = _open_channels(table, x, channels, coefficients)
    write_int64(arguments, 8 * OPEN, count)


@Kernel
def multiply(arguments: int, chunk: int) -> None:
    """A chunk of y, after `prepare`. For the arguments see `product`."""
    table, y = read_int64(arguments, 8 * TABLE), read_int64(arguments, 8 * Y)
    count, path, z = read_int64(arguments, 8 * OPEN), read_int64(arguments, 8 * PATH), read_int64(arguments, 8 * Z)
    m, rank = read_int64(table, 8 * M), read_int64(table, 8 * RANK)
    x, rows = read_int64(arguments, 8 * ROUNDED), read_int64(arguments, 8 * ROWS)
    start, stop = chunk * rows, min(chunk * rows + rows, m)
    if count < 0:
        for r in range(start, stop):
            write_float(y, 4 * r, np.float32(np.nan))
        return
    channels, coefficients = read_int64(arguments, 8 * CHANNELS), read_int64(arguments, 8 * COEFFICIENTS)
    for first in range(start, stop, GROUP):
        end = min(first + GROUP, stop)
        if count:
            address, stride = columns_of(table, first)
            prefetch_columns(address, stride, channels, count)
        if path == VNNI:
            _vnni_rows(table, first, end, x, z, y)
        else:
            _short_rows(table, first, end, x, z, y, path == PLAIN)
        for r in range(first, end):
            value = read_float(y, 4 * r)
            for c in range(rank // 16 * 16, rank):
                value += read_int8(read_int64(table, 8 * A), r * rank + c) * read_float(z, 4 * c)
            write_float(y, 4 * r, value)
        if count:
            _refine(table, first, end, channels, coefficients, count, y)


class Product:
    """One product as two rows of a program, its x and y to be given, and the memory that they need.

    tables: of matrices of one shape, any of which may be put in the place of the first (`choose`).
    memory: bytes that what the first row leaves for the second may take, from their number.
    """

    def __init__(self, *tables: int, memory: Callable[[int], Tensor] = scratch) -> None:
        table = tables[0]
        m, n, rank, plane = map(max, zip(*map(_shape, tables), strict=True))
        words, blocks = _words(table), -(-n // GROUP)
        sizes = [256 * blocks, 4 * rank, *((8 * n + 8, 4 * n + 8) if plane else (0, 0))]
        self.scratch = memory(sum(sizes) + LINE * (len(sizes) + 1))
        ends = np.cumsum([-self.scratch.data_ptr() % LINE] + [-(-size // LINE) * LINE for size in sizes])
        row_bytes = 8 * words[BITS] * blocks
        rows = team.chunk_rows(m, row_bytes, GROUP if plane else GROUP // 2)
        self.arguments = np.array([table, 0, 0, *(self.scratch.data_ptr() + ends[:4]), 0, PATHS[0], rows], np.int64)
        ahead = [(words[B], n * rank), (words[CODES], rows * row_bytes)]  # what can be fetched, if that is known
        prepared, multiplied = ahead if len(tables) == 1 else [(0, 0)] * 2
        self.rows = [
            team.row(prepare, self.arguments, 1, *prepared),
            team.row(multiply, self.arguments, -(-m // rows), *multiplied),
        ]
        self.program = team.program(self.rows)


def _words(table: int) -> ctypes.Array[ctypes.c_int64]:
    return (ctypes.c_int64 * TABLE_WORDS).from_address(table)


def _shape(table: int) -> tuple[int, int, int, bool]:
    """M, n, rank, and whether there is a plane."""
    words = _words(table)
    return words[M], words[N], words[RANK], words[PLANE] != 0


_products = threading.local()  # by shape: what a thread has used before


def _product(table: int) -> Product:
    """For a call of this thread alone."""
    known, key = vars(_products).setdefault("known", {}), (*_shape(table), PATHS[0])
    if key not in known:
        known[key] = Product(table)
    product: Product = known[key]
    product.arguments[TABLE] = table
    return product


@Kernel
def choose(arguments: int, _: int) -> None:
    """Let a product be that of one of several tables: their addresses, the number of one, and where it is wanted."""
    tables, number = read_int64(arguments, 0), read_int64(read_int64(arguments, 8), 0)
    write_int64(read_int64(arguments, 16), 0, read_int64(tables, 8 * number))


def chosen(x: Tensor, tables: Tensor, numbers: Tensor, m: int) -> Tensor:
    """Row s of y (rows, m) is row s of x (rows, n) by table number_s; `tables`: addresses, of groups of one shape."""
    rows = zip(x, tables[numbers].tolist(), strict=True)
    return torch.stack([gemv(row, table, m) for row, table in rows])


def gemv(x: Tensor, table: int, m: int) -> Tensor:
    """y (…, m) of one token x (…, n); `table` is the address of a `table_of`."""
    wide = x.detach().float().contiguous()
    y = torch.empty((*x.shape[:-1], m))
    product = _product(table)
    product.arguments[X], product.arguments[Y] = wide.data_ptr(), y.data_ptr()
    team.run_between(product.program)
    return y.to(x.dtype)
