"""Tensor parallelism in transformers: every process keeps its part of each converted layer.

    model = AutoModelForCausalLM.from_pretrained(directory, distributed_config=DistributedConfig(tp_size=2))

in a script that `torchrun --nproc-per-node 2` starts. The architecture's plan says which layers are split by rows
(colwise: q, k, v, gate, up) and which by columns (rowwise: o, down), whose outputs are added up over the processes.
Transformers carries it out for dense weights. Of stored codes rows of one member are not rows of a group, and columns
come in blocks: so converted layers are taken out of the plan, read whole by every process, and cut here.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, distributed
from transformers import PreTrainedModel

from rankgate.conversion.convert import converted_layers
from rankgate.core import GatedGroup, GroupedLinear, LinearGroup, Subspace, operators
from rankgate.errors import RankgateError
from rankgate.quantized import GROUP, LowRank, QuantizedGroup, Refinement

EMBEDDINGS = ("embedding_rowwise", "colwise_gather_output")  # styles that transformers has for them
WHOLE = "replicate"  # which leaves them as they are: DTensors cannot be captured
ELSE = "open it without distributed_config, or serve it by vLLM (pip install 'rankgate[vllm]')"


@dataclass(frozen=True)
class Share:
    """The part of process `rank` of `size`; `group` is their process group."""

    rank: int
    size: int
    group: Any

    def of(self, start: int, stop: int) -> range:
        """What of start … stop is its own."""
        each = (stop - start) // self.size
        return range(start + self.rank * each, start + (self.rank + 1) * each)


_processes: dict[str, Any] = {}  # by name: an operator cannot be given a process group itself


def summed(x: Tensor, group: str) -> Tensor:
    """The sum of x (any shape) over the processes of a group of this name: one operator for graphs and compilers."""
    total = x.clone(memory_format=torch.contiguous_format)
    distributed.all_reduce(total, group=_processes[group])
    return total


operators.define("summed(Tensor x, str group) -> Tensor")
operators.impl("summed", summed, "CompositeExplicitAutograd")
operators.impl("summed", lambda x, group: torch.empty_like(x, memory_format=torch.contiguous_format), "Meta")


class SummedLinear(GroupedLinear):
    """Some columns of a layer: its outputs are added up over the processes. Inference only."""

    def __init__(self, layer: GroupedLinear, group: LinearGroup, processes: Any) -> None:
        super().__init__(group, layer.start, layer.stop, layer.bias)
        self.processes: str = processes.group_name
        _processes[self.processes] = processes

    def forward(self, x: Tensor) -> Tensor:
        """Raises RankgateError if gradients are asked for, which would lack those of the other processes."""
        if x.requires_grad:
            raise RankgateError("a model that is sharded cannot be trained; open it without distributed_config")
        part = self.group.rows(x, self.start, self.stop)
        y: Tensor = torch.ops.rankgate.summed(part, self.processes)
        return y if self.bias is None else y + self.bias


def take_styles(names: Sequence[str], dense: Sequence[str], plan: dict[str, str]) -> dict[str, str]:
    """How converted layers of these names are split, which is taken out of `plan`.

    dense: names of linears that transformers splits by the same plan. Raises RankgateError if one rule is for both.
    """
    found = {name: plan[rule] for name in names if (rule := _rule(name)) in plan}
    rules = {_rule(name) for name in found}
    if both := [name for name in dense if _rule(name) in rules]:
        raise RankgateError(
            f"{both[0]} is dense and the same layer elsewhere is converted: no plan splits both; {ELSE}"
        )
    for rule in rules:
        del plan[rule]
    plan |= {rule: WHOLE for rule, style in plan.items() if style in EMBEDDINGS}
    return found


def _rule(name: str) -> str:
    """`model.layers.*.mlp.up_proj` of a layer's name."""
    return re.sub(r"\.\d+(?=\.|$)", ".*", name)


