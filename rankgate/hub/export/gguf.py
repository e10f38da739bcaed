"""A GGUF file for llama.cpp: the converted linears in its block formats, all else from a file of the same model.

    Q4_0   symmetric 4 bits, exactly: a group of 64 is two blocks with the same scale, one of 32 is a block
    Q8_0   symmetric 8 bits, exactly
    Q4_1   4 bits with zeros: w = s c + m with m = −s z, rounded to float16

Scales are bfloat16 here and float16 there: exact from 2⁻¹⁴ on, see `Written`. Architecture, tokenizer and the tensors
that are not converted are copied from a template. Some converters reorder rows (q and k of Llama, for the rotation);
which order a tensor has is found by comparing it with the converted one, and a template that agrees in neither order is
another model.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFReader, GGUFValueType, GGUFWriter
from torch import Tensor
from transformers import PreTrainedModel

from rankgate.errors import RankgateError
from rankgate.hub.export.lora import factors, largest_rank
from rankgate.hub.export.members import Member, members
from rankgate.quantized import QuantizedMatrix, unpack_nibbles

BLOCK = 32
FAR = 0.5  # relative distance at which a tensor of the template is no version of a converted one
FILE_TYPES = {  # general.file_type, which names a file: llama.cpp's LLAMA_FTYPE_MOSTLY_…
    GGMLQuantizationType.Q4_0: 2,
    GGMLQuantizationType.Q4_1: 3,
    GGMLQuantizationType.Q8_0: 7,
}


@dataclass(frozen=True)
class Written:
    """What became of the converted layers."""

    types: dict[str, int]  # how many of each block format
    inexact_scales: int  # groups whose scale is not exact in float16
    groups: int


def write(model: PreTrainedModel, template: Path, file: Path, adapter: Path | None) -> Written:
    """Write a converted model as `file`, and its low rank as `adapter`.

    Raises RankgateError for what the format does not have, see `members`, and for a template of another model.
    """
    found = members(model, lora=adapter is not None)
    reader = _open(template)
    names = _names(reader, found)
    stored = {tensor.name: tensor for tensor in reader.tensors}
    orders = {member.name: _order(stored.get(names[member.name]), member, reader) for member in found}
    blocks = {names[member.name]: blocks_of(member.base, orders[member.name], member.name) for member in found}
    kinds = [kind for _, kind in blocks.values()]
    copy(reader, file, blocks, FILE_TYPES[max(kinds, key=kinds.count)])
    if adapter is not None:
        _write_adapter(found, names, orders, _text(reader, "general.architecture"), adapter)
    scales = torch.cat([member.base.scale.detach().float().flatten() for member in found])
    counts = {kind.name: kinds.count(kind) for kind in sorted(set(kinds))}
    return Written(counts, int((scales.half().float() != scales).sum()), scales.numel())


def copy(
    reader: GGUFReader, file: Path, others: dict[str, tuple[np.ndarray, GGMLQuantizationType]], file_type: int
) -> None:
    """Write what `reader` has, but for tensors of these names, as `file`. file_type: what GGUF calls its kind."""
    writer = GGUFWriter(file, _text(reader, "general.architecture"))
    _copy_fields(reader, writer, file_type)
    for tensor in reader.tensors:
        if tensor.name not in others:
            writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    for name, (data, kind) in others.items():
        writer.add_tensor(name, data, raw_dtype=kind)
    _finish(writer)


def blocks_of(base: QuantizedMatrix, order: Tensor, name: str) -> tuple[np.ndarray, GGMLQuantizationType]:
    """Rows of a matrix in `order` as bytes (m × any) of a block format."""
    if base.n % BLOCK:
        raise RankgateError(f"{name} has {base.n} inputs, GGUF has blocks of {BLOCK}; this model has no such file")
    count = base.n // BLOCK
    scale = _of_blocks(base, base.scale[order], count)
    if base.bits == 8:
        if base.zero is not None:
            raise RankgateError(f"{name}: GGUF has no 8 bits with zeros; convert without --asymmetric")
        codes = base.codes[order][:, : base.n].unflatten(-1, (count, BLOCK))
        return _bytes(_half(scale), codes.view(torch.uint8)), GGMLQuantizationType.Q8_0
    codes = unpack_nibbles(base.codes[order])[:, : base.n].unflatten(-1, (count, 2, BLOCK // 2))
    nibbles = codes[..., 0, :] | codes[..., 1, :] << 4
    if base.zero is None:
        return _bytes(_half(scale), nibbles), GGMLQuantizationType.Q4_0
    low = -scale * _of_blocks(base, base.zero[order], count)
    return _bytes(_half(scale), _half(low), nibbles), GGMLQuantizationType.Q4_1


def _of_blocks(base: QuantizedMatrix, groups: Tensor, count: int) -> Tensor:
    """A value for each block, from one for each group."""
    return groups.float().repeat_interleave(base.group_size // BLOCK, -1)[:, :count, None]


def _half(values: Tensor) -> Tensor:
    return values.half().contiguous().view(torch.uint8)


def _bytes(*parts: Tensor) -> np.ndarray:
    whole: np.ndarray = torch.cat(parts, -1).flatten(1).contiguous().numpy()
    return whole


def _open(template: Path) -> GGUFReader:
    try:
        return GGUFReader(template)
    except (OSError, ValueError, IndexError, KeyError) as error:
        raise RankgateError(f"{template} is no GGUF file: {' '.join(str(error).split())[:100]}") from error


def _names(reader: GGUFReader, found: list[Member]) -> dict[str, str]:
    """Names of tensors in a file, by members."""
    wanted = _text(reader, "general.architecture")
    architecture = next((arch for arch, name in gguf.MODEL_ARCH_NAMES.items() if name == wanted), None)
    layers = reader.get_field(f"{wanted}.block_count")
    if architecture is None or layers is None:
        raise RankgateError(f"the template's architecture {wanted!r} is not known to this version of gguf")
    table = gguf.get_tensor_name_map(architecture, int(layers.contents()))
    names = {member.name: table.get_name(member.name) for member in found}
    if missing := [name for name, of_file in names.items() if of_file is None]:
        raise RankgateError(f"GGUF has no name for {missing[0]} in a model of {wanted}")
    return {name: f"{of_file}.weight" for name, of_file in names.items()}


def _orders(m: int, reader: GGUFReader) -> Iterator[Tensor]:
    """Orders in which a file may have m rows: theirs, or both halves of every head in turn."""
    yield torch.arange(m)
    architecture = _text(reader, "general.architecture")
    for key in ("head_count", "head_count_kv"):
        field = reader.get_field(f"{architecture}.attention.{key}")
        heads = 0 if field is None or not isinstance(field.contents(), int) else field.contents()
        if heads and m % (2 * heads) == 0:
            yield torch.arange(m).view(heads, 2, -1).transpose(1, 2).flatten()


def _order(tensor: Any, member: Member, reader: GGUFReader) -> Tensor:
    """Which rows of a member those of the template's tensor are."""
    if tensor is None:
        if member.head:  # tied in the template
            return torch.arange(member.base.m)
        raise RankgateError(f"the template has no {member.name}; give a file of the same model")
    W = member.base.dequantize()
    if tuple(tensor.shape[::-1]) != tuple(W.shape):
        raise RankgateError(f"{member.name} has another shape in the template; give a file of the same model")
    theirs = torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type).astype(np.float32))
    distances = [(float((W[order] - theirs).norm() / theirs.norm()), order) for order in _orders(len(W), reader)]
    distance, order = min(distances, key=lambda pair: pair[0])
    if not distance < FAR:
        raise RankgateError(f"{member.name} is another one in the template; give a file of the same model")
    return order


def _text(reader: GGUFReader, key: str) -> str:
    field = reader.get_field(key)
    if field is None:
        raise RankgateError(f"the template does not say its {key}")
    return str(field.contents())


def _copy_fields(reader: GGUFReader, writer: GGUFWriter, file_type: int) -> None:
    for field in reader.fields.values():
        if field.name.startswith("GGUF.") or field.name in {"general.architecture", "general.file_type"}:
            continue
        kind = field.types[0]
        inner = field.types[-1] if kind == GGUFValueType.ARRAY else None
        writer.add_key_value(field.name, field.contents(), kind, inner)
    writer.add_file_type(file_type)


def _write_adapter(
    found: list[Member], names: dict[str, str], orders: dict[str, Tensor], architecture: str, file: Path
) -> None:
    rank = largest_rank(found)
    writer = GGUFWriter(file, architecture)
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", float(rank))
    for member in found:
        if member.low_rank is not None:
            A, B = factors(member.low_rank, rank)
            writer.add_tensor(f"{names[member.name]}.lora_a", A.numpy())
            writer.add_tensor(f"{names[member.name]}.lora_b", B[orders[member.name]].contiguous().numpy())
    _finish(writer)


def _finish(writer: GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
