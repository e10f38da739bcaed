"""The one walker: rewrite the linears of a model in place, group by group."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedModel

from rankgate.calibration import Stats
from rankgate.core import GatedLinear
from rankgate.errors import RankgateError
from rankgate.groups import NOT_CALLED, input_groups, linears, read_linear
from rankgate.methods import Method
from rankgate.methods.context import ContextLinear
from rankgate.progress import track

Converted = GatedLinear | ContextLinear


@dataclass(frozen=True)
class LayerReport:
    """What happened to one linear. `reason` says why it stayed dense and is empty if it was converted.

    `group` is the first member of its input group; m × n is the shape; `kept` is the share of energy kept at `rank`.
    """

    name: str
    group: str
    m: int
    n: int
    rank: int | None = None
    kept: float | None = None
    reason: str = ""


def convert_(
    model: PreTrainedModel, method: Method, stats: Stats | None = None, *, progress: bool = False
) -> list[LayerReport]:
    """Rewrite every linear of `model` but the output embedding, in place, and say what was done to each.

    The converted model is used like the dense one: batches, padding, `generate()`.
    Raises RankgateError if `method` needs statistics and has none, if they belong to another model, or if a rank does
    not fit; the model may then be partly converted.
    """
    if method.needs_stats and stats is None:
        raise RankgateError(f"{method.name} needs calibration statistics; call calibrate() first")
    if any(True for _ in converted_layers(model)):
        raise RankgateError("the model is converted already; start from the dense one")
    if stats is not None:
        stats.check(model)
    modules = linears(model)
    used = {group.members: group for group in stats.groups} if stats and method.needs_stats else {}
    reports = {}
    for members in track(list(used) or input_groups(model), "converting", enabled=progress):
        layers = [read_linear(name, modules[name]) for name in members]
        for layer, rewrite in zip(layers, method.rewrite(layers, used.get(members)), strict=True):
            if rewrite.module is not None:
                model.set_submodule(layer.name, rewrite.module)
            reports[layer.name] = LayerReport(
                layer.name, members[0], layer.m, layer.n, rewrite.rank, rewrite.kept, rewrite.reason
            )
    for name, module in modules.items():
        if name not in reports:
            layer = read_linear(name, module)
            reports[name] = LayerReport(name, name, layer.m, layer.n, reason=NOT_CALLED)
    method.attach(model)
    return [reports[name] for name in modules]


def converted_layers(model: nn.Module) -> Iterator[tuple[str, Converted]]:
    """The rewritten linears of a model, by name."""
    for name, module in model.named_modules():
        if isinstance(module, Converted):
            yield name, module


def twin(model: PreTrainedModel) -> PreTrainedModel:
    """A copy of `model` whose modules are its own and whose tensors are shared: dense and converted side by side."""
    tensors = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})
