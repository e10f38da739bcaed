"""What low rank and refinement add for several tokens on the GPU; see `QuantizedGroup.reference`.

Tokens open different channels, and the plane is read once for all of them: every channel that any of 32 tokens opens,
multiplied with x_j column_j of the tokens that open it and with 0 of the others. So 5 % for one token are 19 % of the
plane for 4, 34 % for 8, and nearly all of it for 64.

Two launches (`united.cu`), each of which overlaps with the one before, and the base with both (`overlap`):

    prepare   z: CHUNK inputs of B; and of LISTING channels those that any token opens, and x_j column_j of each
    united    the listed columns of E in some of the lists, and A z, for a strip of 128 rows

x_j column_j is rounded to bfloat16: E is a correction, of which that is 2⁻⁹ at most.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from rankgate.ops.gpu.launch import launch

STRIP, LISTING, CHUNK, STEP, LISTERS = 128, 512, 512, 16, 256  # as united.cu defines them
BLOCKS = 264  # of `united`, about, where there are lists enough: two for each multiprocessor of an H100


def columns(tokens: int) -> int:
    """Eights of tokens that a block takes."""
    return min(4, triton.next_power_of_2(triton.cdiv(tokens, 8)))


def added(
    x: Tensor,
    m: int,
    n: int,
    A: Tensor | None,
    B: Tensor | None,
    factor: Tensor | None,
    plane: Tensor | None,
    row: Tensor | None,
    column: Tensor | None,
    threshold: Tensor | None,
) -> Tensor | None:
    """A z + E x (parts, tokens, m) float32, to be summed over the parts, from 16-bit x (tokens, n filled up to 64).

    Low rank (A, B, factor) or refinement (plane, row, column, threshold) may be all None; without either, None.
    """
    if B is None and plane is None:
        return None
    (tokens, width), rank = x.shape, 0 if B is None else len(B)
    values = {"COLUMNS": columns(tokens), "REFINED": int(plane is not None), "HALF": int(x.dtype == torch.float16)}
    strips, tiles = triton.cdiv(m, STRIP), triton.cdiv(tokens, 8 * values["COLUMNS"])
    lists = triton.cdiv(n, LISTING) if plane is not None else 0
    chunks = triton.cdiv(n, CHUNK) if rank else 0
    together = triton.cdiv(lists, triton.cdiv(BLOCKS, strips * tiles))
    listed = tiles * lists * (LISTING + STEP)
    channels = x.new_empty(listed, dtype=torch.int32)
    coefficients = x.new_empty(listed * 8 * values["COLUMNS"], dtype=torch.bfloat16)
    counts = x.new_empty(tiles * lists, dtype=torch.int32)
    low = x.new_empty(chunks * tokens * rank, dtype=torch.float32)
    extra = x.new_empty((triton.cdiv(lists, together) if lists else 1, tokens, m), dtype=torch.float32)
    found = [channels, coefficients, counts, low]
    known = [extra if t is None else t for t in (B, factor, column, threshold)]
    sizes = [lists, tokens, n, width, rank]
    launch("united", "prepare", values, (lists + chunks, tiles, 1), LISTERS, [x, *known, *found, *sizes], x.device)
    known = [extra if t is None else t for t in (A, plane, row)]
    sizes = [lists, together, chunks, tokens, m, n, rank]
    threads = 128 if values["COLUMNS"] == 4 else 256
    grid = strips, len(extra), tiles
    launch("united", "united", values, grid, threads, [*known, *found, extra, *sizes], x.device)
    return extra
