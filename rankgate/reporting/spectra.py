"""Plots and tables of an analysis: how low-rank weights and inputs are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure

from rankgate.reporting.analyze import (
    CURVE,
    ENERGIES,
    FRACTIONS,
    QUANTILES,
    ActivationProfile,
    WeightSpectrum,
    theoretical_speedup,
)
from rankgate.reporting.page import Plot

COLORS = mpl.colormaps["tab10"].colors  # type: ignore[attr-defined]
HEATMAP_TOKENS = 512
TOLERANCES = (0.05, 0.2)  # values of ε drawn into the plots
T = TypeVar("T", WeightSpectrum, ActivationProfile)


def kind(name: str) -> str:
    """The last part of a module's name: layers of one kind are drawn together."""
    return name.rsplit(".", 1)[-1]


def by_kind(items: Sequence[T]) -> dict[str, list[T]]:
    """Items with a `name`, grouped by `kind`, in order."""
    groups: dict[str, list[T]] = {}
    for item in items:
        groups.setdefault(kind(item.name), []).append(item)
    return groups


def plots(spectra: list[WeightSpectrum], profiles: list[ActivationProfile], eps: Sequence[float]) -> list[Plot]:
    """All plots of an analysis. `eps`: the tolerances to draw into the residual plots."""
    return [
        plot_spectra(spectra, profiles),
        plot_ranks(spectra),
        plot_residuals(profiles, eps),
        plot_gates(profiles, eps),
    ]


def plot_spectra(spectra: list[WeightSpectrum], profiles: list[ActivationProfile]) -> Plot:
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    colors = dict(zip(by_kind(spectra), _cycle(), strict=False))
    _curves(left, by_kind(spectra), colors, "weights: rank / min(m, n)")
    _curves(right, by_kind(profiles), colors, "inputs: k / n")
    left.set_ylabel("cumulative energy")
    caption = (
        "Mean over depth, band from the least to the most concentrated layer. The diagonal would be no structure at "
        "all. Inputs are named after the first linear that reads them."
    )
    return Plot("spectra.png", "Energy kept by a subspace, of weights and of inputs", caption, figure)


def _curves(
    axes: Axes,
    groups: Mapping[str, Sequence[WeightSpectrum | ActivationProfile]],
    colors: Mapping[str, Any],
    label: str,
) -> None:
    x = np.linspace(0, 1, CURVE)
    for name, items in groups.items():
        y = np.array([item.curve for item in items])
        axes.plot(x, y.mean(0), color=colors[name], label=name)
        axes.fill_between(x, y.min(0), y.max(0), color=colors[name], alpha=0.12, linewidth=0)
    axes.plot([0, 1], [0, 1], color="0.7", linewidth=0.8, linestyle=":")
    axes.set(xlabel=label, xlim=(0, 1), ylim=(0, 1.01))
    axes.legend(frameon=False, fontsize=8)


def plot_ranks(spectra: list[WeightSpectrum]) -> Plot:
    figure = Figure(figsize=(10, 6.5), layout="constrained")
    grid = figure.subplots(2, 2, sharex=True, sharey=True).flat
    for axes, energy in zip(grid, ENERGIES, strict=True):
        for color, (name, items) in zip(_cycle(), by_kind(spectra).items(), strict=False):
            share = [s.ranks[energy] / min(s.m, s.n) for s in items]
            gain = [s.compression(energy) > 1 for s in items]
            axes.plot(share, color=color, linewidth=1, label=name)
            axes.scatter(np.flatnonzero(gain), np.array(share)[gain], color=color, s=12)
        axes.set_title(f"{energy:.0%} of Σσ²: {theoretical_speedup(spectra, energy):.2f} x in theory", fontsize=10)
        axes.set_ylim(0, 1)
    figure.supxlabel("layer of its kind, in order")
    figure.supylabel("rank / min(m, n)")
    figure.legend(*grid[0].get_legend_handles_labels(), loc="outside upper center", ncols=7, frameon=False, fontsize=8)
    caption = "A dot marks a layer whose two factors are smaller than its weight matrix; the others gain nothing."
    return Plot("ranks.png", "Rank of the weights per layer", caption, figure)


