"""How many bytes of weights one generated token reads. Modelled from stored sizes and measured fire rates.

    dense layer      m n w                        w: bytes per weight in the model's dtype
    subspace         k (n + m) w                  m: outputs of the input group in all
    token gate       + p m n w                    p: measured share of tokens that fired
    quantised        codes, scales, zeros and low-rank factors as stored
    channel gate     + f × the gated columns, and the thresholds in full      f: measured share of channels

Of a mixture's experts a token reads those that it has, on average; `dense` and `weights` count no more of them.
A context basis counts the directions that were filled on average. Padding of stored codes counts. Activations, the
key-value cache and what a token gate needs to be computed are not weights and are not counted.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn
from transformers import PreTrainedModel

from rankgate.conversion.convert import Converted, converted_layers, shared_part
from rankgate.conversion.gates import GateLog
from rankgate.conversion.groups import linears
from rankgate.core import GatedGroup, GroupedLinear, SparseLinear
from rankgate.experts import shares
from rankgate.methods.context import ContextBasis
from rankgate.quantized import QuantizedGroup


@dataclass(frozen=True)
class Reads:
    """Bytes per token: `dense` and `converted` for the linear layers, `other` for the rest of the model.

    `weights` counts the weights of the dense linear layers; `other` includes the output embedding as it is now, and
    `other_dense` the same with a dense one.
    """

    dense: float
    converted: float
    other: float
    other_dense: float
    weights: float

    @property
    def speedup(self) -> float:
        """Dense over converted bytes of the linear layers: the effective speedup on weight reads."""
        return self.dense / self.converted

    @property
    def model_speedup(self) -> float:
        """The same for the whole model, output embedding included."""
        return (self.dense + self.other_dense) / (self.converted + self.other)

    @property
    def head_converted(self) -> bool:
        """Whether the output embedding was converted, too."""
        return self.other != self.other_dense

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.converted / self.weights


def weight_reads(model: PreTrainedModel, gates: Mapping[nn.Module, GateLog]) -> Reads:
    """Account for `model` (dense or converted), given what `record_gates` saw of each gate."""
    width = model.dtype.itemsize
    dense = converted = other = other_dense = weights = 0.0
    inside: set[nn.Module] = set()
    chosen = shares(model)
    head = model.get_output_embeddings()
    for _, layer in converted_layers(model):
        share = chosen.get(layer, 1.0)
        size = share * layer.out_features * layer.in_features
        read = share * layer_bytes(layer, gates)
        shared = shared_part(layer)
        if shared not in inside:
            read += share * shared_bytes(shared, gates, width)
            inside.update(shared.modules())
        inside.add(layer)
        if layer is head:
            other, other_dense = other + read, other_dense + size * width
        else:
            dense, converted, weights = dense + size * width, converted + read, weights + size
    for module in linears(model).values():
        assert isinstance(module.weight, Tensor)
        inside.add(module)
        share = chosen.get(module, 1.0)
        read = share * nbytes(module.weight)
        dense, converted, weights = dense + read, converted + read, weights + share * module.weight.numel()
    for module in model.modules():
        if module not in inside:
            rows = module.num_embeddings if isinstance(module, nn.Embedding) else 1
            own = nbytes(*module.parameters(recurse=False)) / rows
            other, other_dense = other + own, other_dense + own
    return Reads(dense, converted, other, other_dense, weights)


def layer_bytes(layer: Converted, gates: Mapping[nn.Module, GateLog]) -> float:
    """What a layer reads per token beside what it shares with its group."""
    if isinstance(layer, GroupedLinear):
        return 0.0
    if isinstance(layer, SparseLinear):
        return gates[layer.gate].rate * nbytes(layer.W)
    m, n = layer.out_features, layer.in_features
    directions, rate = gates[layer.subspace].columns, gates[layer.subspace].rate
    assert directions is not None
    return (directions * m + rate * m * n) * layer.W.element_size()


def shared_bytes(shared: nn.Module, gates: Mapping[nn.Module, GateLog], width: int) -> float:
    """What an input group reads once per token. `width`: bytes of a value of a context basis."""
    if isinstance(shared, ContextBasis):
        directions = gates[shared].columns
        assert directions is not None
        return directions * shared.n * width
    if isinstance(shared, GatedGroup):
        fired = 0.0 if shared.W is None else gates[shared.subspace].rate * nbytes(shared.W)
        return nbytes(shared.subspace.B, shared.A) + fired
    if not isinstance(shared, QuantizedGroup):
        return stored_bytes(shared)
    plane = shared.refinement
    always = stored_bytes(shared.base) + (stored_bytes(shared.low_rank) if shared.low_rank is not None else 0)
    if plane is None:
        return always
    gated = gates[plane.gate].rate * nbytes(plane.codes, plane.column)
    return always + stored_bytes(plane.gate) + nbytes(plane.row) + gated


def stored_bytes(module: nn.Module) -> int:
    return nbytes(*module.parameters())


def nbytes(*tensors: Tensor) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
