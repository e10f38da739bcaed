"""Opening models by name, dense or converted, on a device."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rankgate.conversion.calibration import fingerprint
from rankgate.conversion.convert import share_
from rankgate.errors import RankgateError
from rankgate.hub import checkpoint, sources
from rankgate.hub.texts import text_windows
from rankgate.ops.gpu import has_triton


@dataclass(frozen=True)
class Opened:
    """A model ready for work, dense where nothing else is said. `name` is how a checkpoint refers back to it."""

    name: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase

    @property
    def positions(self) -> int | None:
        """How many tokens the model has positions for; None if it sets no limit."""
        limit: int | None = getattr(self.model.config, "max_position_embeddings", None)
        return limit

    def windows(self, text: str, tokens: int, context: int) -> Tensor:
        """Token windows of a text (see `hub.texts`), after checking that the model can read that far."""
        if self.positions is not None and context > self.positions:
            raise RankgateError(f"a context of {context} is longer than the {self.positions} positions of {self.name}")
        return text_windows(self.tokenizer, text, tokens, context)


def find_device(name: str | None) -> torch.device:
    """`name`, or by default a GPU if there is one that kernels run on, else the CPU. Raises RankgateError."""
    if name is None:
        gpu = torch.device("cuda")
        return gpu if torch.cuda.is_available() and has_triton(gpu) else torch.device("cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise RankgateError(f"{name!r} is not a device; use cpu, cuda or cuda:1") from None
    if device.type != "cpu" and (device.type != "cuda" or (device.index or 0) >= torch.cuda.device_count()):
        raise RankgateError(f"there is no {name} here; use --device cpu")
    return device


def open_dense(name: str, device: str | None = "cpu") -> Opened:
    """Resolve and load a dense model; for `device` see `find_device`.

    Raises RankgateError if there is none, or if it is a converted one.
    """
    place = find_device(device)
    source = sources.resolve(name)
    if source.gguf is None and checkpoint.is_checkpoint(source.path):
        raise RankgateError(f"{name} is converted already; give the dense model")
    model, tokenizer = sources.load(source)
    return Opened(source.name, _moved(model, place), tokenizer)


def open_any(name: str, device: str | None = "cpu") -> Opened:
    """Load a dense or a converted model; for `device` see `find_device`. Raises RankgateError if there is none."""
    if not checkpoint.is_checkpoint(name):
        return open_dense(name, device)
    place = find_device(device)
    converted = checkpoint.load(name)
    return Opened(name, _moved(converted.model, place), converted.tokenizer)


def open_pair(
    directory: str, device: str | None = "cpu", *, dense: str | None = None
) -> tuple[Opened, checkpoint.Checkpoint]:
    """A converted model and `dense`, by default the one that it was converted from, which share what both have.

    Raises RankgateError if `directory` is no converted model, or if the dense model is another one or not known.
    """
    if not checkpoint.is_checkpoint(directory):
        raise RankgateError(f"{directory} is not a converted model; give a directory that rankgate convert wrote")
    place = find_device(device)
    converted = checkpoint.load(directory)
    origin = converted.provenance
    if origin is None and dense is None:
        raise RankgateError(f"{directory} does not say what it was converted from; name it (--dense, --against)")
    opened = open_dense(dense or (origin.source if origin else ""), device)
    if origin and fingerprint(opened.model) != origin.fingerprint:
        raise RankgateError(
            f"{opened.name} is not the model that {directory} was converted from; name that one (--dense, --against)"
        )
    share_(_moved(converted.model, place), opened.model)
    return opened, converted


def _moved(model: PreTrainedModel, device: torch.device) -> PreTrainedModel:
    model.to(device)  # type: ignore[arg-type]
    return model
