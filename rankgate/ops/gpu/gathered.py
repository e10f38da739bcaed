"""A gated or ungated subspace on the GPU for several tokens and prompts: the contract of `GatedGroup.reference`.

The products with B and A are cuBLAS's. Two kernels (Triton) see to the gate:

    _gate       whether that of a token opens, from ‖x‖² − ‖z‖²; z in the dtype of x
    _multiply   the tokens whose gate is open with W, into their rows of y

Of some tokens a program of `_multiply` takes all, and ends at once if none is open. Of a prompt the open ones are moved
to the front of a list: how many they are only the GPU knows, so the grid is for all tokens, and programs beyond the
last open one end at once. Nobody asks the host: all can be captured in a CUDA graph.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from rankgate.ops.gpu import gated
from rankgate.ops.gpu.dots import dot

TOGETHER = 64  # tokens that a program of `_multiply` takes without a list
BLOCK = 1024  # of x and z that `_gate` takes at once


@triton.jit
def _gate(x, z, narrow, fire, n, k, limit, BLOCK: tl.constexpr):
    """fire[token] = whether more than `limit` of ‖x‖² is outside the subspace; narrow = z."""
    token, i = tl.program_id(0), tl.arange(0, BLOCK)
    whole, seen = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32)
    for start in range(0, n, BLOCK):
        v = tl.load(x + token * n + start + i, mask=start + i < n, other=0.0).to(tl.float32)
        whole += v * v
    for start in range(0, k, BLOCK):
        v = tl.load(z + token * k + start + i, mask=start + i < k, other=0.0)
        seen += v * v
        tl.store(narrow + token * k + start + i, v.to(narrow.dtype.element_ty), mask=start + i < k)
    norm = tl.sum(whole, 0)
    tl.store(fire + token, (norm - tl.sum(seen, 0) > limit * norm).to(tl.int8))


@triton.jit
def _multiply(
    x, W, y, fire, order, count, tokens, m, n,
    LISTED: tl.constexpr, TOKENS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """y[token] = W x[token] for the tokens whose gate is open, the first `count` of `order` if they are LISTED."""
    i = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    if LISTED:
        opened = i < tl.load(count)
        token = tl.load(order + i, mask=opened, other=0)
    else:
        opened = tl.load(fire + i, mask=i < tokens, other=0) != 0
        token = i
    if tl.sum(opened.to(tl.int32), 0) > 0:
        row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
        rows, total = row.to(tl.int64)[None, :] * n, tl.zeros((TOKENS, ROWS), tl.float32)
        for start in range(0, n, COLUMNS):
            j = start + tl.arange(0, COLUMNS)
            v = tl.load(x + token[:, None] * n + j[None, :], mask=opened[:, None] & (j < n)[None, :], other=0.0)
            w = tl.load(W + rows + j[:, None], mask=(row < m)[None, :] & (j < n)[:, None], other=0.0)
            total = dot(v, w, total, "ieee")
        place = y + token[:, None] * m + row[None, :]
        tl.store(place, total.to(y.dtype.element_ty), mask=opened[:, None] & (row < m)[None, :])


def shape(tokens: int) -> dict[str, Any]:
    """Of a program of `_multiply`: many small ones for some tokens, large ones for a prompt."""
    if tokens <= TOGETHER:
        tile = max(16, triton.next_power_of_2(tokens))
        return {"LISTED": False, "TOKENS": tile, "ROWS": 32, "COLUMNS": 128, "num_stages": 4}
    return {"LISTED": True, "TOKENS": 128, "ROWS": 128, "COLUMNS": 64, "num_warps": 8, "num_stages": 3}


def linear(x: Tensor, B: Tensor, A: Tensor, W: Tensor | None, eps: float | None) -> Tensor:
    """y (…, m) in the dtype of x (…, n), from B (k, n), A (m, k), and W (m, n) and ε, or None without a gate."""
    if x.numel() == x.shape[-1]:
        return gated.gemv(x, B, A, W, eps)
    if W is None or eps is None:
        return F.linear(F.linear(x, B), A)
    flat = x.reshape(-1, x.shape[-1]).contiguous()
    (tokens, n), (m, k) = flat.shape, A.shape
    if flat.is_cuda and flat.element_size() == 2:
        z = torch.mm(flat, B.T, out_dtype=torch.float32)
    else:
        z = F.linear(flat.float(), B.float())
    narrow, fire = x.new_empty((tokens, k)), x.new_empty(tokens, dtype=torch.int8)
    limit = eps * eps if eps else -1.0  # ε = 0: always, however z was rounded
    _gate[tokens,](flat, z, narrow, fire, n, k, limit, BLOCK=BLOCK)
    y, of_program = F.linear(narrow, A), shape(tokens)
    order = count = None
    if of_program["LISTED"]:
        order, count = torch.argsort(fire, descending=True), fire.sum()
    grid = triton.cdiv(m, of_program["ROWS"]), triton.cdiv(tokens, of_program["TOKENS"])
    _multiply[grid](flat, W, y, fire, order, count, tokens, m, n, **of_program)
    return y.view(*x.shape[:-1], m)
