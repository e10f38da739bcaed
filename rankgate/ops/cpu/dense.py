"""Products of a matrix and one token or some, whose elements are stored in 16 or 32 bits.

    rows      y_r = Σ_j W_rj x_j (+ b_r)     rows of W are contiguous: a linear layer, or scores q · k
    columns   y_c = Σ_j x_j W_jc (+ b_c)     the same: a transposed layer, or the values that attention adds up

Accumulation is in float32; x and y are float32. Several tokens take turns with as many rows as the nearest cache holds:
those come from memory once.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from rankgate.ops.cpu.compile import Kernel, address_of, jit, keep
from rankgate.ops.cpu.elementwise import load as elements
from rankgate.ops.cpu.elementwise import rounded, store
from rankgate.ops.cpu.vector import prefetch, read_int64

FLOAT32, BFLOAT16, FLOAT16 = range(3)  # how an element is stored
LANES, ROWS, COLUMNS = 16, 4, 64  # of a vector; rows and columns at once
AHEAD = 6144  # bytes: see `vnni`
TILE = 16 << 10  # bytes of rows that several tokens are multiplied by in turn
LONG, WORD, SHORT, FLOAT, HALF = *(ir.IntType(bits) for bits in (64, 32, 16)), ir.FloatType(), ir.HalfType()


def load(builder: Any, kind: int, address: Any, lanes: int) -> Any:
    """So many elements as float32, or one by itself."""

    def of(element: Any) -> Any:
        return ir.VectorType(element, lanes) if lanes > 1 else element

    stored = {FLOAT32: of(FLOAT), BFLOAT16: of(SHORT), FLOAT16: of(HALF)}[kind]
    raw = builder.load(builder.inttoptr(address, stored.as_pointer()), align=1)
    if kind == FLOAT32:
        return raw
    if kind == FLOAT16:
        return builder.fpext(raw, of(FLOAT))
    shift = ir.Constant(of(WORD), [16] * lanes if lanes > 1 else 16)
    return builder.bitcast(builder.shl(builder.zext(raw, of(WORD)), shift), of(FLOAT))


def _fma(builder: Any, a: Any, b: Any, c: Any) -> Any:
    return builder.fadd(builder.fmul(a, b, flags=["contract"]), c, flags=["contract", "reassoc"])


def _zero(lanes: int) -> Any:
    return ir.Constant(ir.VectorType(FLOAT, lanes), [0.0] * lanes)


def _move(builder: Any, address: Any, index: Any, size: int) -> Any:
    return builder.add(address, builder.mul(index, LONG(size)))


def _dot(builder: Any, kind: int, count: int, arguments: list[Any]) -> None:
    matrix, stride, x, n, out = arguments
    size = 4 if kind == FLOAT32 else 2
    totals = [cgutils.alloca_once_value(builder, _zero(LANES)) for _ in range(count)]
    starts = [_move(builder, matrix, stride, r) for r in range(count)]
    whole = builder.lshr(n, LONG(4))
    with cgutils.for_range(builder, whole) as loop:
        values = load(builder, FLOAT32, _move(builder, x, loop.index, 4 * LANES), LANES)
        ahead = _move(builder, builder.add(matrix, LONG(AHEAD)), loop.index, size * LANES * count)
        for r, (total, start) in enumerate(zip(totals, starts, strict=True)):
            if size * LANES * r % 64 == 0:
                prefetch(builder, builder.add(ahead, LONG(size * LANES * r)))
            w = load(builder, kind, _move(builder, start, loop.index, size * LANES), LANES)
            builder.store(_fma(builder, w, values, builder.load(total)), total)
    reduce = ir.FunctionType(FLOAT, [FLOAT, ir.VectorType(FLOAT, LANES)])
    add = cgutils.get_or_insert_function(builder.module, reduce, "llvm.vector.reduce.fadd.v16f32")
    for r, (total, start) in enumerate(zip(totals, starts, strict=True)):
        value = cgutils.alloca_once_value(
            builder, builder.call(add, [FLOAT(0.0), builder.load(total)], fastmath=["reassoc"])
        )
        with cgutils.for_range_slice(builder, builder.shl(whole, LONG(4)), n, LONG(1)) as (j, _):
            w = load(builder, kind, _move(builder, start, j, size), 1)
            v = load(builder, FLOAT32, _move(builder, x, j, 4), 1)
            builder.store(_fma(builder, w, v, builder.load(value)), value)
        builder.store(builder.load(value), builder.inttoptr(builder.add(out, LONG(4 * r)), FLOAT.as_pointer()), align=1)


@intrinsic
def dot(_: Any, variant: Any, matrix: Any, stride: Any, x: Any, n: Any, out: Any) -> Any:
    """out[r] = Σ_j W_rj x_j for one row or four, `stride` bytes apart. variant: how W is stored, + 4 for four rows."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        for kind in (FLOAT32, BFLOAT16, FLOAT16):
            for four in (0, 4):
                with builder.if_then(builder.icmp_signed("==", arguments[0], LONG(kind + four))):
                    _dot(builder, kind, ROWS if four else 1, arguments[1:])
        return context.get_dummy_value()

    return types.void(*(types.int64,) * 6), codegen


