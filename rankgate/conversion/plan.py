"""Choosing a setting for every input group under a budget for the whole model.

For each group g and each setting s on a short list the planner needs three numbers:

    seconds   of one token on this device, measured with weights that do not fit the cache
    bytes     that one token reads
    KL        in nats per token: the second-order prediction ½ tr(D E C Eᵀ D) of `quantize`, times one factor per group,
              which is the measured KL of the model with only this group quantised (int4, rank 16) over its prediction

A budget on quality (`ppl=1.01`, `top1=0.98`) takes the least Σ seconds with Σ KL below a level, a budget on size
(`bits=5`) the least Σ KL with Σ bytes below it; both by one multiplier that prices KL against cost, found by bisection.
The whole model is then checked on held-out text of several kinds: on each the budget must hold with what is measured
(quality: with its upper 95 % bound), or the level is tightened and the choice made again. A group that no setting makes
faster stays dense.

Not covered: errors of different groups are taken to add up, which the check on the whole model makes up for.
"""

from __future__ import annotations

import dataclasses
import json
import math
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from rankgate.common.copies import twin
from rankgate.common.files import atomic_path
from rankgate.common.passes import evaluation_mode
from rankgate.common.progress import track
from rankgate.conversion.budget import FLIPS_PER_ROOT_KL, LOSS_PER_KL, Budget, Measured
from rankgate.conversion.calibration import Stats
from rankgate.conversion.convert import convert_head_
from rankgate.conversion.gates import record_gates
from rankgate.conversion.groups import linears, read_linear
from rankgate.conversion.reads import weight_reads
from rankgate.conversion.timing import Timer
from rankgate.errors import RankgateError
from rankgate.experts import shares, unstacked
from rankgate.methods.base import members
from rankgate.methods.given import GroupStats, Linear
from rankgate.methods.planned import PlannedConfig, Setting, assemble, quantize
from rankgate.methods.quantize import Metric, output_weights, predicted_loss, spectrum
from rankgate.quantized import Grid, QuantizedGroup

REFERENCE = Setting(4, rank=16)  # what a group's KL is measured with
QUICK = (Setting(8), REFERENCE)
RANKS, REFINES = (0, 8, 16, 32, 64), (0.1,)
SETTINGS = (
    Setting(8),
    *(Setting(4, rank) for rank in RANKS),
    *(Setting(4, REFERENCE.rank, refine) for refine in REFINES),
)
SENSITIVITY_TOKENS = 128
VERIFY_TOKENS = 2048  # of each kind of text
ROUNDS = 5
TIGHTEN, POWER = {"ppl": 0.9, "top1": 0.9, "bits": 0.999}, {"ppl": 1, "top1": 2, "bits": 1}  # after a failed check


@dataclass(frozen=True)
class Option:
    """A setting (None: dense) of one group and what it costs per token."""

    setting: Setting | None
    kl: float
    seconds: float
    bytes: float


_kl, _seconds, _bytes = (operator.attrgetter(name) for name in ("kl", "seconds", "bytes"))


@dataclass(frozen=True)
class Plan:
    """The options chosen, by the first member of each group; `dense` is the option that each was compared with.

    measured: on every kind of text.
    """

    budget: Budget
    chosen: dict[str, Option]
    dense: dict[str, Option]
    predicted: dict[str, float]
    measured: dict[str, Measured]
    built: Mapping[tuple[str, Setting], QuantizedGroup]

    def method(self) -> PlannedConfig:
        """The conversion that this plan describes; what was built for it is used again."""
        return PlannedConfig({name: option.setting for name, option in self.chosen.items()}, self.built)

    def save(self, path: str | Path) -> None:
        """Write it as JSON that may be edited; `load_settings` reads it."""
        groups = {
            name: {
                "setting": option.setting and dataclasses.asdict(option.setting),
                "kl": option.kl,
                "microseconds": 1e6 * option.seconds,
                "microseconds_dense": 1e6 * self.dense[name].seconds,
                "bytes": option.bytes,
                "reason": "" if option.setting else "no setting is faster than dense",
            }
            for name, option in self.chosen.items()
        }
        record = {
            "budget": str(self.budget),
            "predicted": self.predicted,
            "measured": {kind: dataclasses.asdict(found) for kind, found in self.measured.items()},
            "groups": groups,
        }
        with atomic_path(path) as temporary:
            temporary.write_text(json.dumps(record, indent=1), encoding="utf-8")


