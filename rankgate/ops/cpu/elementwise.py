"""Chains of operations on every element, as one row of a program.

A chain is a list of *instructions* on slots of 768 float32 values: load from a tensor (strided, of any stored dtype),
one of the functions below, round to a 16-bit dtype, store. It runs over all elements tile by tile, so what lies between
two operations stays in the nearest cache. Rounding after every operation is an instruction: the results are those of
torch's operations in that dtype, which compute in float32, too.

    arguments      instructions, four sizes (three outer ones and the inner one), tiles of a chunk, then
    instruction    code, slot of the result, of the first and second operand, a number (bits of a float32); for loads
                   and stores the address, dtype, inner stride and outer strides, in elements
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from llvmlite import ir
from numba import carray, types
from numba.extending import intrinsic

from rankgate.ops.cpu.compile import Kernel, jit
from rankgate.ops.cpu.vector import (
    byte_pointer,
    float_pointer,
    half_pointer,
    int_pointer,
    integer_pointer,
    read_float,
    read_int64,
)
from rankgate.ops.cpu.vnni import as_float

TILE, SLOTS = 768, 32
HEADER, INSTRUCTION = 6, 11  # words
DTYPES = torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.bool, torch.int32
# codes of instructions, those of two operands from ADD to MINIMUM
LOAD, STORE, BFLOAT16, FLOAT16, ADD, SUB, RSUB, MUL, DIV, POW, GT, LT, MAXIMUM, MINIMUM, FILL = range(15)
NEG, ABS, SQRT, RSQRT, RECIPROCAL, SQUARE, CUBE, RELU = range(15, 23)
EXP, LOG, TANH, SIGMOID, SILU, GELU, GELU_TANH, COS, SIN, SOFTPLUS = range(23, 33)
EXACT = {"fastmath": {"contract"}, "inline": "always"}
LOG2E, LN2_HIGH, LN2_LOW = np.float32(1.44269504), np.float32(0.693359375), np.float32(-2.12194440e-4)
TERMS = tuple(np.float32(1 / math.factorial(i)) for i in range(8))


@intrinsic
def _bits(_: Any, value: Any) -> Any:
    """Of a float32."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], ir.IntType(32))

    return types.int32(types.float32), codegen


@intrinsic
def _half(_: Any, value: Any) -> Any:
    """The bits of the nearest float16."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(builder.fptrunc(arguments[0], ir.HalfType()), ir.IntType(16))

    return types.uint16(types.float32), codegen


@intrinsic
def _from_half(_: Any, bits: Any) -> Any:
    """The float32 that a float16 stands for."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.fpext(builder.bitcast(arguments[0], ir.HalfType()), ir.FloatType())

    return types.float32(types.uint16), codegen


