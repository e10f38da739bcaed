"""One pass over calibration text: the second moment of what every input group reads.

For each input group (see `groups`), over all calibration tokens x (n values each):

    C = Σ x xᵀ / tokens                                   n × n, not centred

This is all that the activation-aware methods need: its top eigenvectors are the subspace that keeps most of ‖x‖², and
W C Wᵀ is the second moment of the layer's outputs. Accumulated in float32 (float64 for a float64 model) while the
model runs; no activation is kept. Memory is one n × n matrix per group, whatever the number of tokens. C is symmetric,
so only the blocks on and above its diagonal are multiplied. The output embedding is not run: its input is not needed.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from rankgate.core import widen
from rankgate.errors import RankgateError
from rankgate.files import atomic_path
from rankgate.groups import input_groups, linears
from rankgate.progress import track
from rankgate.texts import run_hashes

FORMAT = "rankgate-stats-1"
SYRK_BLOCKS = 4


@dataclass
class GroupStats:
    """Second moment C (n × n) of the tensor that `members` read, over `tokens` tokens."""

    members: tuple[str, ...]
    C: Tensor
    tokens: int
    _eigen: tuple[Tensor, Tensor] | None = field(default=None, repr=False)

    def eigen(self) -> tuple[Tensor, Tensor]:
        """Eigenvalues of C (n, descending, ≥ 0) and eigenvectors as columns (n × n). Computed once."""
        if self._eigen is None:
            values, vectors = torch.linalg.eigh(self.C)
            self._eigen = values.flip(0).clamp_min(0), vectors.flip(1)
        return self._eigen


@dataclass
class Stats:
    """Calibration statistics of one model.

    `fingerprint` names the model they belong to and `text` the source of the calibration text; `hashes` are the hashed
    runs of that text, by which evaluation recognises what it must not report on (see `texts.run_hashes`).
    """

    groups: list[GroupStats]
    fingerprint: str
    tokens: int
    hashes: Tensor
    text: str = ""

    def check(self, model: PreTrainedModel) -> None:
        """Raises RankgateError if these statistics come from another model."""
        if self.fingerprint != fingerprint(model):
            raise RankgateError("the statistics belong to another model; calibrate this one anew")

    def save(self, path: str | Path) -> None:
        """Write one safetensors file, atomically."""
        tensors = {f"C.{i}": group.C.contiguous() for i, group in enumerate(self.groups)}
        meta = {
            "format": FORMAT,
            "fingerprint": self.fingerprint,
            "tokens": self.tokens,
            "text": self.text,
            "groups": [{"members": group.members, "tokens": group.tokens} for group in self.groups],
        }
        with atomic_path(path) as temporary:
            save_file({**tensors, "hashes": self.hashes}, temporary, metadata={"rankgate": json.dumps(meta)})

    @classmethod
    def load(cls, path: str | Path) -> Stats:
        """Read what `save` wrote. Raises RankgateError if it is missing, damaged or something else."""
        if not Path(path).is_file():
            raise RankgateError(f"no statistics file at {path}")
        try:
            with safe_open(path, framework="pt") as file:
                meta = json.loads((file.metadata() or {})["rankgate"])
                if meta["format"] != FORMAT:
                    raise KeyError(meta["format"])
                groups = [
                    GroupStats(tuple(group["members"]), file.get_tensor(f"C.{i}"), group["tokens"])
                    for i, group in enumerate(meta["groups"])
                ]
                return cls(groups, meta["fingerprint"], meta["tokens"], file.get_tensor("hashes"), meta["text"])
        except (SafetensorError, KeyError, json.JSONDecodeError, OSError) as error:
            raise RankgateError(f"{path} is damaged or not a Rankgate statistics file; delete it") from error


def calibrate(model: PreTrainedModel, windows: Tensor, *, batch_size: int = 4, progress: bool = False) -> Stats:
    """Run `model` over `windows` (count × context token ids) and return the statistics of its input groups.

    Raises RankgateError when an activation is not finite.
    """
    digest = fingerprint(model)
    members = input_groups(model)
    with accumulate(model, members) as groups, torch.inference_mode(), evaluation_mode(model):
        for batch in track(windows.split(batch_size), "calibrating", enabled=progress):
            model.base_model(input_ids=batch.to(model.device), use_cache=False)
    for group in groups:
        finish(group)
    return Stats(groups, digest, windows.numel(), run_hashes(windows))


@contextmanager
def accumulate(model: PreTrainedModel, members: list[tuple[str, ...]]) -> Iterator[list[GroupStats]]:
    """While open, every forward pass of `model` adds Σ x xᵀ of the first member of each group to its `C`."""
    modules = linears(model)
    groups, handles = [], []
    for names in members:
        first = modules[names[0]]
        assert isinstance(first.weight, Tensor)
        n = getattr(first, "in_features", first.weight.shape[0])  # Conv1D keeps n × m
        dtype = torch.promote_types(first.weight.dtype, torch.float32)
        group = GroupStats(names, torch.zeros(n, n, dtype=dtype, device=first.weight.device), 0)
        groups.append(group)

        def add(_: object, args: tuple[Tensor, ...], group: GroupStats = group) -> None:
            x = widen(args[0].detach()).reshape(-1, group.C.shape[0])
            add_outer(group.C, x)
            group.tokens += x.shape[0]

        handles.append(first.register_forward_pre_hook(add))
    try:
        yield groups
    finally:
        for handle in handles:
            handle.remove()


def add_outer(C: Tensor, x: Tensor) -> None:
    """C += xᵀ x (n × n, x: tokens × n) on and above the block diagonal; `finish` mirrors it."""
    n = C.shape[0]
    step = -(-n // SYRK_BLOCKS)
    for start in range(0, n, step):
        rows = slice(start, start + step)
        C[rows, start:].addmm_(x[:, rows].T, x[:, start:])


def finish(group: GroupStats) -> None:
    """Turn the accumulated upper blocks into the mean second moment, and check it."""
    upper = group.C.triu_()
    upper.add_(upper.triu(1).T)
    if not torch.isfinite(upper).all():
        raise RankgateError(f"non-finite activations at the input of {group.members[0]}; try a wider dtype")
    if group.tokens == 0 or upper.diagonal().sum() == 0:
        raise RankgateError(f"no signal at the input of {group.members[0]}; calibrate on real text")
    upper.div_(group.tokens)


@contextmanager
def evaluation_mode(model: PreTrainedModel) -> Iterator[None]:
    """`model.eval()` for the duration."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


def fingerprint(model: PreTrainedModel) -> str:
    """SHA-256 over the name, shape, dtype and a 1,024-value sample of every parameter of a dense model."""
    sha = hashlib.sha256()
    for name, parameter in model.named_parameters():
        flat = parameter.detach().flatten()
        sample = flat[:: max(1, flat.numel() // 1024)].to("cpu", torch.float64)
        sha.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}".encode())
        sha.update(sample.numpy().tobytes())
    return sha.hexdigest()
