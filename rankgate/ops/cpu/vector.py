"""LLVM vector code for the inner loops of `ops.cpu`, as Numba intrinsics.

Numba's own loops over packed codes do not vectorise well, so the few that matter are emitted as vectors, which LLVM
maps to whatever the processor has. Addresses are plain 64-bit integers.

A row meets x as 16-bit integers with one scale per block of 64: codes of 4 or 8 bits times 16-bit values summed in
32 bits is exact, is one instruction for 16 products on most processors, and rounds x far below the rounding of the
weights. A column is added with float32 arithmetic. Its nibbles become floats without a conversion: four bits put at the
top of the mantissa of 1.0 give 1 + q/16, and offset and factor leave the loop.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba
import numpy as np
from llvmlite import binding, ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

GROUP = 64  # codes per block: inputs with one scale or two in a row, outputs in a chunk of a column
LINE = 64  # bytes of a cache line
LANES = 8  # of 32 bits
PAIRS = 2 * LANES  # lanes of 16 bits
WORD, SHORT, BYTE, FLOAT = ir.IntType(32), ir.IntType(16), ir.IntType(8), ir.FloatType()
WORDS, SHORTS, FLOATS = ir.VectorType(WORD, LANES), ir.VectorType(SHORT, PAIRS), ir.VectorType(FLOAT, LANES)
MANTISSA_TOP = 19  # lowest of the four highest mantissa bits
MASK, ONE = 15 << MANTISSA_TOP, 0x3F800000


def _features() -> set[str]:
    """Of the processor that Numba compiles for."""
    named: str | None = numba.config.CPU_FEATURES
    if named is not None:
        return {name[1:] for name in named.split(",") if name.startswith("+")}
    return {name for name, has in binding.get_host_cpu_features().items() if has}


FEATURES = _features()
HAS_PMADDWD = "avx2" in FEATURES


def bits_of(number: float) -> int:
    """Of a float32, as a word of arguments."""
    return int(np.float32(number).view(np.int32))


def row_order() -> list[int]:
    """Where element i of a block must lie to meet its nibble in a row: vector k holds nibble k of each 16-bit lane."""
    return [32 * (k % 2) + 2 * lane + k // 2 for k in range(4) for lane in range(PAIRS)]


def column_order() -> list[int]:
    """The same for `add_columns`: vector k holds nibble k of each 32-bit lane."""
    return [32 * (k % 2) + 4 * lane + k // 2 for k in range(8) for lane in range(LANES)]


def _load(builder: Any, address: Any, offset: Any, kind: Any) -> Any:
    return builder.load(builder.inttoptr(builder.add(address, offset), kind.as_pointer()), align=1)


def _times(builder: Any, value: Any, factor: int) -> Any:
    return builder.mul(value, value.type(factor))


def _splat(builder: Any, value: Any) -> Any:
    first = builder.insert_element(ir.Constant(FLOATS, ir.Undefined), value, WORD(0))
    return builder.shuffle_vector(first, first, ir.Constant(WORDS, [0] * LANES))


def _constant(value: float, kind: Any = FLOATS) -> Any:
    return ir.Constant(kind, [value] * kind.count)


def _fma(builder: Any, a: Any, b: Any, c: Any) -> Any:
    return builder.fadd(builder.fmul(a, b, flags=["fast"]), c, flags=["fast"])


def _bfloat16(builder: Any, address: Any, offset: Any) -> Any:
    bits = builder.zext(_load(builder, address, offset, ir.IntType(16)), WORD)
    return builder.bitcast(builder.shl(bits, WORD(16)), FLOAT)


def prefetch(builder: Any, address: Any) -> None:
    """Ask for the cache line at an address."""
    line = builder.inttoptr(address, BYTE.as_pointer())
    kind = ir.FunctionType(ir.VoidType(), [line.type, WORD, WORD, WORD])
    function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
    builder.call(function, [line, WORD(0), WORD(3), WORD(1)])  # read, keep in all caches, data


def _sum(builder: Any, vector: Any) -> Any:
    kind = ir.FunctionType(FLOAT, [FLOAT, FLOATS])
    reduce = cgutils.get_or_insert_function(builder.module, kind, f"llvm.vector.reduce.fadd.v{LANES}f32")
    return builder.call(reduce, [FLOAT(0.0), vector], fastmath=["fast"])


def _short_nibbles(builder: Any, address: Any, offset: Any) -> list[Any]:
    """64 nibbles as four vectors of 16-bit integers, in `row_order`."""
    lanes = _load(builder, address, offset, SHORTS)
    moved = [builder.lshr(lanes, _constant(4 * k, SHORTS)) for k in range(4)]
    return [builder.and_(lane, _constant(15, SHORTS)) for lane in moved]


def _short_bytes(builder: Any, address: Any, offset: Any) -> list[Any]:
    """64 signed bytes as four vectors of 16-bit integers, in order."""
    raw = [
        _load(builder, address, builder.add(offset, offset.type(i)), ir.VectorType(BYTE, PAIRS))
        for i in range(0, GROUP, PAIRS)
    ]
    return [builder.sext(part, SHORTS) for part in raw]


def _add_products(builder: Any, a: Any, b: Any, total: Any, plain: bool) -> Any:
    """total + a_even b_even + a_odd b_odd: 16-bit lanes to 32-bit lanes (`pmaddwd`)."""
    if HAS_PMADDWD and not plain:
        kind = ir.FunctionType(WORDS, [SHORTS, SHORTS])
        multiply = cgutils.get_or_insert_function(builder.module, kind, "llvm.x86.avx2.pmadd.wd")
        return builder.add(total, builder.call(multiply, [a, b]))
    for start in (0, 1):
        mask = ir.Constant(WORDS, list(range(start, PAIRS, 2)))
        picked = [builder.sext(builder.shuffle_vector(v, v, mask), WORDS) for v in (a, b)]
        total = builder.add(total, builder.mul(*picked))
    return total


def _float_nibbles(builder: Any, address: Any, offset: Any) -> list[Any]:
    """64 nibbles as eight vectors of 1 + q/16, in `column_order`."""
    words = _load(builder, address, offset, WORDS)
    vectors = []
    for k in range(8):
        shift = MANTISSA_TOP - 4 * k
        move = builder.shl if shift >= 0 else builder.lshr
        moved = move(words, _constant(abs(shift), WORDS))
        bits = builder.or_(builder.and_(moved, _constant(MASK, WORDS)), _constant(ONE, WORDS))
        vectors.append(builder.bitcast(bits, FLOATS))
    return vectors


def _row_dot(builder: Any, variant: int, arguments: list[Any]) -> Any:
    nibbles, has_zero, plain, halves = (bool(variant & bit) for bit in (1, 2, 4, 8))
    codes, scale, zero, x, x_scale, shifts, blocks = arguments
    load, width = (_short_nibbles, GROUP // 2) if nibbles else (_short_bytes, GROUP)
    total = cgutils.alloca_once_value(builder, _constant(0.0))
    with cgutils.for_range(builder, blocks) as loop:
        g = loop.index
        vectors = load(builder, codes, _times(builder, g, width))
        parts = [[0, 2], [1, 3]] if nibbles else [[0, 1], [2, 3]]
        if not halves:
            parts = [parts[0] + parts[1]]
        for half, part in enumerate(parts):
            group = builder.add(_times(builder, g, len(parts)), g.type(half))
            shift = _load(builder, shifts, _times(builder, group, 4), WORD)
            if has_zero:
                shift = builder.mul(shift, builder.sext(_load(builder, zero, group, BYTE), WORD))
            dot = builder.insert_element(_constant(0, WORDS), shift, WORD(0))
            for i in part:
                offset = builder.add(_times(builder, g, 2 * GROUP), g.type(2 * PAIRS * i))
                dot = _add_products(builder, vectors[i], _load(builder, x, offset, SHORTS), dot, plain)
            s = builder.fmul(
                _bfloat16(builder, scale, _times(builder, group, 2)),
                _load(builder, x_scale, _times(builder, g, 4), FLOAT),
            )
            builder.store(_fma(builder, _splat(builder, s), builder.sitofp(dot, FLOATS), builder.load(total)), total)
    return _sum(builder, builder.load(total))


@intrinsic
def row_dot(_: Any, variant: Any, codes: Any, scale: Any, zero: Any, x: Any, x_scale: Any, shifts: Any, n: Any) -> Any:
    """Σ over n blocks of s_x Σ over their groups of s (Σ q x + shift), for one row.

    Addresses of its codes, bfloat16 scales and int8 zeros; of x (int16), its float32 scales, and one int32 shift
    per group: −z Σ x where all rows share the zero z, and −Σ x, to be times z, where each group has its own.
    variant: 1 for nibbles + 2 for a zero to each group + 4 for arithmetic that every processor has + 8 for two groups
    in a block.
    """

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        value = cgutils.alloca_once_value(builder, FLOAT(0.0))
        for number in range(16):
            with builder.if_then(builder.icmp_signed("==", arguments[0], arguments[0].type(number))):
                builder.store(_row_dot(builder, number, arguments[1:]), value)
        return builder.load(value)

    return types.float32(*(types.int64,) * 8), codegen


def _dot_bytes(rows: int) -> Any:
    @intrinsic
    def dot_bytes(_: Any, codes: Any, stride: Any, x: Any, eighths: Any, out: Any) -> Any:
        """out[row] = Σ q x over 8 · `eighths` signed bytes, in rows `stride` bytes apart; `out` and x are float32."""

        def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            codes, stride, x, eighths, out = arguments
            totals = [cgutils.alloca_once_value(builder, _constant(0.0)) for _ in range(rows)]
            starts = [builder.add(codes, _times(builder, stride, r)) for r in range(rows)]
            with cgutils.for_range(builder, eighths) as loop:
                values = _load(builder, x, _times(builder, loop.index, 4 * LANES), FLOATS)
                for total, start in zip(totals, starts, strict=True):
                    raw = _load(builder, start, _times(builder, loop.index, LANES), ir.VectorType(BYTE, LANES))
                    w = builder.sitofp(builder.sext(raw, WORDS), FLOATS)
                    builder.store(_fma(builder, w, values, builder.load(total)), total)
            for r, total in enumerate(totals):
                address = builder.inttoptr(builder.add(out, out.type(4 * r)), FLOAT.as_pointer())
                builder.store(_sum(builder, builder.load(total)), address, align=1)
            return context.get_dummy_value()

        return types.void(*(types.int64,) * 5), codegen

    return dot_bytes


dot_bytes, dot_bytes_four = _dot_bytes(1), _dot_bytes(4)


@intrinsic
def add_columns(_: Any, codes: Any, stride: Any, channels: Any, coefficients: Any, count: Any, out: Any) -> Any:
    """out[64] = Σ over `count` open channels j of coefficient · (1 + q_j/16), in `column_order`.

    codes: address of the chunk in column 0; stride: bytes per column; channels: int64 indices.
    """

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        codes, stride, channels, coefficients, count, out = arguments
        totals = [cgutils.alloca_once_value(builder, _constant(0.0)) for _ in range(8)]
        with cgutils.for_range(builder, count) as loop:
            j = _load(builder, channels, _times(builder, loop.index, 8), ir.IntType(64))
            c = _splat(builder, _load(builder, coefficients, _times(builder, loop.index, 4), FLOAT))
            for total, w in zip(totals, _float_nibbles(builder, codes, builder.mul(j, stride)), strict=True):
                builder.store(_fma(builder, c, w, builder.load(total)), total)
        for k, total in enumerate(totals):
            address = builder.add(out, out.type(4 * LANES * k))
            builder.store(builder.load(total), builder.inttoptr(address, FLOATS.as_pointer()), align=1)
        return context.get_dummy_value()

    return types.void(codes, stride, channels, coefficients, count, out), codegen


@intrinsic
def prefetch_columns(_: Any, codes: Any, stride: Any, channels: Any, count: Any) -> Any:
    """Ask for one cache line of each open channel; arguments as for `add_columns`."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        codes, stride, channels, count = arguments
        with cgutils.for_range(builder, count) as loop:
            j = _load(builder, channels, _times(builder, loop.index, 8), ir.IntType(64))
            prefetch(builder, builder.add(codes, builder.mul(j, stride)))
        return context.get_dummy_value()

    return types.void(codes, stride, channels, count), codegen


