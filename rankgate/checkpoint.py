"""Converted models on disk: a directory that `load` opens without calibrating or factorising anything again.

    config.json, generation_config.json, tokenizer files    as transformers writes them
    rankgate.safetensors                                    every tensor of the converted model
    rankgate.json                                           method, layer reports, module shapes, provenance

No file is called model.safetensors, so transformers on its own refuses the directory instead of loading it wrongly.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from safetensors import safe_open
from safetensors.torch import save_model
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from rankgate.convert import Converted, LayerReport, converted_layers, shared_part
from rankgate.core import ChannelGate, GatedGroup, GroupedLinear, LinearGroup, SparseLinear, Subspace
from rankgate.errors import RankgateError
from rankgate.methods import METHODS, Method
from rankgate.methods.context import ContextBasis, ContextLinear
from rankgate.quantized import QuantizedGroup, QuantizedHead

FORMAT = "rankgate-model-3"
MANIFEST = "rankgate.json"
TENSORS = "rankgate.safetensors"


@dataclass(frozen=True)
class Provenance:
    """Where a converted model comes from: the dense model, and the calibration text (hashes: `texts.run_hashes`)."""

    source: str
    fingerprint: str
    calibration_text: str | None
    calibration_tokens: int
    hashes: Tensor


@dataclass(frozen=True)
class Checkpoint:
    """A converted model, to be saved or opened from disk."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    method: Method
    layers: list[LayerReport]
    provenance: Provenance

    def save(self, directory: Path) -> None:
        """Write the model into `directory`, which is made. Wrap it in `files.atomic_path` to get all or nothing."""
        directory.mkdir()
        self.model.config.save_pretrained(directory)
        if self.model.generation_config is not None:
            self.model.generation_config.save_pretrained(directory)
        self.tokenizer.save_pretrained(directory)
        save_model(self.model, str(directory / TENSORS))
        manifest = {
            "format": FORMAT,
            "method": self.method.record(),
            "provenance": {**dataclasses.asdict(self.provenance), "hashes": self.provenance.hashes.tolist()},
            "dtype": str(self.model.dtype).removeprefix("torch."),
            "modules": _describe(self.model),
            "layers": [dataclasses.asdict(layer) for layer in self.layers],
        }
        (directory / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")


def is_checkpoint(path: str | Path) -> bool:
    return (Path(path) / MANIFEST).is_file()


def source_of(directory: str | Path) -> str:
    """The dense model that a converted one was made from. Raises RankgateError if the manifest cannot be read."""
    try:
        source: str = json.loads((Path(directory) / MANIFEST).read_text(encoding="utf-8"))["provenance"]["source"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RankgateError(f"{directory} is damaged, convert it again: {error}") from error
    return source


def load(directory: str | Path) -> Checkpoint:
    """Open what `save` wrote; the tensors are bit for bit those that were saved.

    Raises RankgateError if a file is missing, damaged or of another format.
    """
    directory = Path(directory)
    try:
        manifest = json.loads((directory / MANIFEST).read_text(encoding="utf-8"))
        if manifest["format"] != FORMAT:
            raise RankgateError(f"{directory} has format {manifest['format']!r}, this version reads {FORMAT!r}")
        settings = dict(manifest["method"])
        method = METHODS[settings.pop("name")](**settings)
        dtype = getattr(torch, manifest["dtype"])
        with init_empty_weights(include_buffers=False):  # the dense weights would only be replaced
            model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(directory), dtype=dtype)
        _rebuild(model, manifest["modules"], dtype)
        _fill(model, directory / TENSORS)
        if (directory / "generation_config.json").is_file():
            model.generation_config = GenerationConfig.from_pretrained(directory)
        tokenizer = AutoTokenizer.from_pretrained(directory)
        origin = manifest["provenance"]
        provenance = Provenance(**{**origin, "hashes": torch.tensor(origin["hashes"], dtype=torch.int64)})
        layers = [LayerReport(**layer) for layer in manifest["layers"]]
    except RankgateError:
        raise
    except Exception as error:  # a damaged file can fail in any layer below
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise RankgateError(f"{directory} is damaged, convert it again: {reason}") from error
    method.attach(model)
    return Checkpoint(model.eval(), tokenizer, method, layers, provenance)


def _fill(model: PreTrainedModel, path: Path) -> None:
    """Put the tensors of a file in their places, shared ones where they were shared."""
    with safe_open(path, framework="pt") as file:
        aliases = {alias: kept for alias, kept in (file.metadata() or {}).items() if alias != "format"}
        # copies, because how a product rounds may depend on where its operands begin in memory
        tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118  it is no dictionary
    unknown = model.load_state_dict(tensors, strict=False, assign=True).unexpected_keys
    for alias, kept in aliases.items():
        owner, _, leaf = alias.rpartition(".")
        setattr(model.get_submodule(owner), leaf, model.get_parameter(kept))
    empty = [name for name, parameter in model.named_parameters() if parameter.is_meta]
    if unknown or empty:
        raise ValueError(f"the tensors are not those of the manifest: {(unknown + empty)[0]}")


def _describe(model: PreTrainedModel) -> list[dict[str, Any]]:
    """What `_rebuild` needs of each converted layer; layers with the same `shared` number have one shared part."""
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
                "rank": shared.low_rank.rank if shared.low_rank is not None else 0,
                "refined": shared.refinement is not None,
            }
        case ContextBasis():
            settings |= {"rank": shared.rank, "eps": shared.eps}
    return settings


def _rebuild(model: PreTrainedModel, modules: list[dict[str, Any]], dtype: torch.dtype) -> None:
    """Put empty converted layers where `_describe` saw them."""
    shared: dict[int, nn.Module] = {}
    for spec in modules:
        if spec["shared"] not in shared:
            shared[spec["shared"]] = _empty_shared(spec, dtype)
        model.set_submodule(spec["name"], _empty_layer(spec, shared[spec["shared"]], dtype))


def _empty_shared(spec: dict[str, Any], dtype: torch.dtype) -> nn.Module:
    n = spec["n"]
    match spec["kind"]:
        case ChannelGate.__name__:
            return ChannelGate(torch.empty(n))
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
