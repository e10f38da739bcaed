"""How many bytes of weights one generated token reads. Modelled from stored sizes and measured fire rates.

    dense layer      m n w                        w: bytes per weight in the model's dtype
    subspace         k n b once per input group, k m b per layer
    token gate       + p m n w                    p: measured share of tokens that fired

A context basis counts the directions that were filled on average. Activations, the key-value cache and what the
residual's gate needs to be computed are not weights and are not counted.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn
from transformers import PreTrainedModel

from rankgate.convert import converted_layers
from rankgate.core import GatedLinear
from rankgate.gates import GateLog
from rankgate.groups import linears


@dataclass(frozen=True)
class Reads:
    """Bytes per token: `dense` and `converted` for the linear layers, `other` for the rest of the model.

    `weights` counts the weights of the dense linear layers; `other` includes the output embedding.
    """

    dense: float
    converted: float
    other: float
    weights: int

    @property
    def speedup(self) -> float:
        """Dense over converted bytes of the linear layers: the effective speedup on weight reads."""
        return self.dense / self.converted

    @property
    def model_speedup(self) -> float:
        """The same for the whole model, output embedding included."""
        return (self.dense + self.other) / (self.converted + self.other)

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.converted / self.weights


def weight_reads(model: PreTrainedModel, gates: Mapping[nn.Module, GateLog]) -> Reads:
    """Account for `model` (dense or converted), given what `record_gates` saw of each gated subspace."""
    dense = converted = 0.0
    weights = 0
    counted: set[nn.Module] = set()
    layers = dict(converted_layers(model))
    for layer in layers.values():
        subspace, m, n = layer.subspace, layer.out_features, layer.in_features
        stored = layer.A if isinstance(layer, GatedLinear) else layer.W
        rank, fire = float(subspace.rank), 0.0
        if subspace.eps is not None:
            log = gates[subspace]
            rank = rank if log.columns is None else log.columns
            fire = log.rate
        bytes_per_weight = stored.element_size()
        dense += m * n * bytes_per_weight
        converted += (rank * m + fire * m * n) * bytes_per_weight
        if subspace not in counted:
            counted.add(subspace)
            converted += rank * n * bytes_per_weight
        weights += m * n
    plain = linears(model)
    for module in plain.values():
        assert isinstance(module.weight, Tensor)
        dense += nbytes(module.weight)
        converted += nbytes(module.weight)
        weights += module.weight.numel()
    inside = {*plain.values(), *layers.values(), *counted}
    other = 0.0
    for module in model.modules():
        if module not in inside:
            own = sum(nbytes(parameter) for parameter in module.parameters(recurse=False))
            other += own / module.num_embeddings if isinstance(module, nn.Embedding) else own
    return Reads(dense, converted, other, weights)


def nbytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
