"""A window and a tolerance for each key head, by what they cost: some heads look only near, some need everything.

On calibration text, every key head is tried with every candidate: windows of 64, 128, 256 … tokens without
representatives, and a window of 128 with representatives of its own keys at several τ. An error Δ of a head's output o
costs about

    ½ Σ_j F_j E[Δ_j²]      F_j = E[(∂ log p / ∂ o_j)²]      nats of KL per token,

with labels sampled from the model's own predictions: the measure that `quantize` uses for weights. Then each head takes
the candidate with the least loss + λ · keys read, for the λ at which all heads together read the share asked for.

What is chosen holds for texts about as long as those windows. Not covered: that heads make up for each other.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor
from transformers import PreTrainedModel

from rankgate.attention.attend import decoder
from rankgate.attention.probe import dense, probing
from rankgate.attention.strands import Heads, Strand
from rankgate.common.passes import backward_from_sampled_labels, evaluation_mode, gradients_from_embedding
from rankgate.common.progress import track
from rankgate.errors import RankgateError

SHORTEST = 64  # window tried; each other is twice the one before
BESIDE = 128  # window with representatives
TAUS = (0.2, 0.3, 0.4, 0.5)
SINKS = 4


@dataclass(frozen=True)
class HeadPlan:
    """What each key head reads, by layer. `share`: of the keys, on the calibration text; `loss`: nats, predicted."""

    heads: tuple[tuple[Heads, ...], ...]
    share: float
    loss: float


@dataclass(frozen=True)
class HeadCosts:
    """Predicted nats, and share of the keys read, of every key head (layer after layer) with every candidate."""

    candidates: list[Heads]
    losses: Tensor
    shares: Tensor
    layers: int

    def plan(self, keys: float, *, representatives: bool = True) -> HeadPlan:
        """The settings with which all heads read a share `keys` of the keys of dense attention.

        representatives: whether some heads may have them: less loss, but prompts on a GPU take longer.

        Raises RankgateError if the share is not in (0, 1], or below what the shortest windows read.
        """
        check_share(keys)
        usable = [i for i, own in enumerate(self.candidates) if representatives or own.tau is None]
        pick = torch.tensor(usable)[_within(self.losses[:, usable], self.shares[:, usable], keys)]
        share, loss = (table.gather(1, pick[:, None]).squeeze(1) for table in (self.shares, self.losses))
        least = share.mean().item()
        if least > keys:
            raise RankgateError(f"no choice of windows reads only {keys:.0%} of the keys; ask for {least:.2f} or more")
        rows = pick.view(self.layers, -1).tolist()
        heads = tuple(tuple(self.candidates[i] for i in row) for row in rows)
        return HeadPlan(heads, least, loss.sum().item())


def check_share(keys: float) -> None:
    """Raises RankgateError unless `keys` is in (0, 1]."""
    if not 0 < keys <= 1:
        raise RankgateError(f"keys {keys} is out of range; give a share in (0, 1]")


def try_heads(model: PreTrainedModel, windows: Tensor, *, progress: bool = False) -> HeadCosts:
    """Try every candidate on every key head of `model`.

    windows: (count × length) token ids; the costs hold for texts of about that length.
    Raises RankgateError if the model's attention cannot be replaced.
    """
    layers, candidates = len(decoder(model)[1]), _candidates(windows.shape[1])
    sensitivity = _sensitivities(model, windows, progress=progress)
    losses, shares = _tried(model, windows, candidates, sensitivity, progress=progress)
    return HeadCosts(candidates, losses, shares, layers)


def _candidates(length: int) -> list[Heads]:
    windows = [SHORTEST << i for i in range(32) if SHORTEST << i < length]
    return [Heads(None, None), *(Heads(w, None) for w in windows), *(Heads(BESIDE, tau) for tau in TAUS)]


def _within(losses: Tensor, shares: Tensor, keys: float) -> Tensor:
    """The candidate of each head (heads × candidates in both tables) with the least loss at a mean share of `keys`."""
    low, high = 1e-12, 1e3
    while high / low > 1 + 1e-3:
        price = (low * high) ** 0.5
        pick = (losses + price * shares).argmin(1)
        read = shares.gather(1, pick[:, None]).mean().item()
        low, high = (price, high) if read > keys else (low, price)
    return (losses + high * shares).argmin(1)


def _sensitivities(model: PreTrainedModel, windows: Tensor, *, progress: bool) -> list[Tensor]:
    """F of every layer's attention output (heads × width)."""
    total: list[Tensor] = []
    outputs: list[Tensor] = []

    def probe(layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        y = dense(q, k, v, scale)
        y.retain_grad()
        outputs.append(y)
        return y

    generator = torch.Generator(model.device).manual_seed(0)
    with probing(model, probe), evaluation_mode(model), gradients_from_embedding(model):
        for window in track(windows.split(1), "sensitivity", enabled=progress):
            outputs.clear()
            backward_from_sampled_labels(model, window, generator)
            energy = [cast(Tensor, y.grad).float().square().mean((0, 2)) for y in outputs]
            total = energy if not total else [a + b for a, b in zip(total, energy, strict=True)]
    return [energy / len(windows) for energy in total]


def _tried(
    model: PreTrainedModel, windows: Tensor, candidates: list[Heads], sensitivity: list[Tensor], *, progress: bool
) -> tuple[Tensor, Tensor]:
    """Predicted loss, and share of the keys that are read, of every key head with every candidate."""
    losses: dict[tuple[int, int], Tensor] = {}
    shares: dict[tuple[int, int], Tensor] = {}

    def probe(layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        y, per_key = dense(q, k, v, scale), q.shape[1] // k.shape[1]
        for h in range(k.shape[1]):
            rows = []
            for own in candidates:
                strand = Strand([h], own, SINKS)
                mine = strand.queries(per_key)
                few = strand.attend(q[0, mine], k[0, h : h + 1], v[0, h : h + 1], None, None, scale)
                error = (few - y[0, mine]).float().square().mean(1)
                rows.append((0.5 * (error * sensitivity[layer][mine]).sum().item(), strand.read / strand.pairs))
            found = torch.tensor(rows, dtype=torch.float64)
            losses[layer, h] = losses.get((layer, h), 0) + found[:, 0] / len(windows)
            shares[layer, h] = shares.get((layer, h), 0) + found[:, 1] / len(windows)
        return y

    with probing(model, probe), evaluation_mode(model), torch.inference_mode():
        for window in track(windows.split(1), "trying heads", enabled=progress):
            model(input_ids=window.to(model.device), use_cache=False)
    return torch.stack([losses[key] for key in sorted(losses)]), torch.stack([shares[key] for key in sorted(shares)])
