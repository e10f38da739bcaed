"""Converted models on disk: what transformers' `save_pretrained` writes, and where the model comes from.

config.json, generation_config.json, model*.safetensors, tokenizer files    as of any model; `quantization_config`
                                                                            says how it was converted
rankgate.json                                                               layer reports, provenance; only what
                                                                            `Checkpoint.save` writes has it
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from rankgate.conversion.convert import LayerReport, Others, finishers
from rankgate.errors import RankgateError
from rankgate.experts import experts_of
from rankgate.hub.config import FORMAT, NAME, STACKED, RankgateConfig, build
from rankgate.hub.layout import describe, tie
from rankgate.hub.quantizer import RankgateQuantizer
from rankgate.methods import Method

MANIFEST = "rankgate.json"


@dataclass(frozen=True)
class Provenance:
    """Where a converted model comes from: the dense model, and the calibration text (hashes: `windows.run_hashes`)."""

    source: str
    fingerprint: str
    calibration_text: str | None
    calibration_tokens: int
    hashes: Tensor


@dataclass(frozen=True)
class Checkpoint:
    """A converted model, to be saved or opened from disk; without provenance if transformers alone saved it."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    method: Method
    layers: list[LayerReport]
    provenance: Provenance | None

    def save(self, directory: Path) -> None:
        """Write the model into `directory`, which is made. Wrap it in `files.atomic_path` to get all or nothing."""
        directory.mkdir()
        self.model.save_pretrained(directory)
        self.tokenizer.save_pretrained(directory)
        if self.provenance is None:
            return
        manifest = {
            "provenance": {**dataclasses.asdict(self.provenance), "hashes": self.provenance.hashes.tolist()},
            "layers": [dataclasses.asdict(layer) for layer in self.layers],
        }
        (directory / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")


def mark_converted(model: PreTrainedModel, method: Method, others: Others) -> None:
    """Let `save_pretrained` know that `model` was converted, as if that had been done on loading."""
    overrides = {name: other.record() for name, other in others.items() if other is not None}
    dense = [name for name, other in others.items() if other is None]
    made: dict[str, Any] = {"modules": describe(model), "experts": [*experts_of(model)]}
    config = RankgateConfig(method.record(), **made, overrides=overrides, modules_to_not_convert=dense)
    model.hf_quantizer = RankgateQuantizer(config, pre_quantized=True)  # type: ignore[assignment]
    model.config.quantization_config = config
    model.quantization_method = NAME  # type: ignore[assignment]
    tie(model)


finishers.append(mark_converted)


def is_checkpoint(path: str | Path) -> bool:
    """Whether `path` is a directory with a converted model."""
    return _quantization(path).get("quant_method") == NAME


def _quantization(path: str | Path) -> dict[str, Any]:
    try:
        config = json.loads((Path(path) / "config.json").read_text(encoding="utf-8"))
        found: dict[str, Any] = config.get("quantization_config") or {}
    except (OSError, ValueError, AttributeError):
        return {}
    return found


def source_of(directory: str | Path) -> str:
    """The dense model that a converted one was made from. Raises RankgateError if that is not recorded."""
    manifest = _manifest(Path(directory))
    if manifest is None:
        raise RankgateError(f"{directory} does not say what it was converted from; pass --against MODEL")
    source: str = manifest["provenance"]["source"]
    return source


def _manifest(directory: Path) -> dict[str, Any] | None:
    if not (directory / MANIFEST).exists():
        return None
    try:
        manifest: dict[str, Any] = json.loads((directory / MANIFEST).read_text(encoding="utf-8"))
        if not isinstance(manifest["provenance"]["source"], str):
            raise TypeError("its source is no name")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RankgateError(f"{directory} is damaged, convert it again: {error}") from error
    return manifest


def load(directory: str | Path) -> Checkpoint:
    """Open what `save` wrote; the tensors are bit for bit those that were saved.

    Raises RankgateError if a file is missing, damaged or of another format.
    """
    directory = Path(directory)
    manifest = _manifest(directory)
    try:
        settings = _quantization(directory)
        if settings["format"] not in (STACKED, FORMAT):
            raise RankgateError(
                f"{directory} has format {settings['format']}, this version reads {STACKED} and {FORMAT}; convert again"
            )
        method = build(settings["method"])
        from_pretrained: Any = AutoModelForCausalLM.from_pretrained
        model, info = from_pretrained(directory, output_loading_info=True)
        wrong = [name for kind in ("missing_keys", "unexpected_keys", "mismatched_keys") for name in info[kind]]
        if wrong:
            raise ValueError(f"the tensors are not those of the manifest: {sorted(map(str, wrong))[0]}")
        tokenizer = AutoTokenizer.from_pretrained(directory)
        if manifest is None:
            return Checkpoint(model, tokenizer, method, [], None)
        origin = manifest["provenance"]
        provenance = Provenance(**{**origin, "hashes": torch.tensor(origin["hashes"], dtype=torch.int64)})
        layers = [LayerReport(**layer) for layer in manifest["layers"]]
    except RankgateError:
        raise
    except Exception as error:  # a damaged file can fail in any layer below
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise RankgateError(f"{directory} is damaged, convert it again: {reason}") from error
    return Checkpoint(model, tokenizer, method, layers, provenance)
