"""The one walker: rewrite the linears of a model in place, group by group."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel

from rankgate.common.kept import Kept, anew
from rankgate.common.progress import track
from rankgate.conversion.calibration import Stats
from rankgate.conversion.groups import NOT_CALLED, dense_weights, input_groups, linears, read_linear, shape
from rankgate.core import GroupedLinear, SparseLinear
from rankgate.errors import RankgateError
from rankgate.experts import unstack_
from rankgate.methods import Int8Config, Method
from rankgate.methods.context import ContextLinear
from rankgate.methods.given import GroupStats, Linear
from rankgate.methods.quantize import nearest
from rankgate.quantized import QuantizedGroup, QuantizedHead

NOT_WANTED = "left dense as asked"
Converted = GroupedLinear | ContextLinear | SparseLinear
Others = Mapping[str, Method | None]  # by names of linears, see `convert_`

# called with every model that has been converted, and how: `hub` lets save_pretrained know
finishers: list[Callable[[PreTrainedModel, Method, Others], None]] = []


@dataclass(frozen=True)
class LayerReport:
    """What happened to one linear, or to another weight that every token reads (see `groups.dense_weights`).

    `reason` says why it stayed dense and is empty if it was converted.

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
    model: PreTrainedModel,
    method: Method,
    stats: Stats | None = None,
    *,
    overrides: Others | None = None,
    lm_head: bool = False,
    consume: bool = False,
    progress: bool = False,
    kept: Kept | None = None,
) -> list[LayerReport]:
    """Rewrite every linear of `model` in place, and say what was done to each.

    overrides: another method by the name of a linear, or a part of it ("down_proj", "mlp", "model.layers.0"), for the
    input groups that have such a member; None leaves these dense. The longest name decides.
    Stacks of experts become linears of their own before (see `experts`).
    lm_head: also round the output embedding to int8 (no method, no statistics; an input embedding that was tied to it
    keeps its dense weight). Otherwise it stays dense. An override of its name with int8 or None asks for the same.
    consume: drop each second moment of `stats` after its last use, which saves memory; `stats` are of no use then.
    kept: where finished groups of a method whose work takes long lie (see `common.kept`).
    The converted model is used like the dense one: batches, padding, `generate()`, `save_pretrained()`.
    Raises RankgateError if there is nothing to convert, if `method` needs statistics and has none, if they belong to
    another model, or if a rank does not fit; the model may then be partly converted.
    """
    if any(True for _ in converted_layers(model)):
        raise RankgateError("the model is converted already; start from the dense one")
    if stats is not None:
        stats.check(model)
    unstack_(model)
    modules = linears(model)
    if not modules:
        raise RankgateError(f"{type(model).__name__} has no linear layers that could be converted; it is left as it is")
    reports = {name: LayerReport(name, name, *shape(module), reason=NOT_CALLED) for name, module in modules.items()}
    for name, (m, n, reason) in dense_weights(model).items():
        reports[name] = LayerReport(name, name, m, n, reason=reason)
    others, lm_head = _checked(overrides or {}, model, list(reports), lm_head)
    used: dict[tuple[str, ...], GroupStats] = {}
    for one in methods_of(method, others):
        used |= statistics_for(one, stats)
    try:
        for chosen, groups in assigned(list(used) or input_groups(model), method, others):
            if chosen is None:
                names = [name for members in groups for name in members]
                reports |= {name: dataclasses.replace(reports[name], reason=NOT_WANTED) for name in names}
            else:
                done = _rewrite_(model, chosen, groups, modules, used, kept or anew, consume=consume, progress=progress)
                reports |= {report.name: report for report in done}
        if lm_head:
            head = convert_head_(model)
            reports[head.name] = head
    finally:  # also of a model that is partly converted: what is saved of it can be loaded
        for finish in finishers:
            finish(model, method, others)
    return list(reports.values())


def _rewrite_(
    model: PreTrainedModel,
    method: Method,
    groups: list[tuple[str, ...]],
    modules: dict[str, nn.Module],
    used: dict[tuple[str, ...], GroupStats],
    kept: Kept,
    *,
    consume: bool,
    progress: bool,
) -> list[LayerReport]:
    """Let `method` rewrite the linears of `groups`, which it takes out of `modules`."""

    def read() -> Iterator[tuple[list[Linear], GroupStats | None]]:
        for members in track(groups, "converting", enabled=progress):
            layers, stats = [read_linear(name, modules[name]) for name in members], used.get(members)
            yield layers, None if stats is None else stats.to(layers[0].W.device)

    reports = []
    for members, rewrites in zip(groups, method.rewrite(read, kept), strict=True):
        for name, rewrite in zip(members, rewrites, strict=True):
            m, n = shape(modules[name])
            if rewrite.module is not None:
                model.set_submodule(name, rewrite.module)
                del modules[name]  # the last reference to the dense weight, if nobody else has one
            reports.append(LayerReport(name, members[0], m, n, rewrite.rank, rewrite.kept, rewrite.reason))
        if consume and members in used:
            used[members].C = torch.empty(0)
    method.attach(model)
    return reports


