"""64 rows of a quantised input group (a strip), unpacked for `ops.cpu.many` into the layout of `ops.cpu.tiles`."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import carray

from rankgate.ops.cpu.compile import jit
from rankgate.ops.cpu.quantized import BITS, CODES, GROUPS, RANK, ROW, SCALE, ZERO, A, M, N, columns_of
from rankgate.ops.cpu.tiles import GROUP, STEP, unpack_bytes, unpack_columns, unpack_nibbles
from rankgate.ops.cpu.vector import (
    LINE,
    ask,
    float_pointer,
    read_bfloat16,
    read_int8,
    read_int32,
    read_int64,
    write_float,
    write_int32,
)

TABLE = 0  # word of the arguments of kernels
ASKED = GROUP // 2  # rows of the next strip that are asked for while this one is unpacked, not multiplied


@jit
def floats(address: int, count: int) -> Any:
    return carray(float_pointer(address), count)


@jit
def of_table(arguments: int, word: int) -> int:
    return read_int64(read_int64(arguments, 8 * TABLE), 8 * word)


@jit
def blocks_of(arguments: int, word: int) -> int:
    """Of 64 in a dimension of the table."""
    return (of_table(arguments, word) + GROUP - 1) // GROUP


@jit
def unpack(arguments: int, first: int, w: int, scale: int, zero: int) -> None:
    """64 rows of Q from `first` on, the last one again behind the end: 16 nibbles or bytes + 128, and s and z to it.

    Of the 64 rows after them the first `ASKED` are asked for, and their scales.
    """
    m, bits, blocks = of_table(arguments, M), of_table(arguments, BITS), blocks_of(arguments, N)
    codes, scales, zeros = of_table(arguments, CODES), of_table(arguments, SCALE), of_table(arguments, ZERO)
    stride, groups = blocks * GROUP * bits // 8, blocks * of_table(arguments, GROUPS)
    for i in range(0, GROUP, 16):
        row = min(first + i, m - 1)
        start, last, out = codes + row * stride, m - 1 - row, w + STEP * i
        ahead = codes + (first + GROUP + i) * stride if i < ASKED else start
        if bits == 4:
            unpack_nibbles(start, stride, last, blocks, out, ahead)
        else:
            unpack_bytes(start, stride, last, blocks, out, ahead)
    for offset in range(0, 2 * GROUP * groups, LINE):
        ask(scales + 2 * (first + GROUP) * groups + offset)
    unit, middle = (np.float32(1 / 16), 8) if bits == 4 else (np.float32(1), 0)
    for i in range(GROUP):
        row = min(first + i, m - 1) * groups
        for g in range(groups):
            write_float(scale, 4 * (GROUP * g + i), read_bfloat16(scales, 2 * (row + g)) * unit)
        if zeros:
            for g in range(groups):
                z = np.int32(read_int8(zeros, row + g)) - middle
                write_int32(zero, 4 * (GROUP * g + i), 16 * z if bits == 4 else z)


@jit
def unpack_factor(arguments: int, first: int, a: int) -> None:
    """The same rows of A, as bytes + 128; what is beyond the rank meets a z of zero."""
    m, rank, factor = of_table(arguments, M), of_table(arguments, RANK), of_table(arguments, A)
    end, flip = factor + m * rank, np.int32(-2139062144)  # 0x80808080
    for i in range(min(GROUP, m - first)):
        at = factor + (first + i) * rank
        for step in range((rank + STEP - 1) // STEP):
            if at + STEP <= end:
                word = read_int32(at, 0)
            else:
                word = np.int32(0)
                for k in range(end - at):
                    word |= (np.int32(read_int8(at, k)) & 255) << (8 * k)
            write_int32(a, STEP * (GROUP * step + i), word ^ flip)
            at += STEP


@jit
def unpack_plane(arguments: int, first: int, w: int, scale: int) -> None:
    """The same rows of the refinement plane: 16 nibbles, and the factor of every row for each block."""
    n, blocks = of_table(arguments, N), blocks_of(arguments, N)
    codes, stride = columns_of(read_int64(arguments, 8 * TABLE), first)
    unpack_columns(codes, stride, n - 1, blocks, w)
    for g in range(blocks):
        row_factors(arguments, first, scale + 4 * GROUP * g)


@jit
def row_factors(arguments: int, first: int, out: int) -> None:
    """Of the refinement, for 16 times a code."""
    for i in range(min(GROUP, of_table(arguments, M) - first)):
        write_float(out, 4 * i, read_bfloat16(of_table(arguments, ROW), 2 * (first + i)) / np.float32(16))