def _combine(builder: Any, kind: int, width: int, arguments: list[Any]) -> None:
    matrix, stride, x, n, out = arguments
    lanes, size = min(width, LANES), 4 if kind == FLOAT32 else 2
    zero = _zero(LANES) if lanes > 1 else FLOAT(0.0)
    even, odd = ([cgutils.alloca_once_value(builder, zero) for _ in range(width // lanes)] for _ in range(2))

    def add(row: Any, totals: list[Any]) -> None:
        start = builder.add(matrix, builder.mul(row, stride))
        value = load(builder, FLOAT32, _move(builder, x, row, 4), 1)
        if lanes > 1:
            first = builder.insert_element(ir.Constant(zero.type, ir.Undefined), value, WORD(0))
            value = builder.shuffle_vector(first, first, ir.Constant(ir.VectorType(WORD, lanes), [0] * lanes))
        for i, total in enumerate(totals):
            w = load(builder, kind, builder.add(start, LONG(size * lanes * i)), lanes)
            builder.store(_fma(builder, w, value, builder.load(total)), total)

    with cgutils.for_range(builder, builder.lshr(n, LONG(1))) as loop:  # sums of two rows do not wait for each other
        pair = builder.shl(loop.index, LONG(1))
        add(pair, even)
        add(builder.add(pair, LONG(1)), odd)
    with builder.if_then(builder.trunc(n, ir.IntType(1))):
        add(builder.sub(n, LONG(1)), even)
    for i, (a, b) in enumerate(zip(even, odd, strict=True)):
        place = builder.add(out, LONG(4 * lanes * i))
        total = builder.fadd(builder.load(a), builder.load(b))
        builder.store(total, builder.inttoptr(place, zero.type.as_pointer()), align=1)


@intrinsic
def combine(_: Any, variant: Any, matrix: Any, stride: Any, x: Any, n: Any, out: Any) -> Any:
    """out[c] = Σ_j x_j W_jc for 1, 16 or 64 columns, rows `stride` bytes apart.

    variant: how W is stored, + 4 for 16 columns, or 8 for 64.
    """

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        for kind in (FLOAT32, BFLOAT16, FLOAT16):
            for more, width in ((0, 1), (4, LANES), (8, COLUMNS)):
                with builder.if_then(builder.icmp_signed("==", arguments[0], LONG(kind + more))):
                    _combine(builder, kind, width, arguments[1:])
        return context.get_dummy_value()

    return types.void(*(types.int64,) * 6), codegen


@jit
def dot_rows(kind: int, matrix: int, stride: int, x: int, n: int, rows: int, out: int) -> None:
    """out[r] = Σ_j W_rj x_j for `rows` rows."""
    r = 0
    while r < rows:
        four = r + 4 <= rows
        dot(kind + 4 * four, matrix + r * stride, stride, x, n, out + 4 * r)
        r += 4 if four else 1


@jit
def combine_rows(kind: int, matrix: int, stride: int, x: int, n: int, columns: int, out: int) -> None:
    """out[c] = Σ_j x_j W_jc for `columns` columns."""
    size = 4 if kind == FLOAT32 else 2
    c = 0
    while c < columns:
        width = 64 if c + 64 <= columns else 16 if c + 16 <= columns else 1
        more = 8 if width == 64 else 4 if width == 16 else 0
        combine(kind + more, matrix + size * c, stride, x, n, out + 4 * c)
        c += width


@jit
def _product(arguments: int, chunk: int, across: bool) -> None:
    kind, m, n = read_int64(arguments, 0), read_int64(arguments, 8), read_int64(arguments, 16)
    stride, share, matrix = read_int64(arguments, 24), read_int64(arguments, 32), read_int64(arguments, 40)
    x, bias = read_int64(arguments, 48), read_int64(arguments, 56)
    y, stored, tokens = read_int64(arguments, 64), read_int64(arguments, 72), read_int64(arguments, 80)
    start, stop = chunk * share, min(chunk * share + share, m)
    given, found, added = np.empty(tokens * n, np.float32), np.empty(share, np.float32), np.zeros(share, np.float32)
    size = 4 if stored == FLOAT32 else 2
    elements(stored, x, 1, given, tokens * n)
    if bias:
        elements(stored, bias + size * start, 1, added, stop - start)
    piece = share if across or tokens == 1 else max(TILE // stride // ROWS, 1) * ROWS
    for first in range(start, stop, piece):
        count = min(piece, stop - first)
        for t in range(tokens):
            x_t = address_of(given) + 4 * n * t
            if across:
                columns = matrix + (4 if kind == FLOAT32 else 2) * first
                combine_rows(kind, columns, stride, x_t, n, count, address_of(found))
            else:
                dot_rows(kind, matrix + first * stride, stride, x_t, n, count, address_of(found))
            if bias:
                for r in range(count):
                    found[r] += added[first - start + r]
            rounded(stored, found, count)
            store(stored, y + size * (t * m + first), 1, found, count)
    keep(given)
    keep(found)


@Kernel
def linear(arguments: int, chunk: int) -> None:
    """A chunk of W x + b.

    Arguments: how W is stored, how many y and x a token has, bytes between rows of W, how many y a chunk has; addresses
    of W, x, b or 0, y; how all but W are stored; tokens.
    """
    _product(arguments, chunk, False)


@Kernel
def transposed(arguments: int, chunk: int) -> None:
    """A chunk of Wᵀ x + b, with the arguments of `linear`."""
    _product(arguments, chunk, True)
