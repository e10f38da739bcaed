"""One token on the CPU: the matrix-vector product of a quantised input group, straight from its packed bytes.

At batch 1 a layer costs what its bytes cost to read, so codes are unpacked in registers and never stored. A whole
group (q/k/v, gate/up) is one parallel region: x in 16 bits, z = B x and the list of open channels are small and come
first, then each thread takes chunks of 64 rows and does for them Q x, A z and the open columns of the refinement plane.
Channels whose gate is closed are not read.

The result is `QuantizedGroup.reference` but for float32 rounding and the 16-bit x: in each block of 64 inputs x is
rounded to steps of max|x| / 32767, so row i is off by at most Σ_blocks max|x| / 65534 · Σ_j |Q_ij|.

A group is described to the kernel by a table of addresses: unpacking ten tensors would cost more than a small product.
Numba compiles at the first call, some seconds, and keeps the result on disk.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
import torch
from numba import njit, prange
from torch import Tensor

from rankgate.ops.cpu.vector import (
    GROUP,
    LANES,
    add_columns,
    column_order,
    dot_bytes,
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
    write_float,
)
from rankgate.quantized import NIBBLE_ZERO, table_of

# words of `quantized.table_of`
M, N, BITS, RANK, CODES, SCALE, ZERO, A, B, COMPONENT, PLANE, ROW, COLUMN, THRESHOLD = range(14)
ROW_ORDER, COLUMN_ORDER = np.array(row_order()), np.array(column_order())
LARGEST = np.float32(32767)
EXPONENT = np.int32(0x7F800000)


@njit(cache=True, nogil=True)
def _is_finite(x: int, n: int) -> bool:
    """Whether the exponent of no float32 at `x` is all ones: arithmetic below assumes it and would hide a NaN."""
    found = np.int32(0)
    for j in range(n):
        found |= np.int32((read_int32(x, 4 * j) & EXPONENT) == EXPONENT)
    return found == 0


@njit(cache=True, fastmath=True, nogil=True)
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


@njit(cache=True, fastmath=True, nogil=True)
def _project(table: int, x: int, z: Any) -> None:
    """Z = s B x."""
    n, factor, component = read_int64(table, 8 * N), read_int64(table, 8 * B), read_int64(table, 8 * COMPONENT)
    for c in range(z.size):
        total = dot_bytes(factor + c * n, x, n // LANES)
        for j in range(n // LANES * LANES, n):
            total += read_int8(factor, c * n + j) * read_float(x, 4 * j)
        z[c] = total * read_float(component, 4 * c)


@njit(cache=True, fastmath=True, nogil=True)
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


@njit(cache=True, fastmath=True, nogil=True)
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


@njit(cache=True, fastmath=True, nogil=True)
def _columns_of(table: int, chunk: int) -> tuple[int, int]:
    """Where the 64 rows from `chunk` on begin in column 0 of the refinement plane, and the bytes to the next column."""
    m, n = read_int64(table, 8 * M), read_int64(table, 8 * N)
    strip, pairs = chunk // (2 * GROUP), (m + GROUP - 1) // GROUP // 2
    address = read_int64(table, 8 * PLANE) + strip * n * GROUP + chunk % (2 * GROUP) // 2
    return address, GROUP if strip < pairs else GROUP // 2


@njit(cache=True, fastmath=True, nogil=True)
def _refine(table: int, chunk: int, stop: int, channels: Any, coefficients: Any, count: int, y: int) -> None:
    """Add the open columns to the 64 rows that start at `chunk`."""
    row = read_int64(table, 8 * ROW)
    total = np.float32(0)
    for k in range(count):
        total += coefficients[k]
    sums = np.empty(GROUP, np.float32)
    address, stride = _columns_of(table, chunk)
    add_columns(address, stride, channels.ctypes.data, coefficients.ctypes.data, count, sums.ctypes.data)
    for i in range(GROUP):
        r = chunk + COLUMN_ORDER[i]
        if r < stop:
            refined = 16 * read_bfloat16(row, 2 * r) * (sums[i] - np.float32(1.5) * total)
            write_float(y, 4 * r, read_float(y, 4 * r) + refined)


@njit(cache=True, fastmath=True, nogil=True, parallel=True)
def _gemv(table: int, x: int, y: int, threads: int) -> None:
    m, n = read_int64(table, 8 * M), read_int64(table, 8 * N)
    rank, factor = read_int64(table, 8 * RANK), read_int64(table, 8 * A)
    if not _is_finite(x, n):
        for r in range(m):
            write_float(y, 4 * r, np.float32(np.nan))
        return
    blocks = (n + GROUP - 1) // GROUP
    codes, shifts, scale = np.empty(blocks * GROUP, np.int16), np.empty(blocks, np.int32), np.empty(blocks, np.float32)
    _round_blocks(table, x, codes, scale, shifts)
    z = np.empty(rank, np.float32)
    _project(table, x, z)
    count = 0
    channels, coefficients = np.empty(n, np.int64), np.empty(n, np.float32)
    if read_int64(table, 8 * PLANE):
        count = _open_channels(table, x, channels, coefficients)
    chunks = (m + GROUP - 1) // GROUP
    for t in prange(threads):
        stop = min(chunks * (t + 1) // threads * GROUP, m)
        for chunk in range(chunks * t // threads * GROUP, stop, GROUP):
            if count:
                address, stride = _columns_of(table, chunk)
                prefetch_columns(address, stride, channels.ctypes.data, count)
            for r in range(chunk, min(chunk + GROUP, stop)):
                value = _base_row(table, r, codes.ctypes.data, scale.ctypes.data, shifts.ctypes.data, blocks)
                value += dot_bytes(factor + r * rank, z.ctypes.data, rank // LANES)
                for c in range(rank // LANES * LANES, rank):
                    value += read_int8(factor, r * rank + c) * z[c]
                write_float(y, 4 * r, value)
            if count:
                _refine(table, chunk, stop, channels, coefficients, count, y)


@njit(cache=True, fastmath=True, nogil=True, parallel=True)
def _dequantize(codes: Any, scale: Any, zero: Any, out: Any) -> None:
    """out (m, padded n) from codes (m, ·), scale (m, blocks) as the int16 bits of bfloat16 and zero (m, blocks)."""
    m, blocks = scale.shape
    half = GROUP // 2
    nibbles = codes.shape[1] == blocks * half
    for r in prange(m):
        for g in range(blocks):
            s = read_bfloat16(scale.ctypes.data, 2 * (r * blocks + g))
            shift = -s * np.float32(zero[r, g])
            block = out[r, g * GROUP : (g + 1) * GROUP]
            if nibbles:
                packed = codes[r, g * half : (g + 1) * half]
                for i in range(half):
                    block[i] = s * np.float32(np.int32(packed[i]) & 15) + shift
                for i in range(half):
                    block[half + i] = s * np.float32((np.int32(packed[i]) >> 4) & 15) + shift
            else:
                packed = codes[r, g * GROUP : (g + 1) * GROUP]
                for i in range(GROUP):
                    block[i] = s * np.float32(packed[i]) + shift


def unpack(codes: Tensor, scale: Tensor, zero: Tensor | None, n: int) -> Tensor:
    """`QuantizedMatrix.dequantize` (m × n, float32), some times faster."""
    (m, blocks), bits = scale.shape, 4 if codes.dtype == torch.uint8 else 8
    if zero is None:
        zero = torch.full(scale.shape, NIBBLE_ZERO if bits == 4 else 0, dtype=torch.int8)
    out = torch.empty(m, blocks * GROUP)
    halves = scale.detach().view(torch.int16)
    _dequantize(codes.detach().numpy(), halves.numpy(), zero.detach().numpy(), out.numpy())
    return out[:, :n]


def gemv(x: Tensor, table: int, m: int) -> Tensor:
    """y (…, m) for each token of x (…, n); `table` is the address of a `table_of`."""
    wide = x.detach().float().contiguous()
    y = torch.empty((*x.shape[:-1], m))
    source, target, n = wide.data_ptr(), y.data_ptr(), x.shape[-1]
    for token in range(x.numel() // n):
        _gemv(table, source + 4 * n * token, target + 4 * m * token, numba.config.NUMBA_NUM_THREADS)
    return y.to(x.dtype)


def gemv_of(x: Tensor, parts: list[Tensor | None]) -> Tensor:
    """The same from `QuantizedGroup.parts`."""
    table = table_of(x.shape[-1], parts)
    return gemv(x, table.ctypes.data, int(table[M]))
