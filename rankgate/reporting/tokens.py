"""Token selection in the terminal and in the report."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from rankgate.attention.profile import KINDS, LayerProfile, savings
from rankgate.reporting.page import Plot

SHOWN = 96  # tokens in the heat map
HEADERS = (
    *("layer", "r/T", "r/T cascade", "like the layer before", "like anew", "added", "removed", "cosines saved"),
    *(f"error {kind}" for kind in KINDS),
)


@dataclass(frozen=True)
class SelectionView:
    """What a profile at `tau` (windows, then layers) says; `texts`: the tokens of the first window."""

    tau: float
    layers: list[list[LayerProfile]]
    texts: list[str]

    @property
    def table(self) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
        return selection_table(self.layers)

    @property
    def note(self) -> str:
        return (
            f"τ = {self.tau:g}, cosines of the states at the layer's input, means over {len(self.layers)} windows of "
            f"{len(self.layers[0][0].chosen)} tokens. Jaccard overlap with the selection of the layer before, and of "
            "the cascade with the selection made anew; added and removed by the cascade, as shares of it; cosines that "
            "it saves of the full Gram matrix; relative error of attention outputs (windowed, 128 recent tokens) with "
            "each selection, with the first layer's inherited unchecked, and with as many random tokens. "
            + self.summary
        )

    @property
    def summary(self) -> str:
        saved = [savings(window) for window in self.layers]
        full, causal = (np.mean([getattr(s, name) for s in saved]) for name in ("full", "causal"))
        return f"The cascade saves {full:.0%} of the full Gram matrices, {causal:.0%} of their causal halves."

    def record(self) -> dict[str, Any]:
        headers, rows = self.table
        saved = [savings(window) for window in self.layers]
        return {
            "tau": self.tau,
            "layers": [dict(zip(headers, row, strict=True)) for row in rows],
            "saved_full": float(np.mean([s.full for s in saved])),
            "saved_causal": float(np.mean([s.causal for s in saved])),
        }

    def plot(self) -> Plot:
        chosen = np.stack([layer.chosen[:SHOWN].numpy() for layer in self.layers[0]])
        figure = Figure(figsize=(12, 1.6 + 0.14 * len(chosen)), layout="constrained")
        axes = figure.subplots()
        axes.imshow(chosen, aspect="auto", cmap="Blues", vmin=-0.15, vmax=1.2, interpolation="nearest")
        texts = [repr(text)[1:-1] for text in self.texts[: chosen.shape[1]]]
        axes.set_xticks(range(len(texts)), texts, rotation=90, fontsize=6)
        axes.set(ylabel="layer")
        caption = "The first tokens of the first window. Dark: a representative; light: another token stands for it."
        return Plot("tokens.png", f"Representative tokens, layer by layer, at τ = {self.tau:g}", caption, figure)


def selection_table(windows: list[list[LayerProfile]]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """By layer, means over windows."""
    rows = []
    for i, layers in enumerate(zip(*windows, strict=True)):
        tokens = len(layers[0].chosen)
        previous = "-" if i == 0 else f"{mean(layers, lambda p: p.previous or 0.0):.2f}"
        rows.append(
            (
                str(i),
                f"{mean(layers, lambda p: p.share):.2f}",
                f"{mean(layers, lambda p: p.cascade_share):.2f}",
                previous,
                f"{mean(layers, lambda p: p.jaccard['cascade']):.2f}",
                f"{mean(layers, lambda p: p.added):.1%}",
                f"{mean(layers, lambda p: p.removed):.1%}",
                f"{1 - mean(layers, lambda p: p.cascade_dots) / tokens**2:.0%}",
                *(f"{mean(layers, lambda p, kind=kind: p.errors[kind]):.3f}" for kind in KINDS),  # type: ignore[misc]
            )
        )
    return HEADERS, rows


def mean(layers: Sequence[LayerProfile], value: Callable[[LayerProfile], float]) -> float:
    return float(np.mean([value(layer) for layer in layers]))
