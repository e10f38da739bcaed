"""Choosing the codes: one input group from its dense weights to packed bytes.

W (m × n) has the members' rows stacked. With C = E[x xᵀ] and F the Fisher diagonal of the outputs (see `calibration`),
an error E of the weights costs about

    ½ Σ_i F_i E[(E x)_i²] = ½ tr(D E C Eᵀ D)      D = diag(√F)      nats of KL per token,

the measure of every step here:

1. Q   codes in groups of inputs, scales searched on a short list of shrunken ranges. Columns are rounded one after
       the other, those with the largest C_jj first, and each one's error is made up for by the columns still to come
       (GPTQ: Frantar et al., 2022). D does not matter to this step: rows are independent.
2. AB  the best rank-r approximation of D (W − Q) C^½, mapped back without an inverse (as in `methods.svd`), then
       rounded to 8 bits.
3.     Q again, now of W − A B, and so on: a few rounds.
4. E   the refinement plane of what is left, W − Q − A B, 4 bits. Reading column j of E is worth
       x_j² ‖D E_j‖² and costs m / 2 bytes, so gates open above one level of worth per byte for the whole model.

Where there is a refinement plane, 1–3 use the second moment of what closed gates leave to them (`closed_moment`): an
error that an open gate makes up for is none of their business, and making up for it in other columns would be wrong.

Rank is spent where it buys most: chunks of 8 components, in the order of their worth per byte over all groups.

Not covered: clipping is searched per group and before rounding, not jointly with it; C is damped by 1 % of its
mean diagonal, so inputs that calibration never saw are rounded to nearest; its correlations count by half in step 1, as
those of other texts differ (measured on text of another kind, see docs/log.md).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from rankgate.ops.rounding import round_block
from rankgate.quantized import Grid, LowRank, QuantizedMatrix, Refinement, pad_to_group

SHRINK = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7)  # of a group's range, tried for its scale
COLUMN_SHRINK = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3)  # the same for a column of the refinement
TRUST = 0.5  # in correlations of inputs when columns make up for each other: other texts have other ones
DAMPING = 0.01  # of the mean diagonal of C, added to it before rounding
RIDGE = 1e-6  # the same for the low-rank step
FLOOR = 1e-3  # of the mean sensitivity, added to each
ROWS = 8192  # rounded to nearest at a time, which bounds the memory for an output embedding
OPEN_PART = 0.05  # of C that counts also behind open gates
COLUMNS = 2048  # of a matrix factorised or inverted at a time
BLOCK = 64  # columns whose errors are propagated together
CHUNK = 8  # components of a low-rank correction that kernels handle at a time


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
        """Upper U (n × n) with Uᵀ U = C⁻¹, in the order of rounding: row j says where the error of column j goes.

        Of C with what is off its diagonal times `TRUST`.
        """
        backwards = self.order.flip(0)
        trusted = self.C[backwards][:, backwards].mul_(TRUST)
        trusted.diagonal().copy_(self.diagonal[backwards])
        L = factor(trusted, DAMPING)
        invert_(L)
        return L.float().flip(0, 1)  # L Lᵀ = C backwards, so R = L flipped is upper and R Rᵀ = C in that order

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


def compensated(W: Tensor, metric: Metric, grid: Grid) -> QuantizedMatrix:
    """W (m × n) rounded column by column, later columns making up for the errors of earlier ones."""
    scale, zero = scales(W, metric.diagonal, grid)
    order, U = metric.order, metric.propagation
    # One column of W is one contiguous row here, and so is one of scale and zero.
    s, group = scale.float().T, order // grid.group_size
    z = torch.full_like(s, grid.offset) if zero is None else zero.float().T
    rows = W.float().T[order].contiguous()  # (n, m)
    codes = torch.empty(rows.shape, dtype=torch.int8, device=W.device)
    for start in range(0, len(rows), BLOCK):
        stop = min(start + BLOCK, len(rows))
        block = slice(start, stop)
        given = rows[block], s[group[block]], z[group[block]], U[block, block]
        codes[block], errors = round_block(*given, grid.low, grid.high)
        rows[stop:].addmm_(U[start:stop, stop:].T, errors, alpha=-1)
    unordered = torch.empty_like(codes)
    unordered[order] = codes
    return QuantizedMatrix.pack(unordered.T, scale, zero, grid.bits)


def output_weights(sensitivity: Tensor) -> Tensor:
    """D (m), positive also where no gradient was seen."""
    return (sensitivity.float() + FLOOR * sensitivity.float().mean()).sqrt().clamp_min(1e-12)


def decompose(E: Tensor, metric: Metric, D: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The leading left singular vectors (m × rank) and singular values of D E C^½. Deterministic."""
    M = (D[:, None] * E) @ metric.root
    full = min(M.shape)
    if 3 * rank >= full:
        U, sigma, _ = torch.linalg.svd(M, full_matrices=False)
    else:
        with torch.random.fork_rng(devices=[M.device] if M.is_cuda else []):
            torch.manual_seed(0)
            U, sigma, _ = torch.svd_lowrank(M, q=rank + CHUNK, niter=4)
    return U[:, :rank], sigma[:rank]