@intrinsic
def stack(_: Any) -> Any:
    """The address of `SLOTS` · `TILE` float32 values that live as long as the function."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        with builder.goto_entry_block():
            block = builder.alloca(ir.ArrayType(ir.FloatType(), SLOTS * TILE))
            block.align = 64
        return builder.ptrtoint(block, ir.IntType(64))

    return types.int64(), codegen


@jit(**EXACT)
def round_bfloat16(value: float) -> Any:
    """The nearest bfloat16, ties to even."""
    bits = np.int64(_bits(np.float32(value))) & 0xFFFFFFFF
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
    kept = (bits | 0x400000) & 0xFFFF0000
    return as_float(np.int32(kept if bits & 0x7FFFFFFF > 0x7F800000 else rounded))


@jit(**EXACT)
def exp(value: float) -> Any:
    """e^value, within 2 units in the last place: 2^k times a polynomial of the rest."""
    x = min(max(np.float32(value), np.float32(-87.3)), np.float32(89.0))
    k = np.floor(x * LOG2E + np.float32(0.5))
    r = (x - k * LN2_HIGH) - k * LN2_LOW
    y = TERMS[7]
    y = y * r + TERMS[6]
    y = y * r + TERMS[5]
    y = y * r + TERMS[4]
    y = y * r + TERMS[3]
    y = y * r + TERMS[2]
    y = y * r + TERMS[1]
    y = y * r + TERMS[0]
    half = np.int32(k) >> np.int32(1)
    y = y * as_float(np.int32((half + np.int32(127)) << np.int32(23)))
    y = y * as_float(np.int32((np.int32(k) - half + np.int32(127)) << np.int32(23)))
    low, nan = np.float32(value) < np.float32(-87.3), np.float32(value) != np.float32(value)
    return np.float32(value) if nan else np.float32(0) if low else y


@jit(**EXACT)
def sigmoid(value: float) -> Any:
    return np.float32(1) / (np.float32(1) + exp(-value))


@jit(**EXACT)
def tanh(value: float) -> Any:
    x = np.float32(value)
    a = abs(x)
    e = exp(np.float32(-2) * a)
    large = (np.float32(1) - e) / (np.float32(1) + e)
    s = x * x
    small = a * (np.float32(1) - s * (np.float32(1 / 3) - s * (np.float32(2 / 15) - s * np.float32(17 / 315))))
    y = small if a < np.float32(0.25) else large
    return -y if x < 0 else y


@jit(inline="always")
def _size(dtype: int) -> int:
    return 8 if dtype == 3 else 4 if dtype in (0, 5) else 1 if dtype == 4 else 2


@jit
def load(dtype: int, address: int, stride: int, out: Any, count: int) -> None:  # noqa: PLR0912 (a branch for each instruction)
    """`count` values of a stored dtype, `stride` elements apart, as float32."""
    size = (count - 1) * stride + 1
    if dtype == 0:
        floats = carray(float_pointer(address), size)
        if stride == 1:
            for i in range(count):
                out[i] = floats[i]
        else:
            for i in range(count):
                out[i] = floats[i * stride]
    elif dtype == 1:
        halves = carray(half_pointer(address), size)
        for i in range(count):
            out[i] = as_float(np.int32(np.uint32(halves[i * stride]) << np.uint32(16)))
    elif dtype == 2:
        halves = carray(half_pointer(address), size)
        for i in range(count):
            out[i] = _from_half(halves[i * stride])
    elif dtype == 3:
        integers = carray(integer_pointer(address), size)
        for i in range(count):
            out[i] = integers[i * stride]
    elif dtype == 4:
        flags = carray(byte_pointer(address), size)
        for i in range(count):
            out[i] = flags[i * stride] != 0
    else:
        words = carray(int_pointer(address), size)
        for i in range(count):
            out[i] = words[i * stride]


@jit
def store(dtype: int, address: int, stride: int, values: Any, count: int) -> None:  # noqa: PLR0912 (a branch for each instruction)
    """The inverse of `load`, of values that the dtype has."""
    size = (count - 1) * stride + 1
    if dtype == 0:
        floats = carray(float_pointer(address), size)
        if stride == 1:
            for i in range(count):
                floats[i] = values[i]
        else:
            for i in range(count):
                floats[i * stride] = values[i]
    elif dtype == 1:
        halves = carray(half_pointer(address), size)
        for i in range(count):
            halves[i * stride] = np.uint16((np.uint32(_bits(values[i])) >> np.uint32(16)) & np.uint32(0xFFFF))
    elif dtype == 2:
        halves = carray(half_pointer(address), size)
        for i in range(count):
            halves[i * stride] = _half(values[i])
    elif dtype == 3:
        integers = carray(integer_pointer(address), size)
        for i in range(count):
            integers[i * stride] = np.int64(values[i])
    elif dtype == 4:
        flags = carray(byte_pointer(address), size)
        for i in range(count):
            flags[i * stride] = np.int8(values[i] != 0)
    else:
        words = carray(int_pointer(address), size)
        for i in range(count):
            words[i * stride] = np.int32(values[i])


@jit
def _binary(code: int, out: Any, a: Any, b: Any, count: int) -> None:  # noqa: PLR0912 (a branch for each instruction)
    if code == ADD:
        for i in range(count):
            out[i] = a[i] + b[i]
    elif code == SUB:
        for i in range(count):
            out[i] = a[i] - b[i]
    elif code == RSUB:
        for i in range(count):
            out[i] = b[i] - a[i]
    elif code == MUL:
        for i in range(count):
            out[i] = a[i] * b[i]
    elif code == DIV:
        for i in range(count):
            out[i] = a[i] / b[i]
    elif code == POW:
        for i in range(count):
            out[i] = np.float32(float(a[i]) ** float(b[i]))
    elif code == GT:
        for i in range(count):
            out[i] = a[i] > b[i]
    elif code == LT:
        for i in range(count):
            out[i] = a[i] < b[i]
    elif code == MAXIMUM:
        for i in range(count):
            out[i] = a[i] if a[i] > b[i] or a[i] != a[i] else b[i]
    elif code == MINIMUM:
        for i in range(count):
            out[i] = a[i] if a[i] < b[i] or a[i] != a[i] else b[i]


@jit
def unary(code: int, out: Any, a: Any, count: int) -> None:  # noqa: PLR0912 (a branch for each instruction)
    if code == BFLOAT16:
        for i in range(count):
            out[i] = round_bfloat16(a[i])
    elif code == FLOAT16:
        for i in range(count):
            out[i] = _from_half(_half(a[i]))
    elif code == NEG:
        for i in range(count):
            out[i] = -a[i]
    elif code == ABS:
        for i in range(count):
            out[i] = abs(a[i])
    elif code == SQRT:
        for i in range(count):
            out[i] = np.sqrt(a[i])
    elif code == RSQRT:
        for i in range(count):
            out[i] = np.float32(1) / np.sqrt(a[i])
    elif code == RECIPROCAL:
        for i in range(count):
            out[i] = np.float32(1) / a[i]
    elif code == SQUARE:
        for i in range(count):
            out[i] = a[i] * a[i]
    elif code == CUBE:
        for i in range(count):
            out[i] = a[i] * a[i] * a[i]
    elif code == RELU:
        for i in range(count):
            out[i] = np.float32(0) if a[i] < 0 else a[i]
    else:
        _curved(code, out, a, count)


@jit
def _curved(code: int, out: Any, a: Any, count: int) -> None:  # noqa: PLR0912 (a branch for each instruction)
    if code == EXP:
        for i in range(count):
            out[i] = exp(a[i])
    elif code == TANH:
        for i in range(count):
            out[i] = tanh(a[i])
    elif code == SIGMOID:
        for i in range(count):
            out[i] = sigmoid(a[i])
    elif code == SILU:
        for i in range(count):
            out[i] = a[i] * sigmoid(a[i])
    elif code == GELU_TANH:
        for i in range(count):
            inner = np.float32(0.7978845608) * (a[i] + np.float32(0.044715) * (a[i] * a[i] * a[i]))
            out[i] = np.float32(0.5) * a[i] * (np.float32(1) + tanh(inner))
    elif code == GELU:
        for i in range(count):
            out[i] = 0.5 * a[i] * (1 + math.erf(a[i] * 0.7071067811865476))
    elif code == COS:
        for i in range(count):
            out[i] = math.cos(float(a[i]))
    elif code == SIN:
        for i in range(count):
            out[i] = math.sin(float(a[i]))
    elif code == LOG:
        for i in range(count):
            out[i] = math.log(float(a[i]))
    elif code == SOFTPLUS:
        for i in range(count):
            out[i] = a[i] if a[i] > 20 else math.log1p(math.exp(float(a[i])))


@jit
def rounded(dtype: int, values: Any, count: int) -> None:
    """To a 16-bit dtype, in place, before they are stored in it."""
    if dtype == 1:
        unary(BFLOAT16, values, values, count)
    elif dtype == 2:
        unary(FLOAT16, values, values, count)


@Kernel
def chain(arguments: int, chunk: int) -> None:
    """Some tiles of a chain; for the arguments see above."""
    count, d0, d1 = read_int64(arguments, 0), read_int64(arguments, 8), read_int64(arguments, 16)
    d2, n, share = read_int64(arguments, 24), read_int64(arguments, 32), read_int64(arguments, 40)
    memory = stack()
    slots = carray(float_pointer(memory), (SLOTS, TILE))
    tiles = (n + TILE - 1) // TILE
    for tile in range(chunk * share, min((chunk + 1) * share, d0 * d1 * d2 * tiles)):
        start, outer = tile % tiles * TILE, tile // tiles
        i2, i1, i0 = outer % d2, outer // d2 % d1, outer // d2 // d1
        width = min(TILE, n - start)
        for k in range(count):
            at = arguments + 8 * (HEADER + k * INSTRUCTION)
            code, out = read_int64(at, 0), slots[read_int64(at, 8)]
            a = slots[read_int64(at, 16)]
            if code in (LOAD, STORE):
                dtype, stride = read_int64(at, 48), read_int64(at, 56)
                size = _size(dtype)
                place = i0 * read_int64(at, 64) + i1 * read_int64(at, 72) + i2 * read_int64(at, 80) + start * stride
                address = read_int64(at, 40) + size * place
                if code == LOAD:
                    load(dtype, address, stride, out, width)
                else:
                    store(dtype, address, stride, a, width)
            elif code == FILL:
                out[:width] = read_float(at, 32)
            elif ADD <= code <= MINIMUM:
                _binary(code, out, a, slots[read_int64(at, 24)], width)
            else:
                unary(code, out, a, width)
