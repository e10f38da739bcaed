"""A gated or ungated subspace on the GPU (Triton), for one token: the contract of `GatedGroup.reference`.

    y = A (B x),   or W x if ‖x − Bᵀ B x‖ > ε ‖x‖

Two launches, each of which overlaps with the one before where the hardware can (see `overlap`):

    _project    a few rows of B times a piece of x: its part of z, left in a scratch
    _combine    loads its rows of A meanwhile, waits for the first launch, adds up z, decides the gate from
                ‖x‖² − ‖z‖² (the rows of B are orthonormal), and multiplies: by A, which it has already, or by W

Every program of the second launch decides alike. Nobody asks the host: both can be captured in a CUDA graph.
The gate's statistic is exact up to the rounding of B, about 2⁻⁹ / √n of ‖x‖² for bfloat16.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from rankgate.ops.gpu.overlap import begin, overlaps
from rankgate.ops.gpu.tuning import tuned

CHUNK = 4096  # inputs of a program of `_project`, at most
SMALL = 1 << 19  # elements of A, below which a launch takes longer than reading them


@triton.jit
def _project(
    x, B, parts, norms, n, k,
    GATED: tl.constexpr, ROWS: tl.constexpr, CHUNK: tl.constexpr, CHUNKS: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """parts[chunk, row] = B x for some rows of B and one chunk of x; norms[chunk] = ‖x‖²."""
    block, chunk = tl.program_id(0) // CHUNKS, tl.program_id(0) % CHUNKS
    r, j = block * ROWS + tl.arange(0, ROWS), chunk * CHUNK + tl.arange(0, CHUNK)
    b = tl.load(B + r[:, None] * n + j, mask=(r[:, None] < k) & (j < n), other=0.0).to(tl.float32)
    begin(OVERLAP)
    v = tl.load(x + j, mask=j < n, other=0.0).to(tl.float32)
    tl.store(parts + chunk * k + r, tl.sum(b * v, 1), mask=r < k)
    if GATED:
        if block == 0:
            tl.store(norms + chunk, tl.sum(v * v, 0))


@triton.jit
def _z(parts, c, k, CHUNKS: tl.constexpr):
    """Columns c of z (1 × RANKS)."""
    z = tl.load(parts + c, mask=c < k, other=0.0)
    for chunk in tl.static_range(1, CHUNKS):
        z += tl.load(parts + chunk * k + c, mask=c < k, other=0.0)
    return z


def _config(rows: int, ranks: int, warps: int, columns: int = 128, stages: int = 1) -> triton.Config:
    """Of `_combine`: it reads so many rows, and of A so many ranks, of W so many columns together."""
    return triton.Config({"ROWS": rows, "RANKS": ranks, "COLUMNS": columns, "STAGES": stages}, num_warps=warps)


TALL, WIDE = _config(32, 128, 8, stages=3), _config(8, 256, 4, columns=512)


def _fitting(configs: list[triton.Config], named: dict[str, int], *, GATED: bool, **__: object) -> list[triton.Config]:
    """Of a small matrix only the last; behind a gate one of two.

    There what is best for A must not be chosen at the cost of W, and what it takes on an H100, 7 µs of which most is
    waiting, is too short to tell them apart.
    """
    m, n, k = (named[name] for name in "mnk")
    if GATED:
        return [TALL if m >= n else WIDE]
    others = [config for config in configs if config not in (TALL, WIDE)]
    return others if m * k >= SMALL else others[-1:]


@tuned(
    [
        *(TALL, WIDE),
        # ranks < threads: then z needs no exchange
        *(_config(*c) for c in ((64, 128, 8), (64, 256, 16), (32, 256, 16), (32, 128, 8), (16, 128, 8))),
    ],
    key=["m", "n", "k", "GATED"],
    fitting=_fitting,
)
@triton.jit
def _combine(
    x, y, A, W, parts, norms, m, n, k, limit,
    GATED: tl.constexpr, CHUNKS: tl.constexpr, OVERLAP: tl.constexpr,
    ROWS: tl.constexpr, RANKS: tl.constexpr, COLUMNS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """y for some rows; the gate opens where more than `limit` of ‖x‖² is outside the subspace."""
    if OVERLAP:
        tl.extra.cuda.gdc_launch_dependents()
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS))[:, None]
    c = tl.arange(0, RANKS)[None, :]
    a = tl.load(A + row * k + c, mask=(row < m) & (c < k), other=0.0)
    if OVERLAP:
        tl.extra.cuda.gdc_wait()
    z = _z(parts, c, k, CHUNKS)
    total, seen = a.to(tl.float32) * z, z * z
    for start in range(RANKS, k, RANKS):
        c = start + tl.arange(0, RANKS)[None, :]
        a = tl.load(A + row * k + c, mask=(row < m) & (c < k), other=0.0)
        z = _z(parts, c, k, CHUNKS)
        total += a.to(tl.float32) * z
        seen += z * z
    result = tl.sum(total, 1)
    if GATED:
        norm = tl.load(norms)
        for chunk in tl.static_range(1, CHUNKS):
            norm += tl.load(norms + chunk)
        if norm - tl.sum(seen) > limit * norm:
            whole = tl.zeros((ROWS, COLUMNS), tl.float32)
            for start in tl.range(0, n, COLUMNS, num_stages=STAGES):
                j = start + tl.arange(0, COLUMNS)[None, :]
                w = tl.load(W + row * n + j, mask=(row < m) & (j < n), other=0.0)
                whole += w.to(tl.float32) * tl.load(x + j, mask=j < n, other=0.0).to(tl.float32)
            result = tl.sum(whole, 1)
    out = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    tl.store(y + out, result.to(y.dtype.element_ty), mask=out < m)


def gemv(x: Tensor, B: Tensor, A: Tensor, W: Tensor | None, eps: float | None) -> Tensor:
    """y (…, m) in the dtype of one token x (…, n).

    Args:
        x: (…, n).
        B: (k, n).
        A: (m, k).
        W: (m, n), or None without a gate.
        eps: ε, or None without a gate.
    """
    x = x.contiguous()
    (m, k), n = A.shape, x.shape[-1]
    chunk = min(CHUNK, triton.next_power_of_2(n))
    chunks, weights = triton.cdiv(n, chunk), CHUNK if n <= CHUNK else 2 * CHUNK
    produced = max(1, weights // chunk)
    overlap = overlaps(x.device)
    y = x.new_empty((*x.shape[:-1], m))
    parts = x.new_empty(chunks * k, dtype=torch.float32)
    norms = x.new_empty(chunks, dtype=torch.float32)
    _project[triton.cdiv(k, produced) * chunks,](
        *(x, B, parts, norms, n, k),
        GATED=W is not None,
        ROWS=produced,
        CHUNK=chunk,
        CHUNKS=chunks,
        OVERLAP=overlap,
        launch_pdl=overlap,
        num_warps=weights // 1024,
    )
    _combine[lambda config: (triton.cdiv(m, config["ROWS"]),)](
        *(x, y, A, W, parts, norms, m, n, k),
        eps * eps if eps else -1.0,  # ε = 0: always, however z was rounded
        GATED=W is not None,
        CHUNKS=chunks,
        OVERLAP=overlap,
        launch_pdl=overlap,
    )
    return y
