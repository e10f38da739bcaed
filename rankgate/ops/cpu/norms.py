"""Means, layer norms and rows of a table: one-chunk rows of a program. Dtypes are numbers of `elementwise.DTYPES`."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import carray

from rankgate.ops.cpu.compile import Kernel, jit
from rankgate.ops.cpu.elementwise import BFLOAT16, FLOAT16, SLOTS, TILE, load, stack, store, unary
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
        _rounded(target, slots[0], 1)
        store(target, out + (4 if target == 0 else 2) * r, 1, slots[0], 1)


@jit
def _rounded(dtype: int, values: Any, count: int) -> None:
    if dtype == 1:
        unary(BFLOAT16, values, values, count)
    elif dtype == 2:
        unary(FLOAT16, values, values, count)


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
            _rounded(dtype, slots[0], count)
            store(dtype, out + size * (r * width + start), 1, slots[0], count)


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
