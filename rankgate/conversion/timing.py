"""How long one token takes to pass a layer of given dimensions on this device."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from functools import cache, partial

import torch
from torch import Tensor
from torch.nn import functional as F

from rankgate.methods.planned import Setting
from rankgate.ops.cpu import team
from rankgate.ops.cpu.quantized import Product, X, Y
from rankgate.quantized import GROUP, LowRank, QuantizedGroup, QuantizedMatrix, Refinement

CACHE_BYTES = 96 << 20  # weights that a timing runs through, more than caches hold
COPIES = 256  # of a layer, at most: smaller layers are in the cache of a model that small, too
MOST_ROUNDS, ENOUGH_SECONDS = 20, 0.3


class Timer:
    """Seconds of one token through layers, each time running through more weights than caches hold."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.noise = torch.randint(0, 256, (CACHE_BYTES,), dtype=torch.uint8)
        self.floats = torch.rand(CACHE_BYTES // dtype.itemsize, dtype=dtype)
        self.dense = cache(self._dense)
        self.quantized = cache(self._quantized)

    def _dense(self, outputs: tuple[int, ...], n: int) -> float:
        """The members of a group, one after the other, as `nn.Linear` computes them."""
        sizes = [m * n for m in outputs]
        copies = min(COPIES, max(1, len(self.floats) // sum(sizes)))
        x = torch.rand(1, 1, n, dtype=self.dtype)
        weights = [cut(self.floats, sizes, i) for i in range(copies)]
        return run([partial(F.linear, x, W.view(-1, n)) for group in weights for W in group]) / copies

    def _quantized(self, m: int, n: int, setting: Setting) -> tuple[float, float]:
        """Seconds, and bytes read, of a quantised group of m outputs in all, called as a captured step does."""
        group, read = self._group(m, n, setting, 0)
        size = sum(p.numel() * p.element_size() for p in group.parameters())
        copies = min(COPIES, max(1, CACHE_BYTES // size))
        x, y = torch.rand(n), torch.empty(m)
        groups = [self._group(m, n, setting, i)[0] for i in range(copies)]
        products = [Product(group.table()) for group in groups]
        for product in products:
            product.arguments[X], product.arguments[Y] = x.data_ptr(), y.data_ptr()
        program = team.program([row for product in products for row in product.rows])
        return run([partial(team.run, program)]) / copies, read

    def _group(self, m: int, n: int, setting: Setting, i: int) -> tuple[QuantizedGroup, float]:
        """The i-th of many groups with noise for weights, its gate open for a share `refine` of x in [0, 1).

        And the bytes that such an x reads.
        """
        blocks = -(-n // GROUP)
        width = blocks * GROUP * setting.bits // 8
        sizes = [
            m * width,
            m * setting.rank,
            setting.rank * n,
            -(-m // GROUP) * n * GROUP // 2 if setting.refine else 0,
        ]
        codes, A, B, plane = cut(self.noise, sizes, i)
        kind = torch.uint8 if setting.bits == 4 else torch.int8
        base = QuantizedMatrix(n, codes.view(kind).view(m, width), torch.ones(m, blocks, dtype=torch.bfloat16), None)
        low_rank = refinement = None
        if setting.rank:
            low_rank = LowRank(A.view(torch.int8).view(m, -1), B.view(torch.int8).view(-1, n), torch.ones(setting.rank))
        if setting.refine:
            row, column = (torch.ones(size, dtype=torch.bfloat16) for size in (m, n))
            refinement = Refinement(m, plane, row, column, torch.full((n,), 1 - setting.refine, dtype=torch.bfloat16))
        group = QuantizedGroup(base, low_rank, refinement)
        stored = sum(p.numel() * p.element_size() for p in group.parameters())
        return group, stored - (1 - setting.refine) * plane.numel()


def cut(memory: Tensor, sizes: list[int], i: int) -> list[Tensor]:
    """The i-th run of pieces of `memory`, from the start again where it ends."""
    start = i * sum(sizes) % (len(memory) - sum(sizes) + 1)
    ends = list(itertools.accumulate(sizes, initial=start))
    return [memory[a:b] for a, b in itertools.pairwise(ends)]


def run(calls: list[Callable[[], object]]) -> float:
    """Least seconds of all `calls` over as many rounds as fit the time: what else the machine does only adds."""
    seconds: list[float] = []
    with torch.inference_mode():
        for call in calls:
            call()
        while len(seconds) < MOST_ROUNDS and sum(seconds) < ENOUGH_SECONDS:
            start = time.perf_counter()
            for call in calls:
                call()
            seconds.append(time.perf_counter() - start)
    return min(seconds)