def plot_residuals(profiles: list[ActivationProfile], eps: Sequence[float]) -> Plot:
    groups = by_kind(profiles)
    figure = Figure(figsize=(10, 3.2 * -(-len(groups) // 4) + 0.4), layout="constrained")
    grid = np.atleast_1d(figure.subplots(-(-len(groups) // 4), min(4, len(groups)), sharey=True, squeeze=False)).flat
    middle, low, high = QUANTILES.index(0.5), 0, -1
    for axes, (name, items) in zip(grid, groups.items(), strict=False):
        for color, part in zip(_cycle(), items[0].residuals, strict=False):
            q = np.mean([item.residuals[part] for item in items], axis=0)
            axes.plot(FRACTIONS, q[:, middle], color=color, label=part)
            axes.fill_between(FRACTIONS, q[:, low], q[:, high], color=color, alpha=0.15, linewidth=0)
        for level in eps:
            axes.axhline(level, color="0.3", linewidth=0.8, linestyle="--")
            axes.annotate(f"ε = {level:g}", (FRACTIONS[-1], level), ha="right", va="bottom", fontsize=7)
        axes.set(title=f"input of {name}", xlabel="k / n", ylim=(0, 1))
    for axes in list(grid)[len(groups) :]:
        axes.set_visible(False)
    first = figure.axes[0]
    first.set_ylabel("‖residual‖ / ‖x‖")
    first.legend(frameon=False, fontsize=8, loc="upper right")
    caption = "Median token and 5–95 % band, averaged over depth. A token above the line of ε opens the gate."
    return Plot("residuals.png", "What a calibrated subspace leaves out, token by token", caption, figure)


def plot_gates(profiles: list[ActivationProfile], eps: Sequence[float]) -> Plot:
    column = FRACTIONS.index(0.25)
    ratios = np.array([profile.ratios[:HEATMAP_TOKENS, column] for profile in profiles])
    figure = Figure(figsize=(10, 6), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(ratios.clip(1e-3), aspect="auto", cmap="RdBu_r", norm=LogNorm(0.02, 1), interpolation="nearest")
    step = max(1, len(profiles) // 24)
    axes.set_yticks(range(0, len(profiles), step), [p.name for p in profiles[::step]], fontsize=6)
    axes.set(xlabel="token")
    bar = figure.colorbar(image, label="‖residual‖ / ‖x‖ at k = n/4", ticks=[0.02, 0.05, 0.1, 0.2, 0.5, 1])
    bar.ax.set_yticklabels(["0.02", "0.05", "0.1", "0.2", "0.5", "1"])
    for level in eps:
        bar.ax.axhline(level, color="black", linewidth=1.5)
    rates = ", ".join(f"ε = {level:g} fires on {(ratios > level).mean():.1%}" for level in eps)
    caption = f"First held-out tokens, every input group in order of execution. Black marks on the scale: {rates}."
    return Plot("gates.png", "Gates: residual of every token in every layer", caption, figure)


def _cycle() -> list[Any]:
    return list(COLORS) * 4


def spectra_table(spectra: list[WeightSpectrum]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Per layer: shape, then rank and compression at each energy."""
    headers = ("layer", "m x n", *(f"rank {e:.0%}" for e in ENERGIES), *(f"compression {e:.0%}" for e in ENERGIES))
    rows = [
        (
            s.name,
            f"{s.m} x {s.n}",
            *(str(s.ranks[e]) for e in ENERGIES),
            *(f"{s.compression(e):.2f}" for e in ENERGIES),
        )
        for s in spectra
    ]
    return headers, rows


def spectra_summary(spectra: list[WeightSpectrum]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """By kind of layer: median rank as a share of min(m, n), and compression; last row: speedup of the model."""
    headers = ("layers", "shape", *(f"rank {e:.0%}" for e in ENERGIES), *(f"compression {e:.0%}" for e in ENERGIES))
    rows = []
    for name, items in by_kind(spectra).items():
        median = {e: _median(items, e) for e in ENERGIES}
        rows.append(
            (
                f"{name} ({len(items)})",
                f"{items[0].m} x {items[0].n}",
                *(f"{median[e].ranks[e]}" for e in ENERGIES),
                *(f"{median[e].compression(e):.2f}" for e in ENERGIES),
            )
        )
    speedups = (f"{theoretical_speedup(spectra, e):.2f}" for e in ENERGIES)
    rows.append(("theoretical speedup", "all", *[""] * len(ENERGIES), *speedups))
    return headers, rows


def _median(spectra: Sequence[WeightSpectrum], energy: float) -> WeightSpectrum:
    return sorted(spectra, key=lambda s: s.ranks[energy])[len(spectra) // 2]


def profiles_table(profiles: list[ActivationProfile]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """By kind of input: mean effective rank, and the median residual at k = n/4 and n/2 on each part of the text."""
    columns = {f"k={fraction:g}n": FRACTIONS.index(fraction) for fraction in (0.25, 0.5)}
    middle = QUANTILES.index(0.5)
    parts = list(profiles[0].residuals)
    headers = ("input of", "n", "effective rank", *(f"{k} {part}" for k in columns for part in parts))
    rows = []
    for name, items in by_kind(profiles).items():
        medians = (
            np.mean([item.residuals[part][column][middle] for item in items])
            for column in columns.values()
            for part in parts
        )
        rank = np.mean([item.effective_rank for item in items])
        rows.append((f"{name} ({len(items)})", str(items[0].n), f"{rank:.0f}", *(f"{value:.3f}" for value in medians)))
    return headers, rows
