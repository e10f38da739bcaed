"""How low-rank a model is: its weights by singular values, its activations by what a subspace leaves out.

Weights: the rank that keeps a share of Σ σ², per layer; the compression m n / (r (m + n)) that this rank gives; and the
theoretical speedup of the whole model's linear layers, with those that would not shrink left dense.

Activations: the effective rank of an input group's second moment, exp of the entropy of its normalised eigenvalues
(Roy & Vetterli, 2007), and how large the residual ‖x − V_k V_kᵀ x‖ / ‖x‖ of single tokens is for subspaces of growing
k, on the calibration text itself and on text that it has not seen.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from rankgate.common.passes import evaluation_mode
from rankgate.common.progress import track
from rankgate.conversion.calibration import Stats
from rankgate.conversion.groups import linears, read_linear
from rankgate.core import widen
from rankgate.experts import unstacked
from rankgate.methods.given import GroupStats
from rankgate.methods.svd import rank_at

ENERGIES = (0.80, 0.85, 0.90, 0.95)
FRACTIONS = (0.0625, 0.125, 0.25, 0.375, 0.5, 0.625, 0.75, 0.875)  # k / n
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
CURVE = 101  # points of a cumulative-energy curve, at ranks 0 … min(m, n)


@dataclass(frozen=True)
class WeightSpectrum:
    """One weight matrix: `ranks` by energy share, `curve`: cumulative energy at 101 evenly spaced ranks."""

    name: str
    m: int
    n: int
    ranks: dict[float, int]
    curve: list[float]

    def compression(self, energy: float) -> float:
        """Dense weights over factor weights; below 1 the factors are larger than the layer."""
        return self.m * self.n / (self.ranks[energy] * (self.m + self.n))


def weight_spectra(model: PreTrainedModel, *, progress: bool = False) -> list[WeightSpectrum]:
    """Singular-value analysis of every linear of a dense model but the output embedding."""
    spectra = []
    for name, module in track(list(linears(unstacked(model)).items()), "decomposing", enabled=progress):
        layer = read_linear(name, module)
        cumulative = _cumulative(torch.linalg.svdvals(widen(layer.W)).square())
        ranks = {energy: rank_at(cumulative, energy) for energy in ENERGIES}
        spectra.append(WeightSpectrum(name, layer.m, layer.n, ranks, _curve(cumulative)))
    return spectra


def theoretical_speedup(spectra: list[WeightSpectrum], energy: float) -> float:
    """Dense weights over weights read, for all layers together, at the ranks that keep `energy`."""
    dense = sum(s.m * s.n for s in spectra)
    return dense / sum(s.m * s.n / max(1.0, s.compression(energy)) for s in spectra)


@dataclass(frozen=True)
class ActivationProfile:
    """One input group. `residuals`: by text part, for each k = FRACTIONS · n the QUANTILES of the residual ratio.

    `ratios` keeps the ratio of every held-out token at every k (tokens × len(FRACTIONS)), for the gate heat map.
    """

    name: str
    n: int
    effective_rank: float
    curve: list[float]
    residuals: dict[str, list[list[float]]]
    ratios: Tensor


def activation_profiles(
    model: PreTrainedModel, stats: Stats, parts: dict[str, Tensor], *, progress: bool = False
) -> list[ActivationProfile]:
    """Profile every input group on each of `parts` (name → windows of token ids); the last part is the held-out one."""
    seen = {name: _residual_ratios(model, stats, windows, progress=progress) for name, windows in parts.items()}
    levels = torch.tensor(QUANTILES)
    profiles = []
    for i, group in enumerate(stats.groups):
        values, _ = group.eigen()
        share = values.double() / values.double().sum()
        entropy = -(share * share.clamp_min(1e-300).log()).sum()
        residuals = {name: torch.quantile(ratios[i], levels, dim=0).T.tolist() for name, ratios in seen.items()}
        curve = _curve(_cumulative(values))
        held_out = list(seen.values())[-1][i]
        profiles.append(
            ActivationProfile(group.members[0], len(values), entropy.exp().item(), curve, residuals, held_out)
        )
    return profiles


def _residual_ratios(model: PreTrainedModel, stats: Stats, windows: Tensor, *, progress: bool) -> list[Tensor]:
    """‖x − V_k V_kᵀ x‖ / ‖x‖ of every token at every k, by group: tokens × len(FRACTIONS) each."""
    rows: list[list[Tensor]] = [[] for _ in stats.groups]

    def observe(x: Tensor, group: GroupStats, into: list[Tensor]) -> None:
        _, vectors = group.eigen()
        energy = (widen(x).reshape(-1, len(vectors)) @ vectors).square().cumsum(1)
        ks = [max(1, round(fraction * len(vectors))) - 1 for fraction in FRACTIONS]
        outside = 1 - energy[:, ks] / energy[:, -1:].clamp_min(torch.finfo(energy.dtype).tiny)
        into.append(outside.clamp_min(0).sqrt().float().cpu())

    handles = [
        model.get_submodule(group.members[0]).register_forward_pre_hook(
            lambda _, args, group=group, into=into: observe(args[0], group, into)
        )
        for group, into in zip([group.to(model.device) for group in stats.groups], rows, strict=True)
    ]
    try:
        with torch.inference_mode(), evaluation_mode(model):
            for window in track(windows.split(1), "profiling", enabled=progress):
                model.base_model(input_ids=window.to(model.device), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return [torch.cat(parts) for parts in rows]


def _cumulative(energies: Tensor) -> Tensor:
    total = energies.double().cumsum(0)
    return total / total[-1].clamp_min(torch.finfo(total.dtype).tiny)


def _curve(cumulative: Tensor) -> list[float]:
    padded = torch.cat([cumulative.new_zeros(1), cumulative])
    return padded[torch.linspace(0, len(cumulative), CURVE).round().long()].tolist()
