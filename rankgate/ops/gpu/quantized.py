"""A quantised input group on the GPU (Triton), for a few tokens: the contract of `QuantizedGroup.reference`.

What low rank and refinement add is found out in launches of their own (`refined`), with which `_multiply`
overlaps where the hardware can. Nobody asks the host: all can be captured in a CUDA graph.

Codes become floats without conversions: under the exponent of 1, a nibble at bit 16 is 1 + q / 128, one at bit 12 is
1 + q / 2048. So

    Σ (q − z) x = 128 (Σ_low (1 + q / 128) x + Σ_high (1 + q / 2048) 16 x  −  Σ_low x − 16 Σ_high x − z / 128 Σ x)

over the low and the high nibbles of the bytes, in float32, whatever the dtype of x.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from rankgate.ops.gpu import refined
from rankgate.ops.gpu.overlap import begin, overlaps
from rankgate.ops.gpu.tuning import tuned
from rankgate.quantized import groups_of

SMALL = 1 << 22  # weights, below which a launch takes longer than reading them
ONE = 0x3F800000  # float32 1, an argument because the compiler moves constants to a register for every word
CONFIGS = [
    triton.Config({"ROWS": rows, "WORDS": words}, num_warps=warps)  # words < threads: then x needs no exchange
    for rows, words, warps in ((64, 64, 4), (32, 64, 4), (32, 128, 8), (16, 128, 8), (16, 256, 16), (8, 64, 4))
]


@triton.jit
def _low(q, one):
    """1 + q / 128 for the nibble at bit 16."""
    return ((q & 0x000F0000) | one).to(tl.float32, bitcast=True)


@triton.jit
def _high(q, one):
    """1 + q / 2048 for the nibble at bit 12."""
    return ((q & 0x0000F000) | one).to(tl.float32, bitcast=True)


@triton.jit
def _byte(q, SHIFT: tl.constexpr):
    """The signed byte of q at SHIFT, as float32; q has its sign bits flipped."""
    return (((q >> SHIFT) & 255) | 0x4B000000).to(tl.float32, bitcast=True) - 8388736.0


@triton.jit
def _four(x, at, inside):
    """x at 4 at … 4 at + 3, as four float32 tensors: loaded in one piece where they fit into 64 bits."""
    if x.dtype.element_ty.primitive_bitwidth == 32:
        x0 = tl.load(x + 4 * at, mask=inside, other=0.0)
        x1 = tl.load(x + 4 * at + 1, mask=inside, other=0.0)
        x2 = tl.load(x + 4 * at + 2, mask=inside, other=0.0)
        x3 = tl.load(x + 4 * at + 3, mask=inside, other=0.0)
    else:
        packed = tl.load(x.to(tl.pointer_type(tl.int64)) + at, mask=inside, other=0)
        x0, x1 = _two(packed.to(tl.int32), x.dtype.element_ty)
        x2, x3 = _two((packed >> 32).to(tl.int32), x.dtype.element_ty)
    return x0, x1, x2, x3


@triton.jit
def _two(packed, dtype: tl.constexpr):
    if dtype == tl.bfloat16:
        first, second = (packed << 16).to(tl.float32, bitcast=True), (packed & -65536).to(tl.float32, bitcast=True)
    else:
        first = packed.to(tl.int16).to(dtype, bitcast=True).to(tl.float32)
        second = (packed >> 16).to(tl.int16).to(dtype, bitcast=True).to(tl.float32)
    return first, second


@triton.jit
def _sum(y, v, zero, group, BITS: tl.constexpr, ZERO: tl.constexpr, GROUPS: tl.constexpr):
    """Σ (q − z) x of each group (batch, rows, groups), from parts of Σ q x / 128 or Σ q x, and of Σ x, in each word."""
    PER: tl.constexpr = y.shape[2] // GROUPS
    y = tl.sum(tl.reshape(y, (y.shape[0], y.shape[1], GROUPS, PER)), 3)
    if ZERO:
        z = tl.load(zero + group).to(tl.float32)
        if BITS == 4:
            z /= 128
        y -= z * tl.sum(tl.reshape(v, (v.shape[0], 1, GROUPS, PER)), 3)
    return y * 128 if BITS == 4 else y


def fitting(configs: list[triton.Config], named: dict[str, int], *, BATCH: int, **__: object) -> list[triton.Config]:
    """Those whose sums fit into registers; of a small matrix only the last, there is nothing to gain."""
    fit = [config for config in configs if config.kwargs["ROWS"] * BATCH <= 128]
    return fit if named["m"] * named["blocks"] * 64 >= SMALL else fit[-1:]


@triton.jit
def product(
    x,
    out,
    codes,
    scale,
    zero,
    extra,
    tokens,
    m,
    blocks,
    one,
    BITS: tl.constexpr,
    ZERO: tl.constexpr,
    SPLIT: tl.constexpr,
    BATCH: tl.constexpr,
    PARTS: tl.constexpr,
    OVERLAP: tl.constexpr,
    ROWS: tl.constexpr,
    WORDS: tl.constexpr,
):
    """out = Q x + Σ extra, over its PARTS, for some rows and all tokens. SPLIT: 2 if a block has two groups, else 1."""
    if PARTS == 0:
        begin(OVERLAP)
    elif OVERLAP:
        tl.extra.cuda.gdc_launch_dependents()  # `refined.produce` has waited for x
    PER: tl.constexpr = 2 * BITS  # words of a block of 64
    SIDE: tl.constexpr = 1 if BITS == 4 else SPLIT  # groups of a block side by side: nibbles of two are in each word
    GROUPS: tl.constexpr = WORDS // PER * SIDE
    words, size = codes.to(tl.pointer_type(tl.int32)), blocks * PER
    batch, rows = tl.arange(0, BATCH)[:, None], tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    token, row = tl.minimum(batch, tokens - 1)[:, :, None], tl.minimum(rows, m - 1)[None, :, None]
    total = tl.zeros((BATCH, ROWS, GROUPS), tl.float32)
    for start in range(0, blocks, WORDS // PER):
        w = start * PER + tl.arange(0, WORDS)[None, None, :]
        q = tl.load(words + row * size + w, mask=w < size, other=0)
        at = tl.minimum(start * SIDE + tl.arange(0, GROUPS), blocks * SIDE - 1)[None, None, :]
        group = (row * (blocks * SIDE) + at) * (SPLIT // SIDE)
        s = tl.load(scale + group).to(tl.float32)
        first = token * (16 * blocks) + w // PER * 16 + w % PER  # of the fours of inputs: 16 in a block
        x0, x1, x2, x3 = _four(x, first, w < size)
        v = (x0 + x1) + (x2 + x3)
        if BITS == 4:
            x4, x5, x6, x7 = _four(x, first + 8, w < size)
            above = (x4 + x5) + (x6 + x7)
            middle = 0.0 if ZERO else 0.0625  # 8 / 128
            right, left = q >> 8, q << 8
            y = _low(q, one) * x2 - (1 + middle) * v
            y += _low(left, one) * x1
            y += _low(right, one) * x3
            y += _low(q << 16, one) * x0
            high = _high(q, one) * (16 * x5) - (16 + middle) * above
            high += _high(left, one) * (16 * x4)
            high += _high(right, one) * (16 * x6)
            high += _high(q >> 16, one) * (16 * x7)
            if SPLIT == 2:
                second = tl.load(scale + group + 1).to(tl.float32)
                total += second * _sum(high, above, zero, group + 1, BITS, ZERO, GROUPS)
            else:
                y += high
                v += above
        else:
            q = q ^ -2139062144  # 0x80808080
            y = _byte(q, 0) * x0 + _byte(q, 8) * x1 + _byte(q, 16) * x2 + _byte(q, 24) * x3
        total += s * _sum(y, v, zero, group, BITS, ZERO, GROUPS)
    y = tl.sum(total, 2)
    place, inside = batch * m + rows, (batch < tokens) & (rows < m)
    if OVERLAP and PARTS > 0:
        tl.extra.cuda.gdc_wait()
    for part in tl.static_range(PARTS):
        y += tl.load(extra + part * tokens * m + place, mask=inside, other=0.0)
    tl.store(out + place, y.to(out.dtype.element_ty), mask=inside)


_multiply = tuned(CONFIGS, key=["m", "blocks", "BITS", "BATCH"], fitting=fitting)(product)


def gemv(x: Tensor, codes: Tensor, scale: Tensor, zero: Tensor | None, *added: Tensor | None) -> Tensor:
    """y (tokens, m) from at most 8 tokens x (tokens, n) and the tensors of `QuantizedGroup.parts`."""
    (tokens, n), m, bits = x.shape, len(codes), 4 if codes.dtype == torch.uint8 else 8
    whole, y = padded(x), x.new_empty((tokens, m))
    extra = refined.added(x, m, *added)
    overlap = overlaps(x.device)
    _multiply[lambda config: (triton.cdiv(m, config["ROWS"]),)](
        *(whole, y, codes, scale, zero, extra, tokens, m, whole.shape[1] // 64, ONE),
        BITS=bits,
        ZERO=zero is not None,
        SPLIT=groups_of(scale, n),
        BATCH=triton.next_power_of_2(tokens),
        PARTS=0 if extra is None else len(extra),
        OVERLAP=overlap,
        launch_pdl=overlap,
    )
    return y


def padded(x: Tensor) -> Tensor:
    """x (tokens, n), n filled up to whole groups, where 128 bits can be loaded at once."""
    missing = -x.shape[-1] % 64
    whole = F.pad(x, (0, missing)) if missing else x.contiguous()
    return whole if whole.data_ptr() % 16 == 0 else whole.clone()
