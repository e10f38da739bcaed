"""Norms, rotary embeddings, rows of a table: one-chunk rows of a program. Dtypes are those of `elementwise.DTYPES`."""

from __future__ import annotations

import numpy as np
from numba import carray

from rankgate.ops.cpu.compile import Kernel, jit
from rankgate.ops.cpu.elementwise import SLOTS, TILE, load, rounded, stack, store
from rankgate.ops.cpu.vector import byte_pointer, float_pointer, integer_pointer, read_float, read_int64


@Kernel
def mean(arguments: int, chunk: int) -> None:
    """Of every row. Arguments: rows, width, dtype and address of x, of the result."""
    rows, width = read_int64(arguments, 0), read_int64(arguments, 8)
    dtype, x = read_int64(arguments, 16), read_int64(arguments, 24)
    target, out = read_int64(arguments, 32), read_int64(arguments, 40)
    slots = carray(float_pointer(stack()), (SLOTS, TILE))
    size = 4 if dtype == 0 else 2
    for r in range(rows):
        total = np.float32(0)
        for start in range(0, width, TILE):
            count = min(TILE, width - start)
            load(dtype, x + size * (r * width + start), 1, slots[0], count)
            for i in range(count):
                total += slots[0, i]
        slots[0, 0] = total / np.float32(width)
        rounded(target, slots[0], 1)
        store(target, out + (4 if target == 0 else 2) * r, 1, slots[0], 1)


@Kernel
def layer_norm(arguments: int, chunk: int) -> None:
    """Of every row. Arguments: rows, width, dtype, ε (bits of a float32); addresses of x, weight or 0, bias or 0, y."""
    rows, width, dtype = read_int64(arguments, 0), read_int64(arguments, 8), read_int64(arguments, 16)
    eps, x, weight = read_float(arguments, 24), read_int64(arguments, 32), read_int64(arguments, 40)
    bias, out = read_int64(arguments, 48), read_int64(arguments, 56)
    slots = carray(float_pointer(stack()), (SLOTS, TILE))
    size = 4 if dtype == 0 else 2
    for r in range(rows):
        total, squares = np.float64(0), np.float64(0)
        for start in range(0, width, TILE):
            count = min(TILE, width - start)
            load(dtype, x + size * (r * width + start), 1, slots[0], count)
            for i in range(count):
                total += slots[0, i]
        mean = np.float32(total / width)
        for start in range(0, width, TILE):
            count = min(TILE, width - start)
            load(dtype, x + size * (r * width + start), 1, slots[0], count)
            for i in range(count):
                squares += (slots[0, i] - mean) * (slots[0, i] - mean)
        factor = np.float32(1 / np.sqrt(squares / width + eps))
        for start in range(0, width, TILE):
            count = min(TILE, width - start)
            load(dtype, x + size * (r * width + start), 1, slots[0], count)
            if weight:
                load(dtype, weight + size * start, 1, slots[1], count)
            else:
                slots[1, :count] = 1
            if bias:
                load(dtype, bias + size * start, 1, slots[2], count)
            else:
                slots[2, :count] = 0
            for i in range(count):
                slots[0, i] = (slots[0, i] - mean) * factor * slots[1, i] + slots[2, i]
            rounded(dtype, slots[0], count)
            store(dtype, out + size * (r * width + start), 1, slots[0], count)


@Kernel
def rms_norm(arguments: int, chunk: int) -> None:
    """x · rsqrt(mean(x²) + ε) of every row, in float32. Arguments: rows, width, ε (its bits); addresses of x, y."""
    rows, width, eps = read_int64(arguments, 0), read_int64(arguments, 8), read_float(arguments, 16)
    x = carray(float_pointer(read_int64(arguments, 24)), (rows, width))
    y = carray(float_pointer(read_int64(arguments, 32)), (rows, width))
    for r in range(rows):
        total = np.float32(0)
        for i in range(width):
            total += x[r, i] * x[r, i]
        factor = np.float32(1) / np.sqrt(total / np.float32(width) + eps)
        for i in range(width):
            y[r, i] = x[r, i] * factor


@Kernel
def rotation(arguments: int, chunk: int) -> None:
    """x · cos + (−upper half of x, lower half of x) · sin of every row, each operation rounded to the dtype.

    Arguments: heads, tokens, half of the width, dtype; strides of heads and tokens of x, cos, sin, y; their addresses.
    """
    heads, tokens = read_int64(arguments, 0), read_int64(arguments, 8)
    half, dtype = read_int64(arguments, 16), read_int64(arguments, 24)
    slots = carray(float_pointer(stack()), (SLOTS, TILE))
    size, width = 4 if dtype == 0 else 2, 2 * half
    for h in range(heads):
        for t in range(tokens):
            for i in range(3):
                load(dtype, _row_of(arguments, i, size, h, t), 1, slots[i], width)
            for i in range(half):
                slots[3, i] = -slots[0, half + i] * slots[2, i]
                slots[3, half + i] = slots[0, i] * slots[2, half + i]
            for i in range(width):
                slots[1, i] *= slots[0, i]
            rounded(dtype, slots[1], width)
            rounded(dtype, slots[3], width)
            for i in range(width):
                slots[1, i] += slots[3, i]
            rounded(dtype, slots[1], width)
            store(dtype, _row_of(arguments, 3, size, h, t), 1, slots[1], width)


@jit
def _row_of(arguments: int, i: int, size: int, h: int, t: int) -> int:
    """The address of a row of the i-th tensor of `rotation`."""
    strides = arguments + 32 + 16 * i
    place = h * read_int64(strides, 0) + t * read_int64(strides, 8)
    return read_int64(arguments, 96 + 8 * i) + size * place


@Kernel
def embedding(arguments: int, chunk: int) -> None:
    """Rows of a table. Arguments: indices, rows of the table, bytes of a row; addresses of indices (int64), table, y.

    A row that the table does not have is not a number: all its bits are one.
    """
    count, rows, width = read_int64(arguments, 0), read_int64(arguments, 8), read_int64(arguments, 16)
    indices = carray(integer_pointer(read_int64(arguments, 24)), count)
    table = carray(byte_pointer(read_int64(arguments, 32)), (rows, width))
    out = carray(byte_pointer(read_int64(arguments, 40)), (count, width))
    for i in range(count):
        if 0 <= indices[i] < rows:
            out[i, :] = table[indices[i], :]
        else:
            out[i, :] = -1
