"""A quantised input group for prompts on the GPU: strips of it in 16 bits (`unpack.cu`), into cuBLAS.

At so many tokens the product is bound by arithmetic, of which cuBLAS does most; unpacking costs as much as some hundred
tokens. What a gate opens would have to be multiplied by itself, which costs more than all of the refinement plane in
the same matrix: so every channel is open for every token here. A strip is small enough to stay in the GPU's cache until
it is multiplied. If tokens are so few that only a larger one keeps all multiprocessors busy, it is all of the group:
launches then cost more than memory.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from rankgate.ops.gpu.launch import launch, takes
from rankgate.quantized import GROUP, QuantizedGroup, groups_of

CACHED = 16 << 20  # bytes of a strip at most, if there is work enough in it
CACHE = 48 << 20  # bytes, beyond which there is no reason for strips
WORK = 132 * 128 * 256  # results of a strip, at least
LARGEST = 256 << 20  # bytes of a strip
ROWS = 128  # of a block


def multiply(x: Tensor, parts: list[Any]) -> Tensor:
    """y (tokens, m) from x (tokens, n) and `QuantizedGroup.parts`, as if every channel were open.

    In float32, and on GPUs older than Ampere, by the reference, which unpacks the whole group.
    """
    codes, scale, zero, A, _, _, plane, *_, threshold = parts
    if not takes(x):
        opened = None if threshold is None else torch.full_like(threshold, -1)
        return QuantizedGroup.of(x.shape[1], [*parts[:-1], opened]).reference(x)
    (tokens, n), m = x.shape, len(codes)
    blocks = triton.cdiv(n, GROUP)
    y = x.new_empty((tokens, m))
    of_row = n * x.element_size()
    strip = max(CACHED // of_row, WORK // tokens)
    if strip * of_row > CACHE:
        strip = LARGEST // of_row
    strip = min(max(strip // ROWS * ROWS, ROWS), m)
    W = x.new_empty((strip, n))
    values = {"BITS": 4 if codes.dtype == torch.uint8 else 8, "ZERO": int(zero is not None)}
    values["GROUPS"] = groups_of(scale, n)
    values |= {"HALF": int(x.dtype == torch.float16), "REFINED": int(plane is not None)}
    known = [W if t is None else t for t in (W, *parts[:-1])]
    rank = 0 if A is None else A.shape[1]
    values["STEPS"] = triton.cdiv(rank, 16)
    for start in range(0, m, strip):
        stop = min(start + strip, m)
        grid = blocks, triton.cdiv(stop - start, ROWS), 1
        launch("unpack", "unpack", values, grid, ROWS, [*known, start, stop, n, blocks, rank], x.device)
        torch.mm(x, W[: stop - start].T, out=y[:, start:stop])
    return y