def load_settings(path: str | Path) -> PlannedConfig:
    """The settings of a saved plan. Raises RankgateError if the file is missing or not a plan."""
    try:
        groups = json.loads(Path(path).read_text(encoding="utf-8"))["groups"]
        return PlannedConfig({name: group["setting"] for name, group in groups.items()})
    except (OSError, json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
        raise RankgateError(f"{path} is not a plan: {type(error).__name__}: {error}") from error


@contextmanager
def replaced(model: PreTrainedModel, modules: Mapping[str, nn.Module]) -> Iterator[None]:
    """While open, `modules` stand in the places of `model` that they are named after."""
    before = {name: model.get_submodule(name) for name in modules}
    try:
        for name, module in modules.items():
            model.set_submodule(name, module)
        yield
    finally:
        for name, module in before.items():
            model.set_submodule(name, module)


def log_probabilities(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """Of the next token, at every position of one window: (length, vocabulary)."""
    return F.log_softmax(model(input_ids=ids.to(model.device), use_cache=False).logits[0].float(), dim=-1)


def predictions(model: PreTrainedModel, windows: Tensor, *, progress: bool = False) -> tuple[Tensor, Tensor]:
    """Nats per predicted token, and the most likely token, over all windows; both 1-D."""
    losses, tops = [], []
    for window in track(windows.split(1), "checking", enabled=progress):
        p = log_probabilities(model, window)[:-1]
        losses.append(-p.gather(1, window[0, 1:, None].to(p.device))[:, 0].double())
        tops.append(p.argmax(-1))
    return torch.cat(losses), torch.cat(tops)


class Planner:
    """Everything that is measured once; `plan` then chooses, builds and checks.

    windows: held-out texts (count × context) by kind, for the check; the first one also for the sensitivity of groups.
    lm_head: whether the output embedding will be int8, as `convert_` has it. settings: to choose from; fewer take less
    time to predict.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        stats: Stats,
        windows: Mapping[str, Tensor],
        *,
        lm_head: bool = False,
        settings: Sequence[Setting] = SETTINGS,
        progress: bool = False,
    ) -> None:
        if not stats.has_sensitivity:
            raise RankgateError("a plan needs output sensitivities; calibrate anew with sensitivity=True")
        stats.check(model)
        self.model = model = unstacked(model)
        self.linears = linears(model)
        self.windows, self.lm_head, self.progress = windows, lm_head, progress
        self.settings = settings
        self.groups = {group.members[0]: group.to(model.device) for group in stats.groups}
        self.built: dict[tuple[str, Setting], QuantizedGroup] = {}
        self.timer = Timer(model.dtype)
        with evaluation_mode(model), torch.inference_mode():
            self.reference = {kind: predictions(model, text) for kind, text in windows.items()}
            self.options = self._options()
        self.weights = sum(option.bytes for option in self._dense().values()) / model.dtype.itemsize

    def plan(self, budget: Budget) -> Plan:
        """Raises RankgateError if no choice holds the budget."""
        if budget.kind == "bits":
            limited, least, limit = _bytes, _kl, budget.value / 8 * self.weights
        else:
            limited, least, limit = _kl, _seconds, budget.level()
        for _ in range(ROUNDS):
            chosen = self._choose(limited, least, limit)
            measured = self.check(chosen)
            excess = max(found.excess(budget) for found in measured.values())
            if excess <= 1:
                return self._record(budget, chosen, measured)
            limit = TIGHTEN[budget.kind] * sum(map(limited, chosen.values())) / excess ** POWER[budget.kind]
        raise RankgateError(f"no plan within {budget} was found in {ROUNDS} rounds; allow more loss or bits")

    def check(self, chosen: Mapping[str, Option]) -> dict[str, Measured]:
        """Build the chosen groups, and measure the model that has them in place on every kind of text."""
        model = twin(self.model)
        for name, option in track(list(chosen.items()), "building the plan", enabled=self.progress):
            if option.setting is not None:
                for member, module in self._modules(name, option.setting).items():
                    model.set_submodule(member, module)
        if self.lm_head:
            convert_head_(model)
        found = {}
        for kind, text in self.windows.items():
            with evaluation_mode(model), torch.inference_mode(), record_gates(model) as gates:
                other = predictions(model, text, progress=self.progress)
            found[kind] = Measured.of(self.reference[kind], other, weight_reads(model, gates).bits_per_weight)
        return found

    def _record(self, budget: Budget, chosen: dict[str, Option], measured: dict[str, Measured]) -> Plan:
        dense = self._dense()
        kl = sum(option.kl for option in chosen.values())
        predicted = {
            "kl": kl,
            "ppl_ratio": math.exp(LOSS_PER_KL * kl),
            "top1": 1 - FLIPS_PER_ROOT_KL * math.sqrt(kl),
            "bits": 8 * sum(option.bytes for option in chosen.values()) / self.weights,
            "speedup": sum(o.seconds for o in dense.values()) / sum(o.seconds for o in chosen.values()),
        }
        return Plan(budget, chosen, dense, predicted, measured, self.built)

    def _dense(self) -> dict[str, Option]:
        return {name: options[0] for name, options in self.options.items()}

    def _choose(
        self, limited: Callable[[Option], float], least: Callable[[Option], float], limit: float
    ) -> dict[str, Option]:
        """One option per group: the least Σ `least` with Σ `limited` ≤ `limit`. Raises RankgateError if none fits."""

        def at(price: float) -> dict[str, Option]:
            return {
                name: min(options, key=lambda option: least(option) + price * limited(option))
                for name, options in self.options.items()
            }

        def total(choice: dict[str, Option]) -> float:
            return sum(limited(option) for option in choice.values())

        low, high = 1e-12, 1e12
        if total(at(high)) > limit:
            raise RankgateError("no setting of the groups fits this budget; allow more loss or more bits")
        while high / low > 1.001:
            middle = math.sqrt(low * high)
            low, high = (middle, high) if total(at(middle)) > limit else (low, middle)
        return at(high)

    def _options(self) -> dict[str, list[Option]]:
        """Dense first, then every setting that is faster, by the first member of the group."""
        first = next(iter(self.windows.values()))[:1, :SENSITIVITY_TOKENS]
        reference = log_probabilities(self.model, first)
        options, read_shares = {}, shares(self.model)
        for name, stats in track(list(self.groups.items()), "sensitivity of groups", enabled=self.progress):
            layers = self._layers(name)
            with replaced(self.model, self._modules(name, REFERENCE)):
                other = log_probabilities(self.model, first)
            kl = F.kl_div(other, reference, log_target=True, reduction="batchmean").item()
            losses = predicted_losses(layers, stats, self.built[name, REFERENCE], self.settings)
            factor = max(kl, 0.0) / losses[REFERENCE]
            m, n = sum(layer.m for layer in layers), layers[0].n
            seconds = self.timer.dense(tuple(layer.m for layer in layers), n)
            share = read_shares.get(self.linears[name], 1.0)
            options[name] = [Option(None, 0.0, share * seconds, share * m * n * self.model.dtype.itemsize)]
            for setting in self.settings:
                faster, read = self.timer.quantized(m, n, setting)
                if faster < seconds:
                    options[name].append(Option(setting, factor * losses[setting], share * faster, share * read))
        return options

    def _layers(self, name: str) -> list[Linear]:
        return [read_linear(member, self.linears[member]) for member in self.groups[name].members]

    def _modules(self, name: str, setting: Setting) -> dict[str, nn.Module]:
        """The group's members, quantised as `setting` says; built once."""
        layers = self._layers(name)
        if (name, setting) not in self.built:
            result = quantize(layers, self.groups[name], setting)
            self.built[name, setting] = assemble(result, self.groups[name], setting)
        return dict(zip(self.groups[name].members, members(self.built[name, setting], layers), strict=True))


def predicted_losses(
    layers: list[Linear], stats: GroupStats, reference: QuantizedGroup, settings: Sequence[Setting]
) -> dict[Setting, float]:
    """Nats of KL per token under REFERENCE and `settings`, by second order; `reference` is the group under REFERENCE.

    For bits and rank ½ tr(D E C Eᵀ D), for a refinement the same over the sampled inputs, relative to the reference.
    """
    assert stats.sensitivity is not None and reference.low_rank is not None
    W, D, x = torch.cat([layer.W for layer in layers]).float(), output_weights(stats.sensitivity), stats.sample.float()
    metric, left = Metric(stats.C), W - reference.base.dequantize()
    rounded = predicted_loss(left, metric, D)
    left -= reference.low_rank.dequantize()
    losses = {REFERENCE: predicted_loss(left, metric, D)}
    if ranks := [s.rank for s in settings if s.bits == 4 and not s.refine and s != REFERENCE]:
        sigma = spectrum(W, stats.C, stats.sensitivity, Grid(REFERENCE.bits), max(ranks))
        restored = [0.0, *(sigma.double().square().cumsum(0) / 2).tolist()]
        for rank in ranks:  # as a correction of one round restores
            losses[Setting(4, rank)] = max(0.0, rounded - restored[min(rank, len(sigma))])
    for setting in settings:
        if setting.refine:
            refined = assemble(quantize(layers, stats, setting, rounds=1), stats, setting)
            share = sampled_loss(x @ W.T - refined.reference(x), D) / sampled_loss(x @ left.T, D)
            losses[setting] = losses[REFERENCE] * share
        elif setting.bits == 8:
            losses[setting] = quantize(layers, stats, setting).losses.corrected
    return losses


def sampled_loss(error: Tensor, D: Tensor) -> float:
    """½ E‖D e‖² over sampled output errors (T × m)."""
    return 0.5 * (error * D).square().sum(-1).mean().item()


HEADERS = ("groups", "setting", "predicted KL", "us", "us dense", "MB/token")


def table(plan: Plan) -> list[tuple[str, ...]]:
    """The plan as rows of text under HEADERS, one per setting."""
    rows: list[tuple[str, ...]] = []
    for setting in [None, *SETTINGS]:
        names = [name for name, option in plan.chosen.items() if option.setting == setting]
        if names:
            options, dense = [plan.chosen[name] for name in names], [plan.dense[name] for name in names]
            rows.append(
                (
                    str(len(names)),
                    "dense" if setting is None else str(setting),
                    f"{sum(option.kl for option in options):.5f}",
                    f"{1e6 * sum(option.seconds for option in options):.0f}",
                    f"{1e6 * sum(option.seconds for option in dense):.0f}",
                    f"{sum(option.bytes for option in options) / 1e6:.1f}",
                )
            )
    return rows


CHECKED = ("held-out text", "ppl ratio", "+-", "top-1", "+-", "bits")


def checked(plan: Plan) -> list[tuple[str, ...]]:
    """What was predicted and what was measured on every kind of text, as rows of text under CHECKED."""
    p = plan.predicted
    rows: list[tuple[str, ...]] = [
        ("predicted", f"{p['ppl_ratio']:.4f}", "", f"{p['top1']:.4f}", "", f"{p['bits']:.2f}")
    ]
    for kind, m in plan.measured.items():
        errors = f"{m.loss_error * m.ppl_ratio:.4f}", f"{m.top1_error:.4f}"
        rows.append((kind, f"{m.ppl_ratio:.4f}", errors[0], f"{m.top1:.4f}", errors[1], f"{m.bits:.2f}"))
    return rows
