"""One launch per token for a gated or ungated subspace on the GPU (Triton): the contract of `GatedGroup.reference`.

    y = A (B x),   or W x for the tokens with ‖x − Bᵀ B x‖ > ε ‖x‖

The grid begins with *producers*, which multiply a few rows of B by a piece of x and leave their part of z in a scratch.
*Consumers* load their rows of A meanwhile, wait on a counter, add up z, decide the gate from ‖x‖² − ‖z‖² (the rows of B
are orthonormal) and multiply: by A, which they have already, or by W. Every consumer decides alike; nobody asks the
host, so the launch can be captured in a CUDA graph. The last consumer sets the counters back to zero.

The gate's statistic is exact up to the rounding of B, about 2⁻⁹ / √n of ‖x‖² for bfloat16.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from rankgate.ops.quantized_gpu import signal

CHUNK = 4096  # inputs of a producer, at most


@triton.jit
def _produce(
    x, B, parts, norms, block, chunk, tokens, n, k, GATED: tl.constexpr, ROWS: tl.constexpr, CHUNK: tl.constexpr
):
    """parts[chunk, token, row] = B x for some rows of B and one chunk of x; norms[chunk, token] = ‖x‖²."""
    r, j = block * ROWS + tl.arange(0, ROWS), chunk * CHUNK + tl.arange(0, CHUNK)
    b = tl.load(B + r[:, None] * n + j, mask=(r[:, None] < k) & (j < n), other=0.0).to(tl.float32)
    for token in range(tokens):
        v = tl.load(x + token * n + j, mask=j < n, other=0.0).to(tl.float32)
        tl.store(parts + (chunk * tokens + token) * k + r, tl.sum(b * v, 1), mask=r < k)
        if GATED:
            if block == 0:
                tl.store(norms + chunk * tokens + token, tl.sum(v * v, 0))


@triton.jit
def _z(parts, token, tokens, c, k, CHUNKS: tl.constexpr):
    """Columns c of z (BATCH × 1 × RANKS)."""
    z = tl.load(parts + token * k + c, mask=c < k, other=0.0, cache_modifier=".cg")
    for chunk in tl.static_range(1, CHUNKS):
        z += tl.load(parts + (chunk * tokens + token) * k + c, mask=c < k, other=0.0, cache_modifier=".cg")
    return z


@triton.jit
def _gated(
    x,
    y,
    B,
    A,
    W,
    counters,
    parts,
    norms,
    tokens,
    m,
    n,
    k,
    eps,
    GATED: tl.constexpr,
    ALWAYS: tl.constexpr,
    BATCH: tl.constexpr,
    PRODUCED: tl.constexpr,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
    ROWS: tl.constexpr,
    RANKS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STAGES: tl.constexpr,
):
    pid, producers = tl.program_id(0), tl.cdiv(k, PRODUCED) * CHUNKS
    if pid < producers:
        _produce(x, B, parts, norms, pid // CHUNKS, pid % CHUNKS, tokens, n, k, GATED, PRODUCED, CHUNK)
        signal(counters)
    else:
        row = ((pid - producers) * ROWS + tl.arange(0, ROWS))[None, :, None]
        token = tl.minimum(tl.arange(0, BATCH), tokens - 1)[:, None, None]
        c = tl.arange(0, RANKS)[None, None, :]
        a = tl.load(A + row * k + c, mask=(row < m) & (c < k), other=0.0)
        while tl.atomic_add(counters, 0, sem="acquire") < producers:
            pass
        z = _z(parts, token, tokens, c, k, CHUNKS)
        total, seen = a.to(tl.float32) * z, z * z
        for start in range(RANKS, k, RANKS):
            c = start + tl.arange(0, RANKS)[None, None, :]
            a = tl.load(A + row * k + c, mask=(row < m) & (c < k), other=0.0)
            z = _z(parts, token, tokens, c, k, CHUNKS)
            total += a.to(tl.float32) * z
            seen += z * z
        result = tl.sum(total, 2)
        if GATED:
            norm = tl.load(norms + token, cache_modifier=".cg")
            for chunk in tl.static_range(1, CHUNKS):
                norm += tl.load(norms + chunk * tokens + token, cache_modifier=".cg")
            norm = tl.sum(norm, 2)  # (BATCH, 1)
            fire = norm - tl.sum(seen, 2) > eps * eps * norm
            if ALWAYS:
                fire = norm > 0
            if tl.max(tl.sum(fire.to(tl.int32), 1), 0) > 0:
                whole = tl.zeros((BATCH, ROWS, COLUMNS), tl.float32)
                for start in tl.range(0, n, COLUMNS, num_stages=STAGES):
                    j = start + tl.arange(0, COLUMNS)[None, None, :]
                    w = tl.load(W + row * n + j, mask=(row < m) & (j < n), other=0.0)
                    v = tl.load(x + token * n + j, mask=j < n, other=0.0)
                    whole += w.to(tl.float32) * v.to(tl.float32)
                result = tl.where(fire, tl.sum(whole, 2), result)
        row = (pid - producers) * ROWS + tl.arange(0, ROWS)
        place, known = tl.arange(0, BATCH)[:, None], (tl.arange(0, BATCH) < tokens)[:, None]
        tl.store(y + place * m + row, result.to(y.dtype.element_ty), mask=known & (row < m))
        if tl.atomic_add(counters + 1, 1, sem="acq_rel") == tl.num_programs(0) - producers - 1:
            tl.store(counters, 0)
            tl.store(counters + 1, 0)


def gemv(x: Tensor, B: Tensor, A: Tensor, W: Tensor | None, eps: float, counters: Tensor) -> Tensor:
    """y (…, m) in the dtype of x (…, n), at most 8 tokens.

    Args:
        x: (…, n).
        B: (k, n).
        A: (m, k).
        W: (m, n), or None without a gate.
        eps: ε, of no meaning without a gate.
        counters: two int32, zero.
    """
    x = x.contiguous()
    (m, k), n, tokens = A.shape, x.shape[-1], x.numel() // x.shape[-1]
    batch = triton.next_power_of_2(tokens)
    tile, rows, ranks, columns, warps, stages = TILES(m, n, k, batch)
    chunk = min(CHUNK, triton.next_power_of_2(n))
    chunks, produced = triton.cdiv(n, chunk), max(1, tile // chunk)
    y = x.new_empty((*x.shape[:-1], m))
    parts = x.new_empty(chunks * tokens * k, dtype=torch.float32)
    norms = x.new_empty(chunks * tokens, dtype=torch.float32)
    _gated[triton.cdiv(k, produced) * chunks + triton.cdiv(m, rows),](
        x,
        y,
        B,
        A,
        W,
        counters,
        parts,
        norms,
        tokens,
        m,
        n,
        k,
        float(eps),
        GATED=W is not None,
        ALWAYS=eps <= 0,
        BATCH=batch,
        PRODUCED=produced,
        CHUNK=chunk,
        CHUNKS=chunks,
        ROWS=rows,
        RANKS=ranks,
        COLUMNS=columns,
        STAGES=stages,
        num_warps=warps,
    )
    return y


def TILES(m, n, k, batch):
    return 8192, max(4, 32 // batch), 256, 128, 8, 1
