"""LLVM vector code for the products of many tokens (`ops.cpu.many`), as Numba intrinsics.

Everything is a product of bytes: weights without sign, codes + 128 or nibbles · 16, times x as two signed digits of 7
bits, x ≈ s (128 high + low). Four products and their sum in 32 bits are one instruction (`vpdpbusd`) where the
processor has it; elsewhere on x86 three, which cannot overflow 16 bits on the way: 2 · 255 · 64 < 2^15. Both are exact,
so all processors compute the same integers.

A lane of a vector is a row of the weights, so nothing is summed across lanes. Weights are laid out for that as they are
unpacked, 64 rows (a strip) at a time: [block of 64 inputs][step of 4 inputs][64 rows][4 bytes]. So is x, some tokens (a
tile) at a time: [block][token][high, low][64 bytes]; one step of one token is one broadcast.

Addresses are plain 64-bit integers. What is not x86 gets plain vector code.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from rankgate.ops.cpu.vector import FEATURES, LINE, prefetch

GROUP = 64  # inputs of a block; rows of a strip
STEP = 4  # inputs that a lane takes at once
BLOCK_BYTES = GROUP * GROUP  # of a strip's weights for one block
DIGITS = 2 * GROUP  # bytes of a block of one token
LARGEST = 64 * 128 - 1  # code of x
INT, LONG, BYTE, FLOAT = ir.IntType(32), ir.IntType(64), ir.IntType(8), ir.FloatType()
ROUND = 0x4B400000  # 1.5 · 2^23 as float32: added to a float, its last bits are the nearest integer
INFINITE = 0x7F800000
TINY = 0x08000000  # 2^-111; a block of x below counts as zero
WIDE = {"avx512vnni", "avx512vl", "avx512bw"} <= FEATURES
VNNI = WIDE or "avxvnni" in FEATURES
LANES = 16 if WIDE else 8
TILE = 6 if WIDE else 3  # tokens whose sums fit the registers
VECTORS = 4 if WIDE else 2  # rows beside them, in vectors
ROWS = VECTORS * LANES


def _vector(kind: Any, count: int) -> Any:
    return ir.VectorType(kind, count)


INTS, FLOATS = _vector(INT, LANES), _vector(FLOAT, LANES)


def _const(kind: Any, value: float) -> Any:
    return ir.Constant(kind, [value] * kind.count)


def _at(builder: Any, address: Any, offset: int, kind: Any) -> Any:
    """A pointer to a `kind` that lies `offset` bytes after an address."""
    return builder.inttoptr(builder.add(address, LONG(offset)), kind.as_pointer())


def _load(builder: Any, address: Any, offset: int, kind: Any) -> Any:
    return builder.load(_at(builder, address, offset, kind), align=1)


def _store(builder: Any, value: Any, address: Any, offset: int) -> None:
    builder.store(value, _at(builder, address, offset, value.type), align=1)


def _splat(builder: Any, value: Any, count: int = LANES) -> Any:
    first = builder.insert_element(ir.Constant(_vector(value.type, count), ir.Undefined), value, INT(0))
    return builder.shuffle_vector(first, first, ir.Constant(_vector(INT, count), [0] * count))


def _shuffle(builder: Any, a: Any, b: Any, order: list[int]) -> Any:
    return builder.shuffle_vector(a, b, ir.Constant(_vector(INT, len(order)), order))


def _call(builder: Any, name: str, result: Any, *arguments: Any) -> Any:
    kind = ir.FunctionType(result, [argument.type for argument in arguments])
    return builder.call(cgutils.get_or_insert_function(builder.module, kind, name), arguments)


def _times(builder: Any, value: Any, factor: int) -> Any:
    return builder.mul(value, value.type(factor))


def _dot(builder: Any, total: Any, w: Any, x: Any) -> Any:
    """total + Σ of four products of unsigned bytes w and signed bytes x, in lanes of 32 bits."""
    count = total.type.count
    bytes_, shorts = _vector(BYTE, 4 * count), _vector(ir.IntType(16), 2 * count)
    w, x = builder.bitcast(w, bytes_), builder.bitcast(x, bytes_)
    if VNNI:
        words = [builder.bitcast(v, total.type) for v in (w, x)]  # as LLVM before 22 wants them, which later ones take
        return _call(builder, f"llvm.x86.avx512.vpdpbusd.{32 * count}", total.type, total, *words)
    if "avx2" in FEATURES and count == 8:
        pairs = _call(builder, "llvm.x86.avx2.pmadd.ub.sw", shorts, w, x)
        ones = _const(shorts, 1)
        return builder.add(total, _call(builder, "llvm.x86.avx2.pmadd.wd", total.type, pairs, ones))
    wide = _vector(INT, 4 * count)
    products = builder.mul(builder.zext(w, wide), builder.sext(x, wide))
    for i in range(4):
        part = _shuffle(builder, products, products, list(range(i, 4 * count, 4)))
        total = builder.add(total, part)
    return total


def _interleave(builder: Any, rows: list[Any], block: int) -> list[Any]:
    """One of log2(len(rows)) perfect shuffles that transpose `rows`, vectors of pieces of `block` lanes each."""
    half, width = len(rows) // 2, rows[0].type.count
    out = []
    for a, b in zip(rows[:half], rows[half:], strict=True):
        for start in (0, block // 2):
            order = [
                piece + start + i // 2 + (width if i % 2 else 0)
                for piece in range(0, width, block)
                for i in range(block)
            ]
            out.append(_shuffle(builder, a, b, order))
    return out


def _unpack(bits: int) -> Any:
    width = GROUP * bits // 8  # bytes of a row and block
    sixteen = _vector(INT, 16)

    @intrinsic
    def unpack(_: Any, codes: Any, stride: Any, last: Any, blocks: Any, out: Any, ahead: Any) -> Any:
        """16 rows as steps of unsigned bytes, see above. Row i begins at codes + stride · min(i, last).

        As many bytes as 16 rows have are asked for at `ahead`.
        """

        def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            codes, stride, last, blocks, out, ahead = arguments
            rows = []
            for i in range(16):
                row = builder.select(builder.icmp_signed("<", LONG(i), last), LONG(i), last)
                rows.append(builder.add(codes, builder.mul(row, stride)))
            with cgutils.for_range(builder, blocks) as loop:
                offset, to = (
                    _times(builder, loop.index, width),
                    builder.add(out, _times(builder, loop.index, BLOCK_BYTES)),
                )
                asked = builder.add(ahead, _times(builder, offset, 16))
                for line in range(0, 16 * width, LINE):
                    prefetch(builder, builder.add(asked, LONG(line)))
                if bits == 8:
                    parts = [_load(builder, builder.add(row, offset), 0, sixteen) for row in rows]
                    for _ in range(4):
                        parts = _interleave(builder, parts, 16)
                    steps = [builder.xor(part, _const(sixteen, 0x80808080)) for part in parts]
                else:
                    half = _vector(INT, 8)
                    halves = [_load(builder, builder.add(row, offset), 0, half) for row in rows]
                    parts = [_shuffle(builder, halves[i], halves[i + 8], list(range(16))) for i in range(8)]
                    for _ in range(3):
                        parts = _interleave(builder, parts, 8)
                    mask = _const(sixteen, 0xF0F0F0F0)
                    steps = [builder.and_(builder.shl(part, _const(sixteen, 4)), mask) for part in parts]
                    steps += [builder.and_(part, mask) for part in parts]
                for s, step in enumerate(steps):
                    _store(builder, step, to, STEP * GROUP * s)
            return context.get_dummy_value()

        return types.void(codes, stride, last, blocks, out, ahead), codegen

    return unpack


unpack_nibbles, unpack_bytes = _unpack(4), _unpack(8)


def _tile(vectors: int, tokens: int) -> Any:
    @intrinsic
    def tile(
        _: Any,
        w: Any,
        scale: Any,
        zero: Any,
        x: Any,
        x_scale: Any,
        x_sum: Any,
        x_sums: Any,
        blocks: Any,
        groups: Any,
        steps: Any,
        sums: Any,
        ahead: Any,
    ) -> Any:
        """sums[token][row] += Σ over groups of s s_x Σ (w − 128 − z) x, for `vectors` · LANES rows and `tokens` tokens.

        Every step of a digit asks for one more cache line from `ahead` on.
        Addresses of the weights, of float32 scales and int32 zeros [group][64 rows] (0: they are zero), of x and its
        scales and int32 sums [block][TILE], `x_sums` bytes from one kind of sums to the next (see `round_block`), of
        sums [TILE][64]. groups: 1 or 2 of each block. steps: of each group.
        """

        def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            w, scale, zero, x, x_scale, x_sum, x_sums, blocks, groups, steps, sums, ahead = arguments
            totals = [[cgutils.alloca_once(builder, INTS) for _ in range(vectors)] for _ in range(tokens)]

            def accumulate(builder: Any, w: Any, x: Any, digit: int, asked: Any) -> None:
                with cgutils.for_range(builder, steps) as loop:
                    prefetch(builder, builder.add(asked, _times(builder, loop.index, LINE)))
                    at = builder.add(w, _times(builder, loop.index, STEP * GROUP))
                    weights = [_load(builder, at, 4 * LANES * v, INTS) for v in range(vectors)]
                    from_ = builder.add(x, _times(builder, loop.index, STEP))
                    for t in range(tokens):
                        value = _splat(builder, _load(builder, from_, DIGITS * t + GROUP * digit, INT))
                        for v in range(vectors):
                            total = builder.load(totals[t][v])
                            builder.store(_dot(builder, total, weights[v], value), totals[t][v])

            def add_group(builder: Any, g: Any, half: Any) -> None:
                group, of_digit = builder.add(builder.mul(g, groups), half), _times(builder, steps, LINE)
                asked = builder.add(ahead, builder.mul(group, _times(builder, of_digit, 2)))
                before = builder.mul(half, steps)
                weights = builder.add(w, _times(builder, g, BLOCK_BYTES))
                weights = builder.add(weights, _times(builder, before, STEP * GROUP))
                values = builder.add(x, _times(builder, g, DIGITS * TILE))
                values = builder.add(values, _times(builder, before, STEP))
                rows, of_tokens = _times(builder, group, 4 * GROUP), _times(builder, g, 4 * TILE)
                kind = builder.add(builder.sub(groups, LONG(1)), half)
                own = builder.add(builder.add(x_sum, builder.mul(kind, x_sums)), of_tokens)
                total_x = [_load(builder, own, 4 * t, INT) for t in range(tokens)]
                for t in range(tokens):
                    for v in range(vectors):
                        builder.store(_splat(builder, builder.neg(total_x[t])), totals[t][v])
                accumulate(builder, weights, values, 0, asked)
                for row in totals:
                    for total in row:
                        builder.store(builder.shl(builder.load(total), _const(INTS, 7)), total)
                with builder.if_then(builder.icmp_signed("!=", zero, LONG(0))):
                    for t in range(tokens):
                        one = _splat(builder, total_x[t])
                        for v in range(vectors):
                            z = _load(builder, builder.add(zero, rows), 4 * LANES * v, INTS)
                            total = builder.load(totals[t][v])
                            builder.store(builder.sub(total, builder.mul(z, one)), totals[t][v])
                accumulate(builder, weights, values, 1, builder.add(asked, of_digit))
                scales = [_load(builder, builder.add(scale, rows), 4 * LANES * v, FLOATS) for v in range(vectors)]
                for t in range(tokens):
                    s = _splat(builder, _load(builder, builder.add(x_scale, of_tokens), 4 * t, FLOAT))
                    for v in range(vectors):
                        offset = 4 * (GROUP * t + LANES * v)
                        value = builder.sitofp(builder.load(totals[t][v]), FLOATS)
                        product = builder.fmul(value, builder.fmul(s, scales[v]), flags=["contract"])
                        added = _load(builder, sums, offset, FLOATS)
                        _store(builder, builder.fadd(added, product, flags=["contract"]), sums, offset)

            with cgutils.for_range(builder, blocks) as block, cgutils.for_range(builder, groups) as half:
                add_group(builder, block.index, half.index)
            return context.get_dummy_value()

        arguments = w, scale, zero, x, x_scale, x_sum, x_sums, blocks, groups, steps, sums, ahead
        return types.void(*arguments), codegen

    return tile


tiles = [_tile(VECTORS, tokens) for tokens in range(1, TILE + 1)]
narrow_tile = _tile(1, TILE)


def _columns(builder: Any, columns: list[Any]) -> list[Any]:
    """32 bytes of each of four columns as steps of 8 rows: rows 4 k … and 16 + 4 k … in vector k."""
    (a, b, c, d), bytes_, pairs = columns, _vector(BYTE, 32), _vector(ir.IntType(16), 16)

    def halves(x: Any, y: Any, kind: Any) -> list[Any]:
        """Lanes of x and y in turn, of the first half of every 128 bits, and of the second."""
        x, y, lanes = builder.bitcast(x, kind), builder.bitcast(y, kind), kind.count // 2
        picked = [[lane + start + i for lane in (0, lanes) for i in range(lanes // 2)] for start in (0, lanes // 2)]
        return [_shuffle(builder, x, y, [j for i in half for j in (i, i + kind.count)]) for half in picked]

    mixed = zip(halves(a, b, bytes_), halves(c, d, bytes_), strict=True)
    return [builder.bitcast(v, _vector(INT, 8)) for ab, cd in mixed for v in halves(ab, cd, pairs)]


@intrinsic
def unpack_columns(_: Any, codes: Any, stride: Any, last: Any, blocks: Any, out: Any) -> Any:
    """64 rows of a plane that is stored by column as steps of unsigned bytes, column min(j, last) for input j."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        codes, stride, last, blocks, out = arguments
        mask = _const(_vector(INT, 8), 0xF0F0F0F0)
        with cgutils.for_range(builder, _times(builder, blocks, GROUP // STEP)) as loop:
            to = builder.add(out, _times(builder, loop.index, STEP * GROUP))
            columns = []
            for i in range(STEP):
                j = builder.add(_times(builder, loop.index, STEP), LONG(i))
                j = builder.select(builder.icmp_signed("<", j, last), j, last)
                columns.append(_load(builder, builder.add(codes, builder.mul(j, stride)), 0, _vector(BYTE, 32)))
            for k, v in enumerate(_columns(builder, columns)):
                low = builder.and_(builder.shl(v, _const(v.type, 4)), mask)
                for nibble, part in enumerate((low, builder.and_(v, mask))):
                    for half in range(2):
                        rows = _shuffle(builder, part, part, [4 * half + i for i in range(4)])
                        _store(builder, rows, to, STEP * (32 * nibble + 16 * half + 4 * k))
        return context.get_dummy_value()

    return types.void(codes, stride, last, blocks, out), codegen


@intrinsic
def add_columns(
    _: Any, codes: Any, stride: Any, channels: Any, x: Any, x_scale: Any, x_sum: Any, count: Any, rows: Any, sums: Any
) -> Any:
    """sums[64] += rows · s_x Σ over `count` columns (a multiple of 4, at most 64) of 16 (q − 8) x.

    Addresses of the chunk in column 0 of the plane, of int32 channels, of x, its scale and sum, of float32 factors of
    the rows and of sums. stride: bytes of a column.
    """

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        codes, stride, channels, x, x_scale, x_sum, count, rows, sums = arguments
        ints, floats, mask = _vector(INT, 8), _vector(FLOAT, 8), _const(_vector(INT, 8), 0xF0F0F0F0)
        totals = [[cgutils.alloca_once_value(builder, _const(ints, 0)) for _ in range(8)] for _ in range(2)]
        with cgutils.for_range(builder, builder.sdiv(count, LONG(STEP))) as loop:
            columns = []
            for i in range(STEP):
                channel = _load(builder, builder.add(channels, _times(builder, loop.index, 4 * STEP)), 4 * i, INT)
                at = builder.add(codes, builder.mul(builder.sext(channel, LONG), stride))
                columns.append(_load(builder, at, 0, _vector(BYTE, 32)))
            bytes_ = _columns(builder, columns)
            weights = [builder.and_(builder.shl(v, _const(ints, 4)), mask) for v in bytes_]
            weights += [builder.and_(v, mask) for v in bytes_]
            for digit in range(2):
                value = _load(builder, builder.add(x, _times(builder, loop.index, STEP)), GROUP * digit, INT)
                value = _splat(builder, value, 8)
                for total, weight in zip(totals[digit], weights, strict=True):
                    builder.store(_dot(builder, builder.load(total), weight, value), total)
        s, shift = _load(builder, x_scale, 0, FLOAT), _splat(builder, _load(builder, x_sum, 0, INT), 8)
        for k, (high, low) in enumerate(zip(*totals, strict=True)):
            total = builder.shl(builder.sub(builder.load(high), shift), _const(ints, 7))
            total = builder.add(total, builder.load(low))
            value = builder.fmul(builder.sitofp(total, floats), _splat(builder, s, 8))
            for half in range(2):
                offset = 4 * (32 * (k // 4) + 16 * half + 4 * (k % 4))
                part = _shuffle(builder, value, value, [4 * half + i for i in range(4)])
                part = builder.fmul(part, _load(builder, rows, offset, part.type))
                _store(builder, builder.fadd(_load(builder, sums, offset, part.type), part), sums, offset)
        return context.get_dummy_value()

    return types.void(codes, stride, channels, x, x_scale, x_sum, count, rows, sums), codegen


@intrinsic
def round_block(_: Any, x: Any, out: Any, x_scale: Any, x_sum: Any, apart: Any) -> Any:
    """64 float32 at `x` as digits at `out`, their float32 scale and int32 sums of their codes.

    Sums: of all, of the first 32 and of the last 32, `apart` bytes from each other.

    Where a value is not finite the scale is NaN, and so is all that it is multiplied with.
    """

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        x, out, x_scale, x_sum, apart = arguments
        ints, floats = _vector(INT, 16), _vector(FLOAT, 16)
        values = [_load(builder, x, 64 * i, floats) for i in range(4)]
        bits = [builder.and_(builder.bitcast(v, ints), _const(ints, 0x7FFFFFFF)) for v in values]
        while len(bits) > 1:
            a, b = bits.pop(), bits.pop()
            bits.insert(0, builder.select(builder.icmp_unsigned(">", a, b), a, b))
        top = _call(builder, "llvm.vector.reduce.umax.v16i32", INT, bits[0])
        largest = builder.bitcast(top, FLOAT)
        plain = builder.and_(builder.icmp_unsigned("<", top, INT(INFINITE)), builder.icmp_unsigned(">", top, INT(TINY)))
        inverse = builder.select(plain, builder.fdiv(FLOAT(LARGEST), largest), FLOAT(0.0))
        scale = builder.select(plain, builder.fmul(largest, FLOAT(1 / LARGEST)), builder.fmul(largest, FLOAT(0.0)))
        _store(builder, scale, x_scale, 0)
        factor, magic = _splat(builder, inverse, 16), builder.bitcast(_const(ints, ROUND), floats)
        sums = [_const(ints, 0)] * 2
        for i, value in enumerate(values):
            shifted = builder.bitcast(builder.fadd(builder.fmul(value, factor), magic), ints)
            code = builder.sub(shifted, _const(ints, ROUND))
            high = builder.ashr(builder.add(code, _const(ints, 64)), _const(ints, 7))
            low = builder.sub(code, builder.shl(high, _const(ints, 7)))
            sums[i // 2] = builder.add(sums[i // 2], code)
            for digit, part in enumerate((high, low)):
                _store(builder, builder.trunc(part, _vector(BYTE, 16)), out, GROUP * digit + 16 * i)
        first, last = (_call(builder, "llvm.vector.reduce.add.v16i32", INT, total) for total in sums)
        for kind, value in enumerate((builder.add(first, last), first, last)):
            _store(builder, value, builder.add(x_sum, _times(builder, apart, kind)), 0)
        return context.get_dummy_value()

    return types.void(x, out, x_scale, x_sum, apart), codegen
