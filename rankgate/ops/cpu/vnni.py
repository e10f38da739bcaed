"""Rows of 4- or 8-bit codes times one x by 8-bit dot products (AVX-512 VNNI, `vpdpbusd`), as Numba intrinsics.

    Σ_g s_g s_x,g Σ_j (q_gj − z_g) c_gj,     x_gj ≈ s_x,g c_gj       (s_x: of a block of 64, one group or two)

x is 15 bits, c = 128 h + l with h and l in 8 bits: two dot products for each code, which cost nothing where bytes are
what takes the time. Codes meet x as they are stored, 64 at once: one block of 64 bytes, or two blocks of nibbles (the
low ones, then the high ones of both), the last block of an odd number by itself. Such a *unit* has its part of x: in
lanes of 32 bits the factor s_x and −Σ c of each group, and c as bytes. Four rows share what is read of x.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from rankgate.ops.cpu.compile import address_of, jit, keep
from rankgate.ops.cpu.vector import FEATURES, prefetch, read_float, write_float, write_int32

GROUP = 64
ROWS = 4  # at once
AHEAD = 6144  # bytes: without it, rows side by side are more streams than the processor follows by itself
TOP = np.float32(127 * 128 + 63)  # largest code of x
SMALLEST = np.float32(1e-30)  # of x, that is not 0
EXPONENT = 0x7F800000
LONG, WORD, SHORT, BYTE, FLOAT = ir.IntType(64), ir.IntType(32), ir.IntType(16), ir.IntType(8), ir.FloatType()
LANES, HALF = 16, 8
WORDS, FLOATS, BYTES = ir.VectorType(WORD, LANES), ir.VectorType(FLOAT, LANES), ir.VectorType(BYTE, GROUP)
UNIT = 128  # bytes of a unit's factors and sums, before the bytes of its codes
AVAILABLE = {"avx512f", "avx512bw", "avx512vl", "avx512vnni"} <= FEATURES


def _constant(value: Any, kind: Any) -> Any:
    return ir.Constant(kind, [value] * kind.count)


def _load(builder: Any, address: Any, kind: Any, offset: int = 0) -> Any:
    address = builder.add(address, LONG(offset)) if offset else address
    return builder.load(builder.inttoptr(address, kind.as_pointer()), align=1)


def _store(builder: Any, value: Any, address: Any) -> None:
    builder.store(value, builder.inttoptr(address, value.type.as_pointer()), align=1)


def _splat(builder: Any, value: Any, kind: Any) -> Any:
    first = builder.insert_element(ir.Constant(kind, ir.Undefined), value, WORD(0))
    return builder.shuffle_vector(first, first, ir.Constant(ir.VectorType(WORD, kind.count), [0] * kind.count))


def _call(builder: Any, name: str, kind: Any, arguments: list[Any]) -> Any:
    function = ir.FunctionType(kind, [a.type for a in arguments])
    return builder.call(cgutils.get_or_insert_function(builder.module, function, name), arguments)


def _dot(builder: Any, total: Any, unsigned: Any, signed: Any) -> Any:
    pair = [builder.bitcast(v, WORDS) for v in (unsigned, signed)]
    return _call(builder, "llvm.x86.avx512.vpdpbusd.512", WORDS, [total, *pair])


def _fma(builder: Any, a: Any, b: Any, c: Any) -> Any:
    return builder.fadd(builder.fmul(a, b, flags=["fast"]), c, flags=["fast"])


def _bytes_of(builder: Any, codes: Any) -> list[Any]:
    """A block of signed bytes, moved up by 128."""
    return [builder.xor(_load(builder, codes, BYTES), _constant(-128, BYTES))]


def _nibbles_of(builder: Any, codes: Any) -> list[Any]:
    """Two blocks of nibbles: 32 and 32 low ones, 32 and 32 high ones."""
    raw, mask = _load(builder, codes, BYTES), _constant(15, BYTES)
    return [builder.and_(raw, mask), builder.and_(builder.lshr(raw, _constant(4, BYTES)), mask)]


def _last_nibbles_of(builder: Any, codes: Any) -> list[Any]:
    """One block of nibbles, in order."""
    raw = _load(builder, codes, ir.VectorType(BYTE, 32))
    mask = ir.Constant(ir.VectorType(WORD, 64), list(range(64)))
    high = builder.lshr(raw, _constant(4, raw.type))
    return [builder.shuffle_vector(builder.and_(raw, _constant(15, raw.type)), high, mask)]


def _one_scale(builder: Any, scale: Any) -> list[Any]:
    raw = builder.zext(_load(builder, scale, SHORT), WORD)
    return [_splat(builder, builder.bitcast(builder.shl(raw, WORD(16)), FLOAT), FLOATS)]


def _two_scales(builder: Any, scale: Any) -> list[Any]:
    raw = _splat(builder, _load(builder, scale, WORD), WORDS)
    moved = builder.shl(raw, ir.Constant(WORDS, [16] * HALF + [0] * HALF))
    return [builder.bitcast(builder.and_(moved, _constant(-65536, WORDS)), FLOATS)]


def _four_scales(builder: Any, scale: Any) -> list[Any]:
    """Of the first and third group, and of the second and fourth."""
    pairs = [_splat(builder, _load(builder, scale, WORD, 4 * i), WORDS) for i in range(2)]
    mask = ir.Constant(WORDS, [0] * HALF + [LANES] * HALF)
    both = builder.shuffle_vector(*pairs, mask)
    found = builder.shl(both, _constant(16, WORDS)), builder.and_(both, _constant(-65536, WORDS))
    return [builder.bitcast(words, FLOATS) for words in found]


class Kind(NamedTuple):
    """How a unit is read.

    Its codes as vectors, how far they are moved up, its scales as lanes, of all vectors or of each, and the lanes in
    which x has the sums of its groups.
    """

    codes: Callable[[Any, Any], list[Any]]
    moved: int
    scales: Callable[[Any, Any], list[Any]]
    lanes: tuple[int, ...]


KINDS = (  # bytes, nibbles, the last nibbles: with one group in a block, and with two
    (
        Kind(_bytes_of, 128, _one_scale, (0,)),
        Kind(_nibbles_of, 0, _two_scales, (0, HALF)),
        Kind(_last_nibbles_of, 0, _one_scale, (0,)),
    ),
    (
        Kind(_bytes_of, 128, _two_scales, (0, HALF)),
        Kind(_nibbles_of, 0, _four_scales, (0, 1, HALF, HALF + 1)),
        Kind(_last_nibbles_of, 0, _two_scales, (0, HALF)),
    ),
)


def _zeros(builder: Any, zero: Any, kind: Kind) -> Any:
    vector = _constant(0, WORDS)
    for i, lane in enumerate(kind.lanes):
        value = builder.add(builder.sext(_load(builder, zero, BYTE, i), WORD), WORD(kind.moved))
        vector = builder.insert_element(vector, value, WORD(lane))
    return vector


def _unit(
    builder: Any, kind: Kind, rows: list[tuple[Any, Any, Any]], x: Any, has_zero: bool, totals: list[Any]
) -> None:
    """Add a unit at x to the totals of rows, given by the addresses of its codes, scale and zero."""
    factor, sums = _load(builder, x, FLOATS), _load(builder, x, WORDS, 64)
    for total, (codes, scale, zero) in zip(totals, rows, strict=True):
        vectors, scales = kind.codes(builder, codes), kind.scales(builder, scale)
        start = builder.mul(sums, _zeros(builder, zero, kind)) if has_zero else sums
        value = builder.load(total)
        for part, s in enumerate(scales):
            high, low = _constant(0, WORDS), start
            if len(scales) > 1:  # each vector by itself, with the sums of its own groups
                own = [-int(i % HALF == part) for i in range(LANES)]
                low = builder.and_(start, ir.Constant(WORDS, own))
            for i in range(part, len(vectors), len(scales)):
                high = _dot(builder, high, vectors[i], _load(builder, x, BYTES, UNIT + 128 * i))
                low = _dot(builder, low, vectors[i], _load(builder, x, BYTES, UNIT + 128 * i + 64))
            dot = builder.add(low, builder.shl(high, _constant(7, WORDS)))
            weight = builder.fmul(s, factor, flags=["fast"])
            value = _fma(builder, weight, builder.sitofp(dot, FLOATS), value)
        builder.store(value, total)


def _unit_bytes(nibbles: bool) -> int:
    """Of x, for each whole unit."""
    return UNIT + (256 if nibbles else 128)


def _rows_dot(builder: Any, variant: int, arguments: list[Any]) -> None:
    nibbles, has_zero, count = bool(variant & 1), bool(variant & 2), ROWS if variant & 4 else 1
    groups = 2 if variant & 8 else 1
    kinds = KINDS[groups - 1]
    codes, scale, zero, blocks, x, factor, z, rank, out = arguments
    totals = [cgutils.alloca_once_value(builder, _constant(0.0, FLOATS)) for _ in range(count)]
    width, whole = (32, builder.lshr(blocks, LONG(1))) if nibbles else (64, blocks)

    def at(block: Any) -> list[tuple[Any, Any, Any]]:
        places = [builder.add(builder.mul(blocks, LONG(r)), block) for r in range(count)]
        starts = [(builder.mul(p, LONG(width)), builder.mul(p, LONG(groups))) for p in places]
        scales = [builder.add(scale, builder.shl(g, LONG(1))) for _, g in starts]
        return [(builder.add(codes, c), s, builder.add(zero, g)) for (c, g), s in zip(starts, scales, strict=True)]

    with cgutils.for_range(builder, whole) as loop:
        unit = builder.add(x, builder.mul(loop.index, LONG(_unit_bytes(nibbles))))
        ahead = builder.add(codes, LONG(AHEAD))
        for i in range(count):
            prefetch(builder, builder.add(builder.add(ahead, builder.mul(loop.index, LONG(64 * count))), LONG(64 * i)))
        _unit(builder, kinds[nibbles], at(builder.shl(loop.index, LONG(int(nibbles)))), unit, has_zero, totals)
    if nibbles:
        with builder.if_then(builder.icmp_signed("!=", builder.and_(blocks, LONG(1)), LONG(0))):
            unit = builder.add(x, builder.mul(whole, LONG(_unit_bytes(nibbles))))
            _unit(builder, kinds[2], at(builder.sub(blocks, LONG(1))), unit, has_zero, totals)
    with cgutils.for_range(builder, builder.lshr(rank, LONG(4))) as loop:
        start = builder.shl(loop.index, LONG(4))
        values = _load(builder, builder.add(z, builder.shl(start, LONG(2))), FLOATS)
        for r, total in enumerate(totals):
            place = builder.add(builder.add(factor, builder.mul(rank, LONG(r))), start)
            a = builder.sitofp(builder.sext(_load(builder, place, ir.VectorType(BYTE, LANES)), WORDS), FLOATS)
            builder.store(_fma(builder, a, values, builder.load(total)), total)
    for r, total in enumerate(totals):
        kind = ir.FunctionType(FLOAT, [FLOAT, FLOATS])
        add = cgutils.get_or_insert_function(builder.module, kind, "llvm.vector.reduce.fadd.v16f32")
        value = builder.call(add, [FLOAT(0.0), builder.load(total)], fastmath=["fast"])
        _store(builder, value, builder.add(out, LONG(4 * r)))


@intrinsic
def rows_dot(
    _: Any,
    variant: Any,
    codes: Any,
    scale: Any,
    zero: Any,
    blocks: Any,
    x: Any,
    factor: Any,
    z: Any,
    rank: Any,
    out: Any,
) -> Any:
    """out[row] = the above + Σ_c a_c z_c for one row or four; a: int8, z: float32, of the first ⌊rank/16⌋ · 16.

    variant: 1 for nibbles + 2 for a zero to each group + 4 for four rows + 8 for two groups in a block. Addresses but
    for it, `blocks` and `rank`.
    """

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        for number in range(16 if AVAILABLE else 0):
            with builder.if_then(builder.icmp_signed("==", arguments[0], LONG(number))):
                _rows_dot(builder, number, arguments[1:])
        return context.get_dummy_value()

    return types.void(*(types.int64,) * 10), codegen


@intrinsic
def largest(_: Any, x: Any) -> Any:
    """The bits of the largest magnitude among 64 values: as large as 0x7F800000 if one is not finite."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        top = _constant(0, WORDS)
        for i in range(GROUP // LANES):
            bits = builder.and_(_load(builder, arguments[0], WORDS, 4 * LANES * i), _constant(0x7FFFFFFF, WORDS))
            top = builder.select(builder.icmp_unsigned(">", bits, top), bits, top)
        return _call(builder, "llvm.vector.reduce.umax.v16i32", WORD, [top])

    return types.int32(types.int64), codegen


@intrinsic
def as_float(_: Any, bits: Any) -> Any:
    """The float32 with these bits."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], FLOAT)

    return types.float32(types.int32), codegen


@intrinsic
def split(_: Any, x: Any, inverse: Any, high: Any, low: Any) -> Any:
    """32 values of x times `inverse` as codes 128 h + l, h and l stored as bytes; their sum."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        x, inverse, high, low = arguments
        factor, total = _splat(builder, inverse, FLOATS), _constant(0, WORDS)
        for i in range(2):
            scaled = builder.fmul(_load(builder, x, FLOATS, 4 * LANES * i), factor)
            code = builder.fptosi(_call(builder, "llvm.rint.v16f32", FLOATS, [scaled]), WORDS)
            h = builder.ashr(builder.add(code, _constant(64, WORDS)), _constant(7, WORDS))
            rest = builder.sub(code, builder.shl(h, _constant(7, WORDS)))
            for value, address in ((h, high), (rest, low)):
                _store(builder, builder.trunc(value, ir.VectorType(BYTE, LANES)), builder.add(address, LONG(LANES * i)))
            total = builder.add(total, code)
        return _call(builder, "llvm.vector.reduce.add.v16i32", WORD, [total])

    return types.int32(types.int64, types.float32, types.int64, types.int64), codegen


@jit
def split_x(x: int, n: int, bits: int, groups: int, zero: int, out: int) -> bool:
    """The units of x (n, float32), for rows of so many bits and groups in a block.

    zero: of all codes, if they share it, else negative.

    out: 256 bytes for each block of 64. False, and nothing to use, if a value is not finite.
    """
    blocks = (n + GROUP - 1) // GROUP
    pairs = blocks // 2 if bits == 4 else 0
    times = 1 if zero < 0 else zero + 128 if bits == 8 else zero
    last = np.zeros(GROUP, np.float32)
    for g in range(blocks):
        source = x + 4 * GROUP * g
        if (g + 1) * GROUP > n:
            for i in range(n - g * GROUP):
                last[i] = read_float(source, 4 * i)
            source = address_of(last)
        bits_of_largest = largest(source)
        if bits_of_largest >= EXPONENT:
            return False
        top = as_float(bits_of_largest)
        factor = top / TOP
        inverse = TOP / top if top > SMALLEST else np.float32(0)
        start, lanes, unit = 0, LANES, out + 384 * pairs + 256 * (g - 2 * pairs)
        codes = unit + UNIT
        second = codes + 32
        if g < 2 * pairs:
            start, lanes, unit = HALF * (g % 2), HALF, out + 384 * (g // 2)
            codes = unit + UNIT + 32 * (g % 2)
            second = codes + 128
        total, rest = split(source, inverse, codes, codes + 64), split(source + 128, inverse, second, second + 64)
        for i in range(start, start + lanes):
            write_float(unit, 4 * i, factor)
            write_int32(unit, 64 + 4 * i, 0)
        if groups == 2:
            write_int32(unit, 64 + 4 * (start + (1 if lanes == HALF else HALF)), np.int32(-times * rest))
            rest = np.int32(0)
        write_int32(unit, 64 + 4 * start, np.int32(-times * (total + rest)))
    keep(last)
    return True
