"""Experts on the GPU (Triton): each row of x by a quantised group of its own, which is found on the device.

The addresses of all experts' parts are data, in a table (`experts.tables_of`), and so are the numbers of those that
are chosen. Launches are therefore the same whichever these are, and nobody asks the host: a CUDA graph can hold them.
A launch is for all rows, and reads of the experts what they need. What a program does is what it does for one group
(`quantized`, `refined`), with pointers from the table. Rows with the same expert read it again, from the cache.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from rankgate.ops.gpu import quantized, refined
from rankgate.ops.gpu.overlap import begin, overlaps
from rankgate.ops.gpu.tuning import tuned
from rankgate.quantized import groups_of

TABLE, RANK_WORD = tl.constexpr(15), tl.constexpr(4)  # words of `quantized.table_of`, the rank; then addresses of
CODES, SCALE, ZEROS, A, B, COMPONENT, PLANE, ROW, COLUMN, THRESHOLD = map(tl.constexpr, range(5, 15))


@triton.jit
def _table(tables, chosen):
    """That of the group for this program's row of x."""
    return tables + tl.load(chosen + tl.program_id(1)) * TABLE


@triton.jit
def _rank(table):
    return tl.load(table + RANK_WORD).to(tl.int32)


@triton.jit
def _part(table, WORD: tl.constexpr, dtype: tl.constexpr):
    return tl.multiple_of(tl.load(table + WORD).to(tl.pointer_type(dtype)), 16)


@triton.jit
def _produce(
    x, tables, chosen, low, channels, scaled, counts, n, lists, chunks,
    RANK: tl.constexpr, REFINED: tl.constexpr, CHUNK: tl.constexpr, LISTING: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """`refined.produce` for one row."""
    begin(OVERLAP)
    s, table = tl.program_id(1), _table(tables, chosen)
    refined.produce(
        x + s * n,
        _part(table, B, tl.int8),
        _part(table, COMPONENT, tl.float32),
        _part(table, COLUMN, tl.bfloat16),
        _part(table, THRESHOLD, tl.bfloat16),
        low + s * chunks * RANK,
        channels + s * lists * LISTING,
        scaled + s * lists * LISTING,
        counts + s * lists,
        1, n, _rank(table), lists, RANK, REFINED, CHUNK, LISTING, False,
    )  # fmt: skip


@triton.jit
def _refine(
    tables, chosen, low, channels, scaled, counts, extra, chunks, lists, m, n,
    RANK: tl.constexpr, REFINED: tl.constexpr, CHUNKS: tl.constexpr, PARTS: tl.constexpr, LISTS: tl.constexpr,
    LISTING: tl.constexpr, TOGETHER: tl.constexpr, SLOTS: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """`refined.refine` for one row: extra[row, part]. `_produce` has waited for `chosen`."""
    s, table = tl.program_id(1), _table(tables, chosen)
    refined.refine(
        _part(table, A, tl.int8),
        low + s * chunks * RANK,
        _part(table, PLANE, tl.int32),
        _part(table, ROW, tl.bfloat16),
        channels + s * lists * LISTING,
        scaled + s * lists * LISTING,
        counts + s * lists,
        extra + s * PARTS * m,
        chunks, lists, 1, m, n, _rank(table), RANK, REFINED, CHUNKS, PARTS, LISTS, LISTING, TOGETHER, SLOTS, OVERLAP,
    )  # fmt: skip


def _fitting(configs: list[triton.Config], named: dict[str, Any], **_: object) -> list[triton.Config]:
    return quantized.fitting(configs, {**named, "m": named["out"].numel()}, BATCH=1)


@tuned(quantized.CONFIGS, key=["m", "blocks", "BITS"], fitting=_fitting)
@triton.jit
def _multiply(
    x, out, tables, chosen, extra, m, blocks, one,
    BITS: tl.constexpr, ZERO: tl.constexpr, SPLIT: tl.constexpr, PARTS: tl.constexpr, OVERLAP: tl.constexpr,
    ROWS: tl.constexpr, WORDS: tl.constexpr,
):  # fmt: skip
    """`quantized.product` for one row of x."""
    if PARTS == 0:
        begin(OVERLAP)
    s, table = tl.program_id(1), _table(tables, chosen)
    if PARTS > 0:
        extra += s * PARTS * m
    quantized.product(
        x + s * blocks * 64,
        out + s * m,
        _part(table, CODES, tl.int32),
        _part(table, SCALE, tl.bfloat16),
        _part(table, ZEROS, tl.int8),
        extra,
        1, m, blocks, one, BITS, ZERO, SPLIT, 1, PARTS, OVERLAP, ROWS, WORDS,
    )  # fmt: skip


def linear(x: Tensor, tables: Tensor, chosen: Tensor, parts: list[Any]) -> Tensor:
    """Row s of y (rows, m) is row s of x (rows, n) by group chosen_s of `tables`; see `experts.tables_of`."""
    codes, scale, zero, *added = parts
    (rows, n), m, chosen = x.shape, len(codes), chosen.contiguous()
    whole, y = quantized.padded(x), x.new_empty((rows, m))
    extra = _added(x.contiguous(), tables, chosen, m, *added)
    overlap = overlaps(x.device)
    _multiply[lambda config: (triton.cdiv(m, config["ROWS"]), rows)](
        *(whole, y, tables, chosen, extra, m, whole.shape[1] // 64, quantized.ONE),
        BITS=4 if codes.dtype == torch.uint8 else 8,
        ZERO=zero is not None,
        SPLIT=groups_of(scale, n),
        PARTS=0 if extra is None else extra.shape[1],
        OVERLAP=overlap,
        launch_pdl=overlap,
    )
    return y


def _added(
    x: Tensor, tables: Tensor, chosen: Tensor, m: int, A: Tensor | None, _: object, __: object, plane: Any, *___: object
) -> Tensor | None:
    """`refined.added` (rows, parts, m) for each row by its own group."""
    if A is None and plane is None:
        return None
    (rows, n), launches = x.shape, refined.Launches.of(x, m, A, plane)
    scratch, chunks, lists = launches.scratch, launches.chunks, launches.lists
    extra = x.new_empty((rows, launches.parts, m), dtype=torch.float32)
    _produce[chunks + lists, rows](*(x, tables, chosen, *scratch, n, lists, chunks), **launches.producing)
    _refine[triton.cdiv(m, 128) * launches.parts, rows](
        *(tables, chosen, *scratch, extra, chunks, lists, m, n), **launches.refining
    )
    return extra
