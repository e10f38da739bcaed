"""What of a converted model other formats can carry: codes in groups with scales, and a low rank beside them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from rankgate.conversion.convert import converted_layers
from rankgate.core import GroupedLinear
from rankgate.errors import RankgateError
from rankgate.quantized import LowRank, QuantizedGroup, QuantizedHead, QuantizedMatrix


@dataclass(frozen=True)
class Member:
    """One linear layer: its rows of the group that it belongs to, without what the format leaves out."""

    name: str
    base: QuantizedMatrix
    low_rank: LowRank | None
    bias: Tensor | None
    head: bool  # the output embedding

    def dense(self) -> Tensor:
        """Q (m × n), bfloat16: where a format has no place for its codes."""
        return self.base.dequantize(torch.bfloat16)


def members(model: PreTrainedModel, *, lora: bool) -> list[Member]:
    """The converted layers of `model`.

    lora: whether a low rank has a place of its own. Raises RankgateError for what no format has: other methods, a gated
    refinement, and a low rank without such a place: the codes are rounded for all of it together.
    """
    found = []
    for name, layer in converted_layers(model):
        if not isinstance(layer, GroupedLinear) or not isinstance(layer.group, QuantizedGroup):
            raise RankgateError(f"{name} is not quantised; export takes models of lrq, int8 and int4")
        group, rows = layer.group, slice(layer.start, layer.stop)
        if group.refinement is not None:
            raise RankgateError(f"{name} has a gated refinement, which no other format has; convert with --refine 0")
        low = group.low_rank
        if low is not None and not lora:
            raise RankgateError(
                f"{name} has a low rank; pass --lora to write it as an adapter, or convert with --rank 0"
            )
        found.append(
            Member(
                name,
                group.base.rows(rows),
                None if low is None else LowRank(low.A[rows], low.B, low.scale),
                layer.bias,
                isinstance(layer, QuantizedHead),
            )
        )
    if not found:
        raise RankgateError("no layer is converted; there is nothing to export")
    return found


def others(model: PreTrainedModel) -> dict[str, Tensor]:
    """The tensors of a model outside its converted layers, each once, and the biases of these, by name."""
    inside = tuple(f"{name}." for name, _ in converted_layers(model))
    known: dict[int, str] = {}
    tensors = {}
    for name, tensor in model.state_dict().items():
        if not name.startswith(inside) and known.setdefault(tensor.data_ptr(), name) == name:
            tensors[name] = tensor
    biases = {f"{name}.bias": layer.bias for name, layer in converted_layers(model) if layer.bias is not None}
    return {**tensors, **biases}
