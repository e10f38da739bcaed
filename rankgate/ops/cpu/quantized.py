"""One token on the CPU: the matrix-vector product of a quantised input group, straight from its packed bytes.

At batch 1 a layer costs what its bytes cost to read, so codes are unpacked in registers and never stored. A whole
group (q/k/v, gate/up) is one program (`team`): x in 16 bits, z = B x and the list of open channels are small and come
first, then threads take chunks of 64 rows and do for them Q x, A z and the open columns of the refinement plane.
Channels whose gate is closed are not read.

The result is `QuantizedGroup.reference` but for float32 rounding and the 16-bit x: in each block of 64 inputs x is
rounded to steps of max|x| / 32767, so row i is off by at most Σ_blocks max|x| / 65534 · Σ_j |Q_ij|.

A group is described to the kernel by a table of addresses: unpacking ten tensors would cost more than a small product.
Numba compiles at the first call, some seconds, and keeps the result on disk.
"""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
import torch
from numba import carray
from torch import Tensor

from rankgate.ops.cpu import team
from rankgate.ops.cpu.compile import Kernel, jit
from rankgate.ops.cpu.vector import (
    GROUP,
    LANES,
    add_columns,
    byte_pointer,
    column_order,
    dot_bytes,
    float_pointer,
    int_pointer,
    integer_pointer,
    prefetch_columns,
    read_bfloat16,
    read_float,
    read_int8,
    read_int32,
    read_int64,
    row_dot_bytes,
    row_dot_bytes_zero,
    row_dot_nibbles,
    row_dot_nibbles_zero,
    row_order,
    short_pointer,
    write_float,
    write_int64,
)
from rankgate.quantized import NIBBLE_ZERO, table_of

# words of `quantized.table_of`
M, N, BITS, RANK, CODES, SCALE, ZERO, A, B, COMPONENT, PLANE, ROW, COLUMN, THRESHOLD = range(14)
ROW_ORDER, COLUMN_ORDER = np.array(row_order()), np.array(column_order())
MOST_PARTS = 256  # chunks of an unpacked matrix
LARGEST = np.float32(32767)
EXPONENT = np.int32(0x7F800000)


@jit
def _is_finite(x: int, n: int) -> bool:
    """Whether the exponent of no float32 at `x` is all ones: arithmetic below assumes it and would hide a NaN."""
    found = np.int32(0)
    for j in range(n):
        found |= np.int32((read_int32(x, 4 * j) & EXPONENT) == EXPONENT)
    return found == 0


@jit
def _round_blocks(table: int, x: int, codes: Any, scale: Any, shifts: Any) -> None:
    """X as 16-bit codes with a scale per block, and per block what `row_dot` adds to Σ q x for the zero."""
    n, bits, zero = read_int64(table, 8 * N), read_int64(table, 8 * BITS), read_int64(table, 8 * ZERO)
    block = np.zeros(GROUP, np.float32)
    for g in range(scale.size):
        start, count = g * GROUP, min(GROUP, n - g * GROUP)
        block[count:] = 0
        largest = np.float32(0)
        for i in range(count):
            block[i] = read_float(x, 4 * (start + i))
            largest = max(largest, abs(block[i]))
        scale[g] = largest / LARGEST
        inverse = LARGEST / largest if largest > 0 else np.float32(0)
        total = np.int32(0)
        for i in range(GROUP):
            code = np.int32(np.rint(block[ROW_ORDER[i] if bits == 4 else i] * inverse))
            codes[start + i] = code
            total += code
        shifts[g] = -total if zero else -8 * total if bits == 4 else 0


