"""What the GPU benchmarks share: timing by CUDA graphs, the ceiling, and groups of random weights."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from rankgate.core import GatedGroup, Subspace
from rankgate.quantized import GROUP, LowRank, QuantizedGroup, QuantizedMatrix, Refinement

COLD = 1e9  # bytes over which calls are spread: none finds its weights in the GPU's cache, and graphs start seldom
WARM = 0.25  # seconds of replays before any counts: after a compilation the GPU's clock is low
REPLAYS = 15
DEVICE = "cuda"
DTYPE = torch.bfloat16
K = 256  # of gsi
SVD_THEORY = 2.9  # the rank of `svd` is the one whose bytes are this many times fewer than dense


def microseconds(calls: Sequence[Callable[[], object]]) -> float:
    """Of one call, when all of them are replayed as one CUDA graph: the median of the replays."""
    for call in calls[:2]:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    warm = time.monotonic() + WARM
    while time.monotonic() < warm:
        graph.replay()
        torch.cuda.synchronize()
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    times = []
    for _ in range(REPLAYS):
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    return 1e3 * statistics.median(times) / len(calls)


def copy_ceiling() -> float:
    """TB/s of a copy from device to device, counting bytes read and bytes written."""
    source = torch.empty(1 << 32, dtype=torch.uint8, device=DEVICE).random_()
    target = torch.empty_like(source)
    return 2 * source.numel() / microseconds([lambda: target.copy_(source)] * 4) / 1e6


def rotate(make: Callable[[], Any], nbytes: float) -> list[Any]:
    """As many different ones as it takes to come to `COLD` bytes, at most 256."""
    return [make() for _ in range(min(256, max(2, round(COLD / nbytes))))]


def svd_rank(m: int, n: int) -> int:
    return round(m * n / (SVD_THEORY * (m + n)) / 64) * 64


def noise(*shape: int, dtype: torch.dtype = DTYPE) -> Tensor:
    return torch.randn(shape, device=DEVICE, dtype=dtype)


def gated(m: int, n: int, k: int, eps: float | None, dtype: torch.dtype = DTYPE) -> GatedGroup:
    """A random gated group, or an ungated one; eps 0: the gate is always open, 2: never."""
    B = torch.linalg.qr(torch.randn(n, k, device=DEVICE))[0].T.contiguous()
    W = torch.randn(m, n, device=DEVICE) / n**0.5
    A = (W @ B.T).to(dtype)
    return GatedGroup(Subspace(B.to(dtype), eps), A, None if eps is None else W.to(dtype))


def quantized(m: int, n: int, bits: int = 4, rank: int = 0, opened: float = 0.0) -> QuantizedGroup:
    """A random quantised group; `opened` is the share of channels that a standard normal x opens."""

    def random(low: int, high: int, *shape: int, dtype: torch.dtype = torch.int8) -> Tensor:
        return torch.randint(low, high, shape, device=DEVICE).to(dtype)

    def nibbles(*shape: int) -> Tensor:
        """Pairs of codes around 8: a matrix with another mean passes on little else of what is never negative."""
        return random(1, 16, *shape, dtype=torch.uint8) | random(1, 16, *shape, dtype=torch.uint8) << 4

    blocks = -(-n // GROUP)
    codes = nibbles(m, blocks * GROUP // 2) if bits == 4 else random(-127, 128, m, n)
    scale = (0.5 + torch.rand(m, blocks, device=DEVICE)) / (4.6 if bits == 4 else 74) / n**0.5  # outputs like x
    base = QuantizedMatrix(
        n,
        torch.nn.functional.pad(codes, (0, blocks * GROUP - n)) if bits == 8 else codes,
        scale.to(torch.bfloat16),
        None,
    )
    low_rank = refinement = None
    if rank:
        factors = random(-127, 128, m, rank), random(-127, 128, rank, n)
        low_rank = LowRank(*factors, torch.rand(rank, device=DEVICE) / (74**2 * n))
    if opened:
        level = float(torch.distributions.Normal(0, 1).icdf(torch.tensor(1 - opened / 2)))
        plane = nibbles(-(-m // GROUP) * n * GROUP // 2)
        row, column = torch.rand(m, device=DEVICE) / n**0.5, torch.rand(n, device=DEVICE) / 16
        threshold = torch.full((n,), level, device=DEVICE)
        refinement = Refinement(m, plane, *(v.to(torch.bfloat16) for v in (row, column, threshold)))
    return QuantizedGroup(base, low_rank, refinement)


def read_bytes(group: GatedGroup | QuantizedGroup, opened: float = 0.0) -> float:
    """Bytes of weights, as stored, that a call reads; `opened`: the share of what is behind the gate that it reads."""
    always = [p for name, p in group.named_parameters() if not name.startswith(("W", "refinement.codes"))]
    behind = group.W if isinstance(group, GatedGroup) else group.refinement and group.refinement.codes
    return sum(p.nbytes for p in always) + (0.0 if behind is None else opened * behind.nbytes)