def low_rank(E: Tensor, metric: Metric, D: Tensor, rank: int) -> LowRank:
    """The correction A B of rank `rank` that leaves the least of an error E (m × n), in 8 bits."""
    U, _ = decompose(E, metric, D, rank)
    return LowRank.round(U / D[:, None], U.T @ (D[:, None] * E))


def refine(E: Tensor, D: Tensor) -> tuple[Refinement, Tensor]:
    """The refinement plane of E (m × n), its gates shut, and ‖D E_j‖ of what each column restores (n)."""
    row = E.square().mean(1).sqrt()
    row = (row / row.mean().clamp_min(1e-20)).clamp_min(1e-6).bfloat16().float()
    scaled = E / row[:, None]
    weight = (D * row).square()[:, None]
    largest = scaled.abs().amax(0).clamp_min(1e-20) / 7.5  # codes reach from −8 to 7
    best, column = torch.full_like(largest, torch.inf), largest
    for shrink in COLUMN_SHRINK:
        s = (largest * shrink).bfloat16().float()
        error = ((scaled / s).round_().clamp_(-8, 7).mul_(s).sub_(scaled).square_().mul_(weight)).sum(0)
        better = error < best
        best, column = torch.where(better, error, best), torch.where(better, s, column)
    codes = (scaled / column).round_().clamp_(-8, 7)
    restored = torch.linalg.vector_norm(codes * column * (D * row)[:, None], dim=0)
    shut = torch.full_like(column, torch.finfo(torch.float32).max)
    return Refinement.pack(codes + 8, row, column, shut), restored


@dataclass(frozen=True)
class Losses:
    """Predicted KL in nats per token: of Q alone, with A B, and with every gate open as well."""

    rounded: float
    corrected: float
    refined: float


@dataclass(frozen=True)
class GroupResult:
    """A quantised group. `worth`: ‖D E_j‖ of the refinement's columns (n), None without one; gates are still shut."""

    base: QuantizedMatrix
    low_rank: LowRank | None
    refinement: Refinement | None
    worth: Tensor | None
    losses: Losses


def quantize_group(
    W: Tensor,
    C: Tensor,
    sensitivity: Tensor,
    *,
    grid: Grid,
    rank: int,
    refined: bool,
    rounds: int = 3,
) -> GroupResult:
    """Quantise W (m × n), given C (n × n) and the outputs' sensitivity F (m). Deterministic.

    grid: of Q. rank: of the correction, 0 for none. refined: also make a refinement plane, with shut gates.
    rounds: how often Q and A B are chosen in turn.
    """
    W, metric, D = W.float(), Metric(C), output_weights(sensitivity)
    base = compensated(W, metric, grid)
    rounded = predicted_loss(W - base.dequantize(), metric, D)
    correction = None
    for _ in range(rounds if rank else 0):
        if correction is not None:
            base = compensated(W - correction.dequantize(), metric, grid)
        correction = low_rank(W - base.dequantize(), metric, D, rank)
    left = W - base.dequantize()
    if correction is not None:
        left -= correction.dequantize()
    corrected = predicted_loss(left, metric, D)
    if not refined:
        return GroupResult(base, correction, None, None, Losses(rounded, corrected, corrected))
    plane, worth = refine(left, D)
    opened = predicted_loss(left - plane.dequantize(), metric, D)
    return GroupResult(base, correction, plane, worth, Losses(rounded, corrected, opened))


