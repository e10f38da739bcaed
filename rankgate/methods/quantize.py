"""Choosing the codes: one input group from its dense weights to packed bytes.

W (m × n) has the members' rows stacked. With C = E[x xᵀ] and F the Fisher diagonal of the outputs (see `calibration`),
an error E of the weights costs about

    ½ Σ_i F_i E[(E x)_i²] = ½ tr(D E C Eᵀ D)      D = diag(√F)      nats of KL per token,

the measure of every step here:

1. Q   codes and scales, see `codes`. D does not matter to this step: rows are independent.
2. AB  the best rank-r approximation of D (W − Q) C^½, mapped back without an inverse (as in `methods.svd`), then
       rounded to 8 bits.
3.     Q again, now of W − A B, and so on: a few rounds.
4. E   the refinement plane of what is left, W − Q − A B, 4 bits. Reading column j of E is worth
       x_j² ‖D E_j‖² and costs m / 2 bytes, so gates open above one level of worth per byte for the whole model.

Where there is a refinement plane, 1–3 use the second moment of what closed gates leave to them (`closed_moment`): an
error that an open gate makes up for is none of their business, and making up for it in other columns would be wrong.

Rank is spent where it buys most: chunks of 8 components, in the order of their worth per byte over all groups.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rankgate.methods.codes import Metric, compensated, nearest
from rankgate.quantized import Grid, LowRank, QuantizedMatrix, Refinement

COLUMN_SHRINK = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3)  # the same for a column of the refinement
FLOOR = 1e-3  # of the mean sensitivity, added to each
OPEN_PART = 0.05  # of C that counts also behind open gates
CHUNK = 8  # components of a low-rank correction that kernels handle at a time


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
