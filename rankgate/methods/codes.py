"""Choosing the codes of a matrix W (m × n), for inputs with second moment C = E[x xᵀ]: the least tr(E C Eᵀ).

    scales        the shrunken range with the least squared error, for each group of a row
    compensated   columns are rounded one after the other, those with the largest C_jj first, and each one's error is
                  made up for by the columns still to come (GPTQ: Frantar et al., 2022); then, some times over,
                  scales      of all groups of a row together, the least squares for its codes
                  codes       each column once more, given all others: coordinate descent, by blocks

Within a block of columns b, descent is the recursion of rounding with other numbers. With H = C damped, R = (W − Q) H
and L the lower triangle of H_bb, column k is best at q_k + (R_k − Σ_{j<k} H_jk δ_j) / H_kk, δ_j what columns before it
have moved by. They move to what they are rounded to, so with T = L⁻¹ diag(H_bb) that is q + L⁻¹ R less Σ_{j<k} T_kj
times the errors of rounding: `round_block` of these rows with U = Tᵀ.

Rows are independent. C is damped by 1 % of its mean diagonal, so inputs that calibration never saw are rounded to
nearest.
"""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor

from rankgate.ops.rounding import round_block
from rankgate.quantized import Grid, QuantizedMatrix, pad_to_group

SHRINK = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7)  # of a group's range, tried for its scale
DAMPING = 0.01  # of the mean diagonal of C, added to it before rounding
RIDGE = 1e-6  # the same for the low-rank step
KEPT = 1e-3  # weight of the scales before, of the mean of what says how much a scale matters
ROWS = 8192  # rounded to nearest at a time, which bounds the memory for an output embedding
COLUMNS = 2048  # of a matrix factorised or inverted at a time
BLOCK = 64  # columns whose errors are propagated together
SWEEPS = 3  # of scales and codes, after the first codes
EQUATIONS = 1 << 26  # coefficients of the systems for scales that are in memory together


class Metric:
    """What rounding needs to know of the inputs' second moment C (n × n)."""

    def __init__(self, C: Tensor) -> None:
        self.C = C.float()
        self.diagonal = self.C.diagonal()

    @cached_property
    def order(self) -> Tensor:
        """Columns (n) by falling C_jj."""
        return self.diagonal.argsort(descending=True)

    @cached_property
    def propagation(self) -> Tensor:
        """Upper U (n × n) with Uᵀ U = C⁻¹, in the order of rounding: row j says where the error of column j goes."""
        backwards = self.order.flip(0)
        L = factor(self.C[backwards][:, backwards], DAMPING)
        invert_(L)
        return L.float().flip(0, 1)  # L Lᵀ = C backwards, so R = L flipped is upper and R Rᵀ = C in that order

    @cached_property
    def damped(self) -> Tensor:
        """C (n × n) with its mean diagonal damped, in the order of rounding."""
        ordered = self.C[self.order][:, self.order]
        ordered.diagonal().add_(DAMPING * self.diagonal.mean().clamp_min(1e-30))
        return ordered

    @cached_property
    def root(self) -> Tensor:
        """L (n × n) with L Lᵀ = C."""
        return factor(self.C, RIDGE).float()


def factor(C: Tensor, damping: float) -> Tensor:
    """L (n × n, float64), lower, with L Lᵀ = C + `damping` of its mean diagonal, or the least of 10, 100 … times that.

    Fewer tokens than inputs, or inputs that are always zero, leave C singular, and rounding decides its signs.
    """
    mean = C.diagonal().double().mean().clamp_min(1e-30)
    while True:
        L = C.to(torch.float64, copy=True)
        L.diagonal().add_(damping * mean)
        if cholesky_(L):
            return L.tril_()
        damping *= 10


def cholesky_(C: Tensor) -> bool:
    """Write the lower factor of C (n × n, symmetric) over its lower triangle, if C is positive definite: is it?

    Some columns at a time, for the sake of memory: a library's factorisation holds C about three times.
    """
    for start in range(0, len(C), COLUMNS):
        stop = min(start + COLUMNS, len(C))
        C[start:, start:stop].addmm_(C[start:, :start], C[start:stop, :start].T, alpha=-1)
        corner, failed = torch.linalg.cholesky_ex(C[start:stop, start:stop])
        if failed:
            return False
        C[start:stop, start:stop] = corner
        below = C[stop:, start:stop]
        below.copy_(torch.linalg.solve_triangular(corner.T, below, upper=True, left=False))
    return True


def invert_(L: Tensor) -> None:
    """Write the inverse of L (n × n, lower) over it, some rows at a time."""
    for start in range(0, len(L), COLUMNS):
        rows = L[start : start + COLUMNS]
        left, corner = rows[:, :start], rows[:, start : start + len(rows)]
        corner.copy_(torch.linalg.solve_triangular(corner, torch.eye(len(rows)).to(L), upper=False))
        left.copy_(corner @ (left @ L[:start, :start])).neg_()