def shard_(model: PreTrainedModel, styles: Mapping[str, str], share: Share) -> None:
    """Cut the converted layers of a model to the part of one process, in place.

    Raises RankgateError where heads or blocks of 64 inputs do not divide, and for methods that need all of an input.
    """
    config: Any = model.config.get_text_config()
    for what in ("num_attention_heads", "num_key_value_heads"):
        count = getattr(config, what, None) or share.size
        if count % share.size:
            raise RankgateError(f"{what} is {count}, which {share.size} processes cannot share; use another tp_size")
    groups: dict[LinearGroup, dict[str, GroupedLinear]] = {}
    for name, layer in converted_layers(model):
        style = styles.get(name)
        if style is None or style == "colwise_gather_output":  # as each process has its inputs whole
            continue
        if not isinstance(layer, GroupedLinear) or style not in ("colwise", "rowwise"):
            raise RankgateError(f"{name} ({type(layer).__name__}, {style}) cannot be split; {ELSE}")
        groups.setdefault(layer.group, {})[name] = layer
    for group, members in groups.items():
        kinds = {styles[name] for name in members}
        if len(kinds) > 1:
            raise RankgateError(f"{', '.join(members)} are one input group, but split differently; {ELSE}")
        made = _by_rows(group, members, share) if kinds == {"colwise"} else _by_columns(group, members, share)
        for name, layer in made.items():
            model.set_submodule(name, layer)


def _by_rows(group: LinearGroup, members: dict[str, GroupedLinear], share: Share) -> dict[str, GroupedLinear]:
    rows: list[int] = []
    made: dict[str, tuple[int, int, Tensor | None]] = {}
    for name, layer in sorted(members.items(), key=lambda pair: pair[1].start):
        if layer.out_features % share.size:
            raise RankgateError(f"{name} has {layer.out_features} outputs, which {share.size} processes cannot share")
        own = share.of(layer.start, layer.stop)
        bias = None if layer.bias is None else layer.bias[own.start - layer.start : own.stop - layer.start].clone()
        made[name] = len(rows), len(rows) + len(own), bias
        rows += own
    cut = _cut(group, torch.tensor(rows), None)
    return {name: GroupedLinear(cut, *rest) for name, rest in made.items()}


def _by_columns(group: LinearGroup, members: dict[str, GroupedLinear], share: Share) -> dict[str, GroupedLinear]:
    name = next(iter(members))
    if isinstance(group, GatedGroup) and group.W is not None:
        raise RankgateError(f"the gate of {name} needs all of its input, which no process has; {ELSE}")
    if group.n % (share.size * GROUP):
        raise RankgateError(
            f"{name} has {group.n} inputs, of which each of {share.size} processes would get no whole blocks of "
            f"{GROUP}; use another tp_size"
        )
    cut = _cut(group, None, share.of(0, group.n))
    return {name: SummedLinear(layer, cut, share.group) for name, layer in members.items()}


def _cut(group: LinearGroup, rows: Tensor | None, columns: range | None) -> LinearGroup:
    """Some rows, or some columns, of a group: copies, so that the rest is freed."""
    which = slice(None) if rows is None else rows
    at = slice(None) if columns is None else slice(columns.start, columns.stop)

    def of_rows(tensor: Tensor) -> Tensor:
        return tensor.detach()[which].clone()

    def of_columns(tensor: Tensor) -> Tensor:
        return tensor.detach()[..., at].clone()

    if isinstance(group, GatedGroup):
        W = None if group.W is None else of_rows(group.W)
        return GatedGroup(Subspace(of_columns(group.subspace.B), group.subspace.eps), of_rows(group.A), W)
    assert isinstance(group, QuantizedGroup)
    low, fine = group.low_rank, group.refinement
    base = group.base.rows(which) if columns is None else group.base.columns(columns.start, columns.stop)
    if low is not None:
        low = LowRank(of_rows(low.A), of_columns(low.B), low.scale.detach().clone())
    if fine is not None:
        vectors = of_rows(fine.row), of_columns(fine.column), of_columns(fine.gate.threshold)
        fine = Refinement.pack(fine.unpack()[which][:, at], *vectors)
    return QuantizedGroup(base, low, fine)
