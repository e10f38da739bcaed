"""Codes of 4 bits as pairs of 16-bit floats in registers, and products of such on tensor cores (Triton)."""

from __future__ import annotations

import triton
import triton.language as tl

# Four bytes $4 of codes, −(magic + z) in $5 and $6, s in $7 and $8 → (low nibbles − z) s in $0 and $1, the high ones in
# $2 and $3, pairs of 16-bit floats. A nibble under the exponent of 128 (bfloat16) or 1024 (float16) is that plus it.
_UNPACK = """{{
    .reg .b32 a, b, c, d, one, zero;
    mov.b32 one, {one};
    mov.b32 zero, 0x80008000;
    prmt.b32 a, $4, 0, 0x4140;
    prmt.b32 b, $4, 0, 0x4342;
    shr.u32 c, a, 4;
    shr.u32 d, b, 4;
    lop3.b32 a, a, 0x000f000f, {magic}, 0xea;
    lop3.b32 b, b, 0x000f000f, {magic}, 0xea;
    lop3.b32 c, c, 0x000f000f, {magic}, 0xea;
    lop3.b32 d, d, 0x000f000f, {magic}, 0xea;
    fma.rn.{kind} a, a, one, $5;
    fma.rn.{kind} b, b, one, $6;
    fma.rn.{kind} c, c, one, $5;
    fma.rn.{kind} d, d, one, $6;
    fma.rn.{kind} $0, a, $7, zero;
    fma.rn.{kind} $1, b, $8, zero;
    fma.rn.{kind} $2, c, $7, zero;
    fma.rn.{kind} $3, d, $8, zero;
}}"""
_BFLOAT16 = tl.constexpr(_UNPACK.format(magic="0x43004300", kind="bf16x2", one="0x3f803f80"))
_FLOAT16 = tl.constexpr(_UNPACK.format(magic="0x64006400", kind="f16x2", one="0x3c003c00"))
_ASSEMBLED = tl.constexpr(not triton.knobs.runtime.interpret)


@triton.jit
def nibbles(q, zero, scale):
    """(low − zero) scale and (high − zero) scale, in the dtype of `scale`, of bytes q; all are of one shape."""
    dtype: tl.constexpr = scale.dtype
    if _ASSEMBLED:
        if dtype == tl.bfloat16:
            low, high = tl.inline_asm_elementwise(
                _BFLOAT16,
                "=&r,=&r,=&r,=&r,r,r,r,r,r",
                [q, (-128.0 - zero).to(dtype), scale],
                dtype=(tl.bfloat16, tl.bfloat16),
                is_pure=True,
                pack=4,
            )
        else:
            low, high = tl.inline_asm_elementwise(
                _FLOAT16,
                "=&r,=&r,=&r,=&r,r,r,r,r,r",
                [q, (-1024.0 - zero).to(dtype), scale],
                dtype=(tl.float16, tl.float16),
                is_pure=True,
                pack=4,
            )
    else:
        low = (((q & 15).to(tl.float32) - zero) * scale.to(tl.float32)).to(dtype)
        high = (((q >> 4).to(tl.float32) - zero) * scale.to(tl.float32)).to(dtype)
    return low, high


@triton.jit
def dot(a, b, total):
    """Total + a b; Triton's interpreter takes the bits of a bfloat16 for a number."""
    if _ASSEMBLED:
        return tl.dot(a, b, total)
    return tl.dot(a.to(tl.float32), b.to(tl.float32), total)