def scales(W: Tensor, weight: Tensor | None, grid: Grid) -> tuple[Tensor, Tensor | None]:
    """Scale (m × groups, bfloat16) and zero (the same, int8; None if symmetric) of every group of a row.

    The shrunken range with the least squared error of rounding to nearest, weighted by `weight` (n).
    """
    low, high, offset, size = grid.low, grid.high, grid.offset, grid.group_size
    groups = pad_to_group(W.float()).unflatten(-1, (-1, size))  # (m, groups, size)
    importance = torch.ones(()) if weight is None else pad_to_group(weight.float()).unflatten(-1, (-1, size))
    if grid.symmetric:
        start = groups.gather(-1, groups.abs().argmax(-1, keepdim=True)) / (low - offset)
    else:
        top, bottom = groups.amax(-1, keepdim=True).clamp_min(0), groups.amin(-1, keepdim=True).clamp_max(0)
        start, centre = (top - bottom) / (high - low), (top + bottom) / 2
    best = torch.full_like(start, torch.inf)
    scale, zero = torch.ones_like(start), torch.zeros_like(start)
    for shrink in SHRINK:
        s = (start * shrink).bfloat16().float()
        s[s == 0] = 1
        z = torch.full_like(s, offset)
        if not grid.symmetric:
            z = (low + (high - low) / 2 - centre / s).round().clamp(-128, 127)
        error = groups / s
        error = (error + z).round_().clamp_(low, high).sub_(error).sub_(z).mul_(s).square_().mul_(importance)
        total = error.sum(-1, keepdim=True)
        better = total < best
        best = torch.where(better, total, best)
        scale, zero = torch.where(better, s, scale), torch.where(better, z, zero)
    return scale[..., 0].bfloat16(), None if grid.symmetric else zero[..., 0].to(torch.int8)


def nearest(W: Tensor, bits: int) -> QuantizedMatrix:
    """W (m × n) rounded to nearest on a symmetric grid, every weight as important as the other."""
    grid = Grid(bits)
    codes = torch.empty(W.shape, dtype=torch.int8, device=W.device)
    parts = []
    for rows, part in zip(codes.split(ROWS), W.split(ROWS), strict=True):
        scale, _ = scales(part, None, grid)
        s = scale.float().repeat_interleave(grid.group_size, dim=1)[:, : W.shape[1]]
        rows.copy_((part.float() / s).add_(grid.offset).round_().clamp_(grid.low, grid.high))
        parts.append(scale)
    return QuantizedMatrix.pack(codes, torch.cat(parts), None, bits)


def compensated(W: Tensor, metric: Metric, grid: Grid, sweeps: int = SWEEPS) -> QuantizedMatrix:
    """W (m × n) rounded column by column, later columns making up for the errors of earlier ones. sweeps: see above."""
    scale, zero = scales(W, metric.diagonal, grid)
    order, U = metric.order, metric.propagation
    # One column of W is one contiguous row here, and so is one of scale and zero.
    s, group = scale.float().T, order // grid.group_size
    z = torch.full_like(s, grid.offset) if zero is None else zero.float().T
    wanted = W.float().T[order].contiguous()  # (n, m)
    rows, codes = wanted.clone(), torch.empty(wanted.shape, dtype=torch.int8, device=W.device)
    for start in range(0, len(rows), BLOCK):
        stop = min(start + BLOCK, len(rows))
        block = slice(start, stop)
        given = rows[block], s[group[block]], z[group[block]], U[block, block]
        codes[block], errors = round_block(*given, grid.low, grid.high)
        rows[stop:].addmm_(U[start:stop, stop:].T, errors, alpha=-1)
    for _ in range(sweeps):
        s = _fitted(wanted, codes, s, z, group, metric.damped)
        _descend_(wanted, codes, s[group], z[group], metric.damped, grid)
    unordered = torch.empty_like(codes)
    unordered[order] = codes
    return QuantizedMatrix.pack(unordered.T, s.T.bfloat16().contiguous(), zero, grid.bits)


def _fitted(wanted: Tensor, codes: Tensor, s: Tensor, z: Tensor, group: Tensor, H: Tensor) -> Tensor:
    """The scales s (groups × m) with which codes (n × m) come nearest to `wanted`, in the measure of H (n × n).

    Where codes say little about a scale it stays as it is. Rounded to bfloat16.
    """
    count, fitted = len(s), torch.empty_like(s)
    for start in range(0, s.shape[1], max(1, EQUATIONS // count**2)):
        part = slice(start, start + max(1, EQUATIONS // count**2))
        P = codes[:, part] - z[group, part]
        A = P.new_zeros(count, count, P.shape[1])
        for g in range(count):
            own = (group == g).nonzero()[:, 0]
            A[g].index_add_(0, group, (H[:, own] @ P[own]).mul_(P))
        b = P.new_zeros(count, P.shape[1]).index_add_(0, group, (H @ wanted[:, part]).mul_(P))
        kept = KEPT * A.diagonal().mean(1).clamp_min(1e-30)  # (rows,)
        A.diagonal().add_(kept[:, None])
        b += kept * s[:, part]
        fitted[:, part] = torch.linalg.solve(A.permute(2, 0, 1), b.T[..., None])[..., 0].T
    fitted = fitted.bfloat16().float()
    return torch.where(fitted.isfinite() & (fitted != 0), fitted, s)


def _descend_(wanted: Tensor, codes: Tensor, s: Tensor, z: Tensor, H: Tensor, grid: Grid) -> None:
    """Choose each column of codes (n × m) anew, in place, given all others; s and z (n × m)."""
    Q = (codes - z).mul_(s)
    R = H @ (wanted - Q)
    for start in range(0, len(codes), BLOCK):
        block = slice(start, start + BLOCK)
        corner = H[block, block]
        L = corner.tril().double()
        T = torch.linalg.solve_triangular(L, torch.diag(L.diagonal()), upper=False).float()
        rows = Q[block] + torch.linalg.solve_triangular(L, R[block].double(), upper=False).float()
        codes[block], _ = round_block(rows, s[block], z[block], T.T, grid.low, grid.high)
        moved = (codes[block] - z[block]).mul_(s[block]).sub_(Q[block])
        R.addmm_(H[:, block], moved, alpha=-1)
