"""What a converted model is made of, as plain JSON values, and empty modules from that description."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from rankgate.conversion.convert import Converted, converted_layers, shared_part
from rankgate.core import ChannelGate, GatedGroup, GroupedLinear, LinearGroup, SparseLinear, Subspace
from rankgate.hub import stored
from rankgate.hub.config import STACKED
from rankgate.hub.stored import StoredLinear
from rankgate.methods.context import ContextBasis, ContextLinear
from rankgate.quantized import QuantizedGroup, QuantizedHead


def describe(model: PreTrainedModel) -> list[dict[str, Any]]:
    """What `rebuild` needs of each converted layer; layers with the same `shared` number have one shared part."""
    numbers: dict[nn.Module, int] = {}
    return [
        {
            "name": name,
            "head": isinstance(layer, QuantizedHead),
            "start": layer.start if isinstance(layer, GroupedLinear) else 0,
            "m": layer.out_features,
            "n": layer.in_features,
            "bias": layer.bias is not None,
            "shared": numbers.setdefault(shared_part(layer), len(numbers)),
            **_settings(shared_part(layer)),
        }
        for name, layer in converted_layers(model)
    ]


def _settings(shared: nn.Module) -> dict[str, Any]:
    """What else there is to know about the shared part of a layer."""
    settings: dict[str, Any] = {"kind": type(shared).__name__}
    match shared:
        case GatedGroup():
            settings |= {"rows": shared.m, "rank": shared.rank, "eps": shared.subspace.eps}
        case QuantizedGroup():
            settings |= {
                "rows": shared.m,
                "bits": shared.base.bits,
                "symmetric": shared.base.zero is None,
                "group_size": shared.base.group_size,
                "rank": shared.low_rank.rank if shared.low_rank is not None else 0,
                "refined": shared.refinement is not None,
            }
        case ContextBasis():
            settings |= {"rank": shared.rank, "eps": shared.eps}
    return settings


def rebuild(model: PreTrainedModel, modules: list[dict[str, Any]], dtype: torch.dtype, format: int) -> None:
    """Put empty layers where `describe` saw them, as a format stores them: from 5 on, members of groups one by one."""
    shared: dict[int, nn.Module] = {}
    for spec in modules:
        if format > STACKED and spec["kind"] in {GatedGroup.__name__, QuantizedGroup.__name__}:
            model.set_submodule(spec["name"], stored.empty(spec, dtype))
            continue
        if spec["shared"] not in shared:
            shared[spec["shared"]] = _empty_shared(spec, dtype)
        model.set_submodule(spec["name"], _empty_layer(spec, shared[spec["shared"]], dtype))


def _empty_shared(spec: dict[str, Any], dtype: torch.dtype) -> nn.Module:
    n = spec["n"]
    match spec["kind"]:
        case ChannelGate.__name__:
            return ChannelGate(torch.empty(n, dtype=torch.float32))
        case ContextBasis.__name__:
            return ContextBasis(n, spec["rank"], spec["eps"])
        case QuantizedGroup.__name__:
            rank, refined = spec["rank"], spec["refined"]
            return QuantizedGroup.empty(spec["rows"], n, spec["bits"], spec["symmetric"], rank=rank, refined=refined)
        case GatedGroup.__name__:
            B, A = torch.empty(spec["rank"], n, dtype=dtype), torch.empty(spec["rows"], spec["rank"], dtype=dtype)
            W = None if spec["eps"] is None else torch.empty(spec["rows"], n, dtype=dtype)
            return GatedGroup(Subspace(B, spec["eps"]), A, W)
    raise ValueError(f"unknown kind of layer {spec['kind']!r}")


def _empty_layer(spec: dict[str, Any], shared: nn.Module, dtype: torch.dtype) -> Converted:
    m, n = spec["m"], spec["n"]
    bias = torch.empty(m, dtype=dtype) if spec["bias"] else None
    match shared:
        case QuantizedGroup() if spec["head"]:
            return QuantizedHead(shared, bias, dtype)
        case LinearGroup():
            return GroupedLinear(shared, spec["start"], spec["start"] + m, bias)
        case ChannelGate():
            return SparseLinear(shared, torch.empty(m, n, dtype=dtype), bias)
        case ContextBasis():
            return ContextLinear(shared, torch.empty(m, n, dtype=dtype), bias)
    raise ValueError(f"unknown kind of layer {spec['kind']!r}")


def tie(model: PreTrainedModel) -> None:
    """Tell transformers that members of a group share its tensors: one name of each is stored, and none is missing."""
    heads = [f"{name}." for name, layer in model.named_modules() if isinstance(layer, QuantizedHead | StoredLinear)]
    for name in [name for name in model.all_tied_weights_keys if name.startswith(tuple(heads))]:
        del model.all_tied_weights_keys[name]  # the output embedding has no dense weight any more
    first: dict[int, str] = {}
    for name, tensor in model.named_parameters(remove_duplicate=False):
        kept = first.setdefault(id(tensor), name)
        if kept != name:
            model.all_tied_weights_keys.setdefault(name, kept)