@jit
def _project(table: int, x: int, z: Any) -> None:
    """Z = s B x."""
    n, factor, component = read_int64(table, 8 * N), read_int64(table, 8 * B), read_int64(table, 8 * COMPONENT)
    for c in range(z.size):
        total = dot_bytes(factor + c * n, x, n // LANES)
        for j in range(n // LANES * LANES, n):
            total += read_int8(factor, c * n + j) * read_float(x, 4 * j)
        z[c] = total * read_float(component, 4 * c)


@jit
def _open_channels(table: int, x: int, channels: Any, coefficients: Any) -> int:
    """The channels whose gate is open, what each column is multiplied with, and how many there are."""
    threshold, column = read_int64(table, 8 * THRESHOLD), read_int64(table, 8 * COLUMN)
    count = 0
    for j in range(channels.size):
        value = read_float(x, 4 * j)
        if abs(value) > read_bfloat16(threshold, 2 * j):
            channels[count] = j
            coefficients[count] = value * read_bfloat16(column, 2 * j)
            count += 1
    return count


@jit
def _base_row(table: int, r: int, x: int, x_scale: int, shifts: int, blocks: int) -> float:
    """Row r of Q x."""
    codes, scale, zero = read_int64(table, 8 * CODES), read_int64(table, 8 * SCALE), read_int64(table, 8 * ZERO)
    i = r * blocks
    if read_int64(table, 8 * BITS) == 4:
        if zero:
            return row_dot_nibbles_zero(codes + 32 * i, scale + 2 * i, zero + i, x, x_scale, shifts, blocks)
        return row_dot_nibbles(codes + 32 * i, scale + 2 * i, zero, x, x_scale, shifts, blocks)
    if zero:
        return row_dot_bytes_zero(codes + 64 * i, scale + 2 * i, zero + i, x, x_scale, shifts, blocks)
    return row_dot_bytes(codes + 64 * i, scale + 2 * i, zero, x, x_scale, shifts, blocks)


@jit
def _columns_of(table: int, chunk: int) -> tuple[int, int]:
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
    address, stride = _columns_of(table, chunk)
    add_columns(address, stride, channels, coefficients, count, sums.ctypes.data)
    for i in range(GROUP):
        r = chunk + COLUMN_ORDER[i]
        if r < stop:
            refined = 16 * read_bfloat16(row, 2 * r) * (sums[i] - np.float32(1.5) * total)
            write_float(y, 4 * r, read_float(y, 4 * r) + refined)


@Kernel
def _prepare(arguments: int, _: int) -> None:
    """What all chunks share: x in 16 bits, z = B x and the open channels. For the arguments see `gemv`."""
    table, x = read_int64(arguments, 0), read_int64(arguments, 8)
    n, rank = read_int64(table, 8 * N), read_int64(table, 8 * RANK)
    blocks = (n + GROUP - 1) // GROUP
    finite = _is_finite(x, n)
    count = 0
    if finite:
        codes = carray(short_pointer(read_int64(arguments, 24)), blocks * GROUP)
        scale = carray(float_pointer(read_int64(arguments, 32)), blocks)
        shifts = carray(int_pointer(read_int64(arguments, 40)), blocks)
        _round_blocks(table, x, codes, scale, shifts)
        _project(table, x, carray(float_pointer(read_int64(arguments, 48)), rank))
        if read_int64(table, 8 * PLANE):
            channels = carray(integer_pointer(read_int64(arguments, 56)), n)
            count = _open_channels(table, x, channels, carray(float_pointer(read_int64(arguments, 64)), n))
    write_int64(arguments, 72, count if finite else -1)


@Kernel
def _multiply(arguments: int, chunk: int) -> None:
    """64 rows of y. For the arguments see `gemv`."""
    table, y, codes = read_int64(arguments, 0), read_int64(arguments, 16), read_int64(arguments, 24)
    scale, shifts, z = read_int64(arguments, 32), read_int64(arguments, 40), read_int64(arguments, 48)
    channels, coefficients = read_int64(arguments, 56), read_int64(arguments, 64)
    count = read_int64(arguments, 72)
    m, n = read_int64(table, 8 * M), read_int64(table, 8 * N)
    rank, factor = read_int64(table, 8 * RANK), read_int64(table, 8 * A)
    blocks = (n + GROUP - 1) // GROUP
    start, stop = chunk * GROUP, min(chunk * GROUP + GROUP, m)
    if count < 0:
        for r in range(start, stop):
            write_float(y, 4 * r, np.float32(np.nan))
        return
    if count:
        address, stride = _columns_of(table, start)
        prefetch_columns(address, stride, channels, count)
    for r in range(start, stop):
        value = _base_row(table, r, codes, scale, shifts, blocks)
        value += dot_bytes(factor + r * rank, z, rank // LANES)
        for c in range(rank // LANES * LANES, rank):
            value += read_int8(factor, r * rank + c) * read_float(z, 4 * c)
        write_float(y, 4 * r, value)
    if count:
        _refine(table, start, stop, channels, coefficients, count, y)


@Kernel
def _dequantize(arguments: int, chunk: int) -> None:
    """A chunk of rows of Q. Arguments: m, blocks, bits, rows of a chunk; addresses of codes, scale, zero and Q."""
    m, blocks, bits = read_int64(arguments, 0), read_int64(arguments, 8), read_int64(arguments, 16)
    rows, half = read_int64(arguments, 24), GROUP // 2
    width = half if bits == 4 else GROUP
    codes = carray(byte_pointer(read_int64(arguments, 32)), (m * blocks, width))
    scale, zero = read_int64(arguments, 40), carray(byte_pointer(read_int64(arguments, 48)), m * blocks)
    out = carray(float_pointer(read_int64(arguments, 56)), (m * blocks, GROUP))
    for i in range(chunk * rows * blocks, min((chunk + 1) * rows, m) * blocks):
        s = read_bfloat16(scale, 2 * i)
        shift = -s * np.float32(zero[i])
        if bits == 4:
            for j in range(half):
                out[i, j] = s * np.float32(np.int32(codes[i, j]) & 15) + shift
            for j in range(half):
                out[i, half + j] = s * np.float32((np.int32(codes[i, j]) >> 4) & 15) + shift
        else:
            for j in range(GROUP):
                out[i, j] = s * np.float32(codes[i, j]) + shift


def unpack(codes: Tensor, scale: Tensor, zero: Tensor | None, n: int) -> Tensor:
    """`QuantizedMatrix.dequantize` (m × n, float32), some times faster."""
    (m, blocks), bits = scale.shape, 4 if codes.dtype == torch.uint8 else 8
    if zero is None:
        zero = torch.full(scale.shape, NIBBLE_ZERO if bits == 4 else 0, dtype=torch.int8)
    out = torch.empty(m, blocks * GROUP)
    rows = -(-m // MOST_PARTS)
    addresses = [t.data_ptr() for t in (codes.contiguous(), scale.contiguous(), zero.contiguous(), out)]
    words = np.array([m, blocks, bits, rows, *addresses], np.int64)
    team.run(np.array([team.row(_dequantize, words, -(-m // rows))], np.int64))
    return out[:, :n]


def gemv(x: Tensor, table: int, m: int) -> Tensor:
    """y (…, m) for each token of x (…, n); `table` is the address of a `table_of`.

    The arguments of both kernels: table, x, y; then what the first hands to the second: x as codes (int16), scales and
    shifts, z, channels and coefficients, and how many channels are open, or -1 if x is not finite.
    """
    wide = x.detach().float().contiguous()
    y = torch.empty((*x.shape[:-1], m))
    n = x.shape[-1]
    blocks = -(-n // GROUP)
    rank = int(ctypes.c_int64.from_address(table + 8 * RANK).value)
    scratch = np.empty(blocks * GROUP + blocks * 2 + rank + 3 * n + 8, np.int64)
    starts = np.cumsum([0, blocks * GROUP, blocks, blocks, rank, n]) * 8 + scratch.ctypes.data
    words = np.array([table, 0, 0, *starts, 0], np.int64)
    program = np.array([team.row(_prepare, words, 1), team.row(_multiply, words, -(-m // GROUP))], np.int64)
    for token in range(x.numel() // n):
        words[1], words[2] = wide.data_ptr() + 4 * n * token, y.data_ptr() + 4 * m * token
        team.run(program)
    return y.to(x.dtype)


def gemv_of(x: Tensor, parts: list[Tensor | None]) -> Tensor:
    """The same from `QuantizedGroup.parts`."""
    table = table_of(x.shape[-1], parts)
    return gemv(x, table.ctypes.data, int(table[M]))