def _checked(others: Others, model: PreTrainedModel, names: list[str], lm_head: bool) -> tuple[Others, bool]:
    """The overrides of linears, and whether the output embedding is to be rounded.

    Raises RankgateError for a name that nothing has, and for a method that the output embedding does not take.
    """
    if unknown := [name for name in others if not any(matches(name, module) for module in names)]:
        raise RankgateError(f"{unknown[0]!r} is no linear of this model; name one, or a part of its name")
    output = model.get_output_embeddings()
    head = [name for name, module in model.named_modules() if module is output]
    own = override(others, head, Int8Config() if lm_head else None)
    if own not in (None, Int8Config()):
        raise RankgateError(f"the output embedding {head[0]} can be rounded to int8 only, or stay dense")
    linear = {name for name in others if any(matches(name, module) for module in names if module not in head)}
    return {name: other for name, other in others.items() if name in linear}, own is not None


def methods_of(method: Method, others: Others) -> list[Method]:
    """All that take part in a conversion."""
    return [method, *(other for other in others.values() if other is not None)]


def override(others: Others, modules: Sequence[str], method: Method | None) -> Method | None:
    """What `others` say of the first of `modules` that they name, by the longest name; `method` if they name none."""
    named = [name for name in others if any(matches(name, module) for module in modules)]
    return others[max(named, key=len)] if named else method


def assigned(
    groups: list[tuple[str, ...]], method: Method, others: Others
) -> list[tuple[Method | None, list[tuple[str, ...]]]]:
    """The groups that each method is to rewrite."""
    parts: list[tuple[Method | None, list[tuple[str, ...]]]] = []
    for members in groups:
        own = override(others, members, method)
        part = next((part for chosen, part in parts if chosen is own), None)
        if part is None:
            parts.append((own, [members]))
        else:
            part.append(members)
    return parts


def matches(name: str, module: str) -> bool:
    """Whether `name` is that of a module, or a part of it: whole words between dots."""
    return f".{name}." in f".{module}."


def convert_head_(model: PreTrainedModel) -> LayerReport:
    """Round the output embedding of `model` to int8, in place."""
    head = model.get_output_embeddings()
    name = next((name for name, module in model.named_modules() if module is head), None)
    if name is None or type(head) is not nn.Linear:
        raise RankgateError("the model has no output embedding that is a linear layer; leave out lm_head")
    layer = read_linear(name, head)
    group = QuantizedGroup(nearest(layer.W, bits=8), None, None)
    model.set_submodule(name, QuantizedHead(group, layer.bias, layer.W.dtype))
    return LayerReport(name, name, layer.m, layer.n)


def statistics_for(method: Method, stats: Stats | None) -> dict[tuple[str, ...], GroupStats]:
    """The statistics that `method` uses, by members of the group: nothing if it needs none.

    Raises RankgateError if it needs what `stats` do not have.
    """
    if not method.needs_stats:
        return {}
    if stats is None:
        raise RankgateError(f"{method.name} needs calibration statistics; call calibrate() first")
    if method.needs_sensitivity and not stats.has_sensitivity:
        raise RankgateError(f"{method.name} needs output sensitivities; calibrate anew with sensitivity=True")
    return {group.members: group for group in stats.groups}


def converted_layers(model: nn.Module) -> Iterator[tuple[str, Converted]]:
    """The rewritten linears of a model, by name."""
    for name, module in model.named_modules():
        if isinstance(module, Converted):
            yield name, module


def shared_part(layer: Converted) -> nn.Module:
    """What `layer` has in common with its input group."""
    if isinstance(layer, SparseLinear):
        return layer.gate
    return layer.group if isinstance(layer, GroupedLinear) else layer.subspace


def share_(model: PreTrainedModel, dense: PreTrainedModel) -> None:
    """Give `model`, converted from `dense`, its tensors where both have the same: embeddings, norms, dense layers."""
    originals = dict(dense.named_modules())
    for name, module in model.named_modules():
        if (original := originals.get(name)) is None:
            continue
        for own, theirs in ((module._parameters, original._parameters), (module._buffers, original._buffers)):
            for leaf, tensor in own.items():
                other = theirs.get(leaf)
                if tensor is not None and other is not None and tensor.dtype == other.dtype and tensor.equal(other):
                    own[leaf] = other