def predicted_loss(E: Tensor, metric: Metric, D: Tensor) -> float:
    """½ tr(D E C Eᵀ D): nats of KL per token that an error E (m × n) of the weights costs, by second order."""
    return 0.5 * ((E @ metric.C).mul_(E).sum(1) @ D.square()).item()


def spectrum(W: Tensor, C: Tensor, sensitivity: Tensor, grid: Grid, rank: int) -> Tensor:
    """Singular values (≤ `rank`) of what rounding leaves of W in the measure above: what a correction could restore."""
    metric, D = Metric(C), output_weights(sensitivity)
    W = W.float()
    E = W - compensated(W, metric, grid).dequantize()
    return decompose(E, metric, D, min(rank, *E.shape))[1]


def allocate_ranks(spectra: Sequence[Tensor], shapes: Sequence[tuple[int, int]], rank: int) -> list[int]:
    """Ranks, multiples of 8, that restore most for the bytes of `rank` components in every group.

    spectra: singular values per group, descending, as far as they are known. shapes: (m, n) per group.
    """
    budget = sum(rank * (m + n) for m, n in shapes)
    chunks = []
    for g, (sigma, (m, n)) in enumerate(zip(spectra, shapes, strict=True)):
        for gain in sigma[: len(sigma) // CHUNK * CHUNK].double().square().unflatten(0, (-1, CHUNK)).sum(1).tolist():
            chunks.append((gain / (m + n), g))
    ranks = [0] * len(shapes)
    for gain, g in sorted(chunks, reverse=True):
        cost = CHUNK * sum(shapes[g])
        if gain > 0 and cost <= budget:
            ranks[g] += CHUNK
            budget -= cost
    return ranks


@dataclass(frozen=True)
class ChannelWorth:
    """What a channel gate decides by.

    x: (T, n) sampled inputs. worth: (n,) of a channel per |x_j|. cost: what reading a channel costs, in any unit.
    """

    x: Tensor
    worth: Tensor
    cost: float

    def thresholds(self, level: float) -> Tensor:
        """t (n) so that |x_j| > t_j where (x_j worth_j)² / cost > level."""
        largest = torch.finfo(torch.float32).max
        t: Tensor = (level * self.cost) ** 0.5 / self.worth.float()
        return t.nan_to_num(largest, largest)

    def share(self, level: float) -> float:
        """Share of the sampled channels whose gate is open."""
        return (self.x.abs() > self.thresholds(level)).float().mean().item()


def rounding_worth(W: Tensor, sensitivity: Tensor, bits: int) -> Tensor:
    """‖D E_j‖ (n) of W (m × n) rounded to nearest: what opening channel j will about be worth, before Q is chosen."""
    E = W.float() - nearest(W, bits).dequantize()
    worth: Tensor = torch.linalg.vector_norm(output_weights(sensitivity)[:, None] * E, dim=0)
    return worth


def closed_moment(C: Tensor, x: Tensor, thresholds: Tensor) -> Tensor:
    """Second moment (n × n) of the inputs that gates leave to Q and A B, from C and sampled inputs x (T × n).

    s_j is the share of E[x_j²] from tokens whose gate j is closed. With gates that close independently of each other,
    E[x_i x_j; both closed] = C_ij s_i s_j off the diagonal, C_jj s_j on it. A part of C stays, because what an open
    gate adds is rounded as well.
    """
    energy = x.float().square()
    s = (energy * (x.abs() <= thresholds)).mean(0) / energy.mean(0).clamp_min(torch.finfo(torch.float32).tiny)
    closed = (C * s[:, None]).mul_(s)
    closed.diagonal().copy_(C.diagonal() * s)
    return closed.lerp_(C, OPEN_PART)


def gate_level(groups: Sequence[ChannelWorth], fraction: float) -> float:
    """The level at which `fraction` of the bytes behind these gates are read, by bisection over the sample."""
    total = sum(group.cost * len(group.worth) for group in groups)

    def read(level: float) -> float:
        return sum(group.cost * len(group.worth) * group.share(level) for group in groups) / total

    low, high = 1e-30, 1.0
    if read(low) <= fraction:
        return 0.0
    while read(high) > fraction:
        high *= 4
    while high / low > 1 + 1e-4:
        middle = (low * high) ** 0.5
        low, high = (middle, high) if read(middle) > fraction else (low, middle)
    return high
