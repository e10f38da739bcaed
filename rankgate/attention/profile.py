"""How alike the tokens of a dense model are, layer by layer, and what a cascade makes of it.

At every layer the cascade is held against the selection made anew from the same states, and against two controls: the
first layer's representatives, inherited unchecked, and as many tokens at random. How far each is off is measured by the
layer's own attention: ‖o − o_dense‖ / ‖o_dense‖ with `windowed` attention to them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from rankgate.attention.attend import AttentionConfig, decoder, layer_input
from rankgate.attention.probe import dense, probing
from rankgate.attention.select import Selection, cascade, causal_dots, inherit, owned, select, unit
from rankgate.attention.strands import Heads, Strand
from rankgate.common.passes import evaluation_mode
from rankgate.common.progress import track

KINDS = ("anew", "cascade", "inherited", "random")


@dataclass(frozen=True)
class LayerProfile:
    """One layer of one sequence.

    share: r / T of the selection made anew, and of the cascade. previous: Jaccard of two selections made anew, here and
    at the layer before. jaccard: of the cascade, and of the controls, with the selection made anew. added, removed: by
    the cascade, as shares of its representatives. dots: cosines computed, anew and by the cascade. errors: of attention
    outputs, by kind of selection. chosen: (T,) of the selection made anew.
    """

    share: float
    cascade_share: float
    previous: float | None
    jaccard: dict[str, float]
    added: float
    removed: float
    dots: int
    cascade_dots: int
    errors: dict[str, float]
    chosen: Tensor


@dataclass(frozen=True)
class Savings:
    """Cosines that a cascade does not compute: of the full Gram matrix (T × T), and of its causal half."""

    full: float
    causal: float


def savings(layers: list[LayerProfile]) -> Savings:
    """Over all layers of one sequence."""
    tokens, done = len(layers[0].chosen), sum(layer.cascade_dots for layer in layers)
    return Savings(1 - done / (len(layers) * tokens**2), 1 - done / (len(layers) * causal_dots(tokens)))


def profile(
    model: PreTrainedModel, windows: Tensor, config: AttentionConfig, *, errors: bool = True, progress: bool = False
) -> list[list[LayerProfile]]:
    """By window (of count × T token ids) and layer. errors: also measure those of attention, which takes longest."""
    _, layers = decoder(model)
    out: list[list[LayerProfile]] = []
    states: list[Tensor] = []

    def keep(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        states.append(unit(layer_input(args, kwargs)[0], config.centred))

    def probe(layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        y = dense(q, k, v, scale)
        found = sets.selections(states[-1], layer)
        off = {}
        for kind in KINDS if errors else ():
            strand = Strand(list(range(k.shape[1])), Heads(config.window, config.tau), config.sinks)
            few = strand.attend(q[0], k[0], v[0], states[-1], found[kind], scale)
            off[kind] = (torch.linalg.vector_norm(few - y[0]) / torch.linalg.vector_norm(y)).item()
        out[-1].append(sets.compare(found, off))
        return y

    handles = [layer.register_forward_pre_hook(keep, with_kwargs=True) for layer in layers]
    try:
        with probing(model, probe), evaluation_mode(model), torch.inference_mode():
            for window in track(windows.split(1), "profiling tokens", enabled=progress):
                out.append([])
                sets = _Sets(config)
                model(input_ids=window.to(model.device), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return out


class _Sets:
    """The selections of one sequence, layer after layer."""

    def __init__(self, config: AttentionConfig) -> None:
        self.config = config
        self.generator = torch.Generator().manual_seed(0)
        self.before: dict[str, Selection] = {}
        self.found: dict[str, Selection] = {}

    def selections(self, x: Tensor, layer: int) -> dict[str, Selection]:
        anew = select(x, self.config.tau, self.config.select)
        chosen = torch.zeros_like(anew.chosen)
        count = int(anew.chosen.sum())
        chosen[torch.randperm(len(x), generator=self.generator)[:count]] = True
        chosen[0] = True  # so that every token has a representative
        self.before, self.found = self.found, {"anew": anew, "random": owned(x, chosen, 0)}
        if layer == 0:
            self.found |= {"cascade": anew, "inherited": anew}
            return self.found
        last = self.before["cascade"]
        repaired = layer % self.config.stride == 0
        self.found["cascade"] = cascade(x, self.config.tau, last, self.config.select) if repaired else inherit(last)
        self.found["inherited"] = inherit(self.before["inherited"])
        return self.found

    def compare(self, found: dict[str, Selection], errors: dict[str, float]) -> LayerProfile:
        anew, chain = found["anew"], found["cascade"]
        count = int(chain.chosen.sum())
        return LayerProfile(
            share=anew.share,
            cascade_share=chain.share,
            previous=anew.same_as(self.before["anew"]) if self.before else None,
            jaccard={kind: found[kind].same_as(anew) for kind in KINDS[1:]},
            added=chain.added / count,
            removed=chain.removed / count,
            dots=anew.dots,
            cascade_dots=chain.dots,
            errors=errors,
            chosen=anew.chosen.cpu(),
        )