def _reader(kind: Any, convert: Callable[[Any, Any, Any], Any]) -> Any:
    @intrinsic
    def read(_: Any, address: Any, offset: Any) -> Any:
        """The value at `address` + `offset` bytes."""

        def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            return convert(builder, *arguments)

        return kind(address, offset), codegen

    return read


read_int64 = _reader(types.int64, lambda b, address, offset: _load(b, address, offset, ir.IntType(64)))
read_int32 = _reader(types.int32, lambda b, address, offset: _load(b, address, offset, WORD))
read_float = _reader(types.float32, lambda b, address, offset: _load(b, address, offset, FLOAT))
read_bfloat16 = _reader(types.float32, _bfloat16)
read_int8 = _reader(types.float32, lambda b, address, offset: b.sitofp(_load(b, address, offset, BYTE), FLOAT))


def _writer(kind: Any) -> Any:
    @intrinsic
    def write(_: Any, address: Any, offset: Any, value: Any) -> Any:
        """Store the value at `address` + `offset` bytes."""

        def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            address, offset, value = arguments
            builder.store(value, builder.inttoptr(builder.add(address, offset), value.type.as_pointer()), align=1)
            return context.get_dummy_value()

        return types.void(address, offset, kind), codegen

    return write


write_float, write_int16 = _writer(types.float32), _writer(types.int16)
write_int32, write_int64 = _writer(types.int32), _writer(types.int64)


@intrinsic
def ask(_: Any, address: Any) -> Any:
    """Ask for the cache line at an address, whether there is memory or not."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        prefetch(builder, arguments[0])
        return context.get_dummy_value()

    return types.void(types.int64), codegen


def _pointer_to(kind: Any) -> Any:
    @intrinsic
    def pointer(_: Any, address: Any) -> Any:
        """The integer address as a pointer."""

        def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            return builder.inttoptr(arguments[0], context.get_value_type(signature.return_type))

        return types.CPointer(kind)(address), codegen

    return pointer


byte_pointer, short_pointer, half_pointer = (_pointer_to(kind) for kind in (types.int8, types.int16, types.uint16))
int_pointer, integer_pointer, float_pointer = (_pointer_to(kind) for kind in (types.int32, types.int64, types.float32))
