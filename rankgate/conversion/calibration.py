"""Calibration on text, layer by layer: the second moment of what every input group reads.

For each input group (see `groups`), over all calibration tokens x (n values each):

    C = Σ x xᵀ / tokens                                   n × n, not centred

Its top eigenvectors are the subspace that keeps most of ‖x‖², and W C Wᵀ is the second moment of the layer's outputs.
Accumulated in float32 (float64 for a float64 model) while one layer after the other is run on all of the text (see
`walk`). Memory is one n × n matrix per group of that layer, whatever the number of tokens; if all of them take more
than 1 GiB, finished ones lie in temporary files. On a GPU those under way keep within a tenth of the weights: a layer
is run as often as that takes. C is symmetric, so only the blocks on and above its diagonal are multiplied. The output
embedding is not run: its input is not needed. Of the activations themselves, a sample of at most 256 tokens is kept,
evenly spread over the text: what gates are calibrated on.

On request, a pass over the first 2,048 tokens before that measures how much each output y_i matters,

    F_i = E[(∂ℓ / ∂y_i)²]                                 ℓ: log-likelihood of a label sampled from the model itself

the diagonal of the Fisher information. An error δ of the outputs then costs about ½ Σ F_i δ_i² nats of KL, which makes
errors in different layers comparable. It needs a backward pass: about the time of three forward passes, the hidden
states of these tokens at every layer, and what one layer keeps of 128 tokens.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed import ProcessGroup
from transformers import PreTrainedModel

from rankgate.common.files import atomic_path, in_file
from rankgate.common.kept import Kept, anew
from rankgate.common.passes import evaluation_mode, gradients_from_embedding
from rankgate.common.progress import track
from rankgate.conversion.groups import input_groups, linears, shape
from rankgate.conversion.processes import add_up_, share_of
from rankgate.conversion.walk import Reading, Walk
from rankgate.conversion.windows import run_hashes
from rankgate.core import widen
from rankgate.errors import RankgateError
from rankgate.experts import DOWN, experts_of, unstacked
from rankgate.methods.given import GroupStats

FORMAT = "rankgate-stats-2"
SYRK_BLOCKS = 4
SAMPLE = 256  # tokens kept per group
SENSITIVITY_TOKENS = 2048
IN_MEMORY = 1 << 30  # bytes of second moments; more of them lie in files
SHARE = 0.1  # of a GPU's weights that the second moments of one pass may take
log = logging.getLogger(__name__)
PIECE = 128  # of them at a time: what a backward pass keeps grows with the length


@dataclass
class Stats:
    """Calibration statistics of one model.

    `fingerprint` names the model they belong to and `text` the source of the calibration text; `hashes` are the hashed
    runs of that text, by which evaluation recognises what it must not report on (see `windows.run_hashes`).
    """

    groups: list[GroupStats]
    fingerprint: str
    tokens: int
    hashes: Tensor
    text: str = ""

    @property
    def has_sensitivity(self) -> bool:
        return all(group.sensitivity is not None for group in self.groups)

    def check(self, model: PreTrainedModel) -> None:
        """Raises RankgateError if these statistics come from another model."""
        if self.fingerprint != fingerprint(model):
            raise RankgateError("the statistics belong to another model; calibrate this one anew")

    def save(self, path: str | Path) -> None:
        """Write one safetensors file, atomically."""
        tensors = {"hashes": self.hashes}
        for i, group in enumerate(self.groups):
            tensors |= {f"C.{i}": group.C.contiguous(), f"sample.{i}": group.sample}
            if group.sensitivity is not None:
                tensors[f"sensitivity.{i}"] = group.sensitivity
        meta = {
            "format": FORMAT,
            "fingerprint": self.fingerprint,
            "tokens": self.tokens,
            "text": self.text,
            "groups": [{"members": group.members, "tokens": group.tokens} for group in self.groups],
        }
        with atomic_path(path) as temporary:
            save_file(tensors, temporary, metadata={"rankgate": json.dumps(meta)})

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
                names = set(file.keys())
                groups = [
                    GroupStats(
                        tuple(group["members"]),
                        file.get_tensor(f"C.{i}"),
                        group["tokens"],
                        file.get_tensor(f"sample.{i}"),
                        file.get_tensor(f"sensitivity.{i}") if f"sensitivity.{i}" in names else None,
                    )
                    for i, group in enumerate(meta["groups"])
                ]
                return cls(groups, meta["fingerprint"], meta["tokens"], file.get_tensor("hashes"), meta["text"])
        except (SafetensorError, KeyError, json.JSONDecodeError, OSError) as error:
            raise RankgateError(f"{path} is damaged or not a Rankgate statistics file; delete it") from error


def calibrate(
    model: PreTrainedModel,
    windows: Tensor,
    *,
    sensitivity: bool = False,
    batch_size: int = 4,
    progress: bool = False,
    processes: ProcessGroup | None = None,
    kept: Kept | None = None,
) -> Stats:
    """Run `model` over `windows` (count × context token ids) and return the statistics of its input groups.

    sensitivity: also measure the Fisher diagonal of the outputs, which `lrq` needs.
    processes: all call this with the same model and windows; each reads some of these, and returns the whole.
    kept: where what was measured of each layer lies; for one process.
    Raises RankgateError when an activation is not finite, or if there are fewer windows than processes.
    """
    keep = kept or anew
    own = windows if processes is None else share_of(windows, processes)
    digest = fingerprint(model)
    model = unstacked(model)
    members = input_groups(model)
    walk = Walk.of(model)
    fisher: dict[tuple[str, ...], Tensor] = {}
    if sensitivity:
        found = keep("sensitivity", lambda: measure_sensitivity(walk, members, windows, progress=progress))
        fisher = {names: found[names[0]] for names in members}
    in_files = keep is anew and sum(moment_sizes(model, members).values()) > IN_MEMORY
    place = in_file if in_files else torch.zeros
    stride = sample_stride(windows)
    stages, reading = walk.stages(members), Reading(walk, own.split(batch_size))
    groups: dict[tuple[str, ...], GroupStats] = {}

    def measured(number: int) -> dict[str, Tensor]:
        with torch.inference_mode(), evaluation_mode(model):
            reading.up_to(number)
        found: dict[str, Tensor] = {}
        for some in split_passes(model, stages[number]) or [[]]:
            under_way = place if len(stages) == 1 else torch.zeros
            with accumulate(model, some, stride, under_way) as gathered, torch.inference_mode(), evaluation_mode(model):
                reading.run(number)
            if processes is not None:
                for group in gathered:
                    add_up_(group, processes)
            for alike in _alike(model, gathered):
                pool_(alike, fisher)
            for group in gathered:
                finish(group)
                if group.C.is_cuda or under_way is not place:
                    group.C = place(tuple(group.C.shape), dtype=group.C.dtype).copy_(group.C)
                group.sensitivity = fisher.get(group.members)
                found |= group.tensors()
        return found

    for number, stage in track([*enumerate(stages)], "calibrating", enabled=progress):
        tensors = keep(f"layer {number}", partial(measured, number))
        groups |= {names: GroupStats.of(names, tensors) for names in stage}
    return Stats([groups[names] for names in members], digest, windows.numel(), run_hashes(windows))


def split_passes(model: PreTrainedModel, members: list[tuple[str, ...]]) -> list[list[tuple[str, ...]]]:
    """The groups whose second moments are accumulated in one pass over the text: on the CPU all of them."""
    if model.device.type == "cpu":
        return [members]
    taken = math.inf
    passes: list[list[tuple[str, ...]]] = []
    budget = SHARE * sum(p.numel() * p.element_size() for p in model.parameters())
    for names, size in moment_sizes(model, members).items():
        if taken + size > budget:
            passes.append([])
            taken = 0
        passes[-1].append(names)
        taken += size
    return passes


def moment_sizes(model: PreTrainedModel, members: list[tuple[str, ...]]) -> dict[tuple[str, ...], int]:
    """Bytes of the second moment of every group in float32."""
    modules = linears(model)
    return {names: 4 * shape(modules[names[0]])[1] ** 2 for names in members}


def sample_stride(windows: Tensor) -> int:
    """Every how many tokens one is sampled: coprime to the context, so that all positions get their turn."""
    stride = max(1, -(-windows.numel() // SAMPLE))
    while math.gcd(stride, windows.shape[1]) > 1:
        stride += 1
    return stride


@contextmanager
def accumulate(
    model: PreTrainedModel,
    members: list[tuple[str, ...]],
    stride: int,
    kept: Callable[..., Tensor] = torch.zeros,
) -> Iterator[list[GroupStats]]:
    """While open, every forward pass of `model` adds Σ x xᵀ of the first member of each group to its `C`.

    kept: makes the zeros that hold them on a CPU, from shape and dtype.

    Every `stride`-th token that a group sees joins its sample, until that is full.
    """
    modules = linears(model)
    groups, handles = [], []
    for names in members:
        first = modules[names[0]]
        assert isinstance(first.weight, Tensor)
        _, n = shape(first)
        dtype = torch.promote_types(first.weight.dtype, torch.float32)
        device = first.weight.device
        C = torch.zeros(n, n, dtype=dtype, device=device) if device.type != "cpu" else kept((n, n), dtype=dtype)
        sample = torch.empty(0, n, dtype=torch.bfloat16)
        group = GroupStats(names, C, 0, sample.to(device))
        groups.append(group)

        def add(_: object, args: tuple[Tensor, ...], group: GroupStats = group) -> None:
            x = widen(args[0].detach()).reshape(-1, group.C.shape[0])
            add_outer(group.C, x)
            seen = x[-group.tokens % stride :: stride].to(torch.bfloat16)
            group.sample = torch.cat([group.sample, seen])[:SAMPLE]
            group.tokens += x.shape[0]

        handles.append(first.register_forward_pre_hook(add))
    try:
        yield groups
    finally:
        for handle in handles:
            handle.remove()


def measure_sensitivity(
    walk: Walk, groups: list[tuple[str, ...]], windows: Tensor, *, progress: bool = False
) -> dict[str, Tensor]:
    """The `sensitivity` of every group, by its first member, from 2,048 tokens of `windows` in pieces of 128 tokens.

    Raises RankgateError when a gradient is not finite.
    """
    pieces = [piece for window in windows.split(1) for piece in window.split(PIECE, dim=1)]
    pieces = pieces[: max(1, SENSITIVITY_TOKENS // pieces[0].numel())]
    model = walk.model
    generator = torch.Generator(model.device).manual_seed(0)
    modules = {name: model.get_submodule(name) for group in groups for name in group}
    sums = {name: torch.zeros(shape(module)[0], device=model.device) for name, module in modules.items()}

    def watch(y: Tensor, total: Tensor) -> None:
        def add(gradient: Tensor) -> None:
            total.add_(gradient.float().square().flatten(0, -2).sum(0))

        if y.requires_grad:
            y.register_hook(add)

    with gradients_from_embedding(model), evaluation_mode(model), torch.enable_grad():
        handles = [
            module.register_forward_hook(lambda _, args, y, total=sums[name]: watch(y, total))
            for name, module in modules.items()
        ]
        try:
            walk.backward(pieces, generator, progress=progress)
        finally:
            for handle in handles:
                handle.remove()
    fisher = {group[0]: torch.cat([sums[name] for name in group]) / sum(map(torch.numel, pieces)) for group in groups}
    for name, values in fisher.items():
        if not torch.isfinite(values).all():
            raise RankgateError(f"non-finite gradients at the output of {name}; try a wider dtype")
    return fisher


def _alike(model: PreTrainedModel, groups: list[GroupStats]) -> list[list[GroupStats]]:
    """For every layer of experts and each of their linears, the statistics of all experts."""
    by_name = {group.members[0]: group for group in groups}
    return [
        [by_name[name] for e in range(len(experts)) if (name := f"{layer}.{e}.{leaf}") in by_name]
        for layer, experts in experts_of(model).items()
        for leaf in (experts.up, DOWN)
    ]


def pool_(experts: list[GroupStats], fisher: dict[tuple[str, ...], Tensor]) -> None:
    """Fill up what an expert saw to as many tokens as it has inputs, in place, with the mean of all of its layer.

    That is its second moment (upper blocks of a sum, as `finish` takes it), its sample, and its `fisher`.
    """
    total, own = sum(group.tokens for group in experts), [group for group in experts if group.tokens < len(group.C)]
    if not own or not total:
        return
    names = ", ".join(group.members[0] for group in own[:3])
    log.warning("%d of %d experts saw few tokens and are filled up from the others: %s", len(own), len(experts), names)
    mean = torch.stack([group.C for group in experts]).sum(0) / total
    sample = torch.cat([group.sample for group in experts])
    known = [fisher[group.members] for group in experts if group.members in fisher]
    for group in own:
        n = len(group.C)
        group.C += (n - group.tokens) * mean
        group.sample, group.tokens = torch.cat([group.sample, sample])[:SAMPLE], n
        if known:
            fisher[group.members] = torch.stack(known).mean(0)


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


def fingerprint(model: PreTrainedModel) -> str:
    """SHA-256 over the name, shape, dtype and a 1,024-value sample of every parameter of a dense model."""
    sha = hashlib.sha256()
    for name, parameter in model.named_parameters():
        flat = parameter.detach().flatten()
        sample = flat[:: max(1, flat.numel() // 1024)].to("cpu", torch.float64)
        sha.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}".encode())
        sha.update(sample.numpy().tobytes())
    return sha.hexdigest()
