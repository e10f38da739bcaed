"""How members of a group lie on disk: each under its own name, whatever layout kernels want (format 5).

    weight_packed        int32 (m, words): codes of Q, the first in the lowest bits; 8-bit codes + 128
    weight_scale         bfloat16 (m, groups of 64 or 32 inputs)
    weight_zero_point    int8 (m, groups), if asymmetric
    low_rank_A           int8 (m, r);  low_rank_B int8 (r, n), low_rank_scale float32 (r,)
    refinement_packed    int32 (m, words): 4-bit codes of E;  refinement_row bfloat16 (m,)
    refinement_column    bfloat16 (n,);  refinement_threshold bfloat16 (n,)
    A, W                 of a subspace (m, k) and (m, n);  B (k, n)
    bias                 (m,)

Rows are padded to whole blocks of 64 values. Names and packing of Q are those of compressed-tensors. What all members
of a quantised group share (low_rank_B, low_rank_scale, column, threshold) is small and lies with each, which is then
whole without the others; B of a subspace lies with the first, whose rows begin the group.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from rankgate.common.files import in_file
from rankgate.core import GatedGroup, GroupedLinear, LinearGroup, Subspace, frozen
from rankgate.errors import RankgateError
from rankgate.quantized import (
    GROUP,
    LowRank,
    QuantizedGroup,
    QuantizedHead,
    QuantizedMatrix,
    Refinement,
    pack_nibbles,
    pad_to_group,
    unpack_nibbles,
)

IN_MEMORY = 1 << 30  # bytes of converted groups; what is packed of more of them lies in files


class StoredLinear(nn.Module):
    """A member of a group between reading its tensors and `fuse`."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        super().__init__()
        for name, tensor in tensors.items():
            self.register_parameter(name, frozen(tensor))


def pack(codes: Tensor, bits: int) -> Tensor:
    """Codes of `QuantizedMatrix.codes`' meaning, one to a byte (rows × multiple of 64), as int32 (rows × words)."""
    if bits == 8:
        return (codes.view(torch.uint8) ^ 128).contiguous().view(torch.int32)
    even, odd = codes[:, ::2], codes[:, 1::2]
    return (even | odd << 4).contiguous().view(torch.int32)


def unpack(words: Tensor, bits: int) -> Tensor:
    """Undo `pack`: int8 at 8 bits, uint8 at 4."""
    stored = words.contiguous().view(torch.uint8)
    if bits == 8:
        return (stored ^ 128).view(torch.int8)
    return torch.stack([stored & 15, stored >> 4], -1).flatten(-2)


def packed_codes(base: QuantizedMatrix) -> Tensor:
    """`weight_packed` of a matrix."""
    return pack(unpack_nibbles(base.codes) if base.bits == 4 else base.codes, base.bits)


def tensors_of(grouped: dict[str, GroupedLinear]) -> dict[str, Tensor]:
    """What is stored of the members of groups, by name of the tensor. Above 1 GiB, packed codes lie in files."""
    large = sum(p.nbytes for group in {layer.group for layer in grouped.values()} for p in group.parameters())
    planes: dict[LinearGroup, Tensor] = {}  # of the last group only: its codes of E, one to a byte
    found: dict[str, Tensor] = {}
    for name, layer in grouped.items():
        group, rows = layer.group, slice(layer.start, layer.stop)
        if isinstance(group, QuantizedGroup):
            if group.refinement is not None and group not in planes:
                planes = {group: pad_to_group(group.refinement.unpack())}
            tensors = _quantized(group, rows, planes.get(group), large > IN_MEMORY)
        else:
            assert isinstance(group, GatedGroup)
            tensors = {"A": group.A[rows], "W": None if group.W is None else group.W[rows]}
            tensors["B"] = group.subspace.B if layer.start == 0 else None
        tensors["bias"] = layer.bias
        found |= {f"{name}.{key}": tensor.detach() for key, tensor in tensors.items() if tensor is not None}
    return found


def _quantized(group: QuantizedGroup, rows: slice, plane: Tensor | None, large: bool) -> dict[str, Tensor | None]:
    base, low, fine = group.base.rows(rows), group.low_rank, group.refinement
    tensors = {
        "weight_packed": _held(packed_codes(base), large),
        "weight_scale": base.scale,
        "weight_zero_point": base.zero,
    }
    if low is not None:
        tensors |= {"low_rank_A": low.A[rows], "low_rank_B": low.B.clone(), "low_rank_scale": low.scale.clone()}
    if fine is not None and plane is not None:
        tensors |= {"refinement_packed": _held(pack(plane[rows], 4), large), "refinement_row": fine.row[rows]}
        tensors |= {"refinement_column": fine.column.clone(), "refinement_threshold": fine.gate.threshold.clone()}
    return tensors


def _held(tensor: Tensor, in_files: bool) -> Tensor:
    return in_file(tuple(tensor.shape), tensor.dtype).copy_(tensor) if in_files else tensor


def empty(spec: dict[str, Any], dtype: torch.dtype) -> StoredLinear:
    """A member as `layout.describe` describes it, its tensors not filled in. dtype: of what is not quantised."""
    tensors = {
        name: torch.empty(s, dtype=kind) for name, (kind, s) in shapes(spec, spec["m"], spec["n"], dtype).items()
    }
    if spec["kind"] == GatedGroup.__name__ and spec["start"] > 0:
        del tensors["B"]
    if spec["bias"]:
        tensors["bias"] = torch.empty(spec["m"], dtype=dtype)
    return StoredLinear(tensors)


def shapes(spec: dict[str, Any], m: int, n: int, dtype: torch.dtype) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """What is stored of m rows and n columns, but for the bias: dtype and shape."""
    rank = spec["rank"]
    if spec["kind"] == GatedGroup.__name__:
        gated = {"W": (dtype, (m, n))} if spec["eps"] is not None else {}
        return {"A": (dtype, (m, rank)), "B": (dtype, (rank, n)), **gated}
    blocks = -(-n // GROUP)
    groups = blocks * GROUP // spec.get("group_size", GROUP)  # which models stored before there was a choice lack
    found: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {
        "weight_packed": (torch.int32, (m, blocks * GROUP * spec["bits"] // 32)),
        "weight_scale": (torch.bfloat16, (m, groups)),
    }
    if not spec["symmetric"]:
        found["weight_zero_point"] = torch.int8, (m, groups)
    if rank:
        found |= {"low_rank_A": (torch.int8, (m, rank)), "low_rank_B": (torch.int8, (rank, n))}
        found["low_rank_scale"] = torch.float32, (rank,)
    if spec["refined"]:
        found |= {
            "refinement_packed": (torch.int32, (m, blocks * GROUP // 8)),
            "refinement_row": (torch.bfloat16, (m,)),
        }
        found |= dict.fromkeys(("refinement_column", "refinement_threshold"), (torch.bfloat16, (n,)))
    return found


def fuse(model: PreTrainedModel, modules: list[dict[str, Any]], dtype: torch.dtype) -> None:
    """Put groups in place of `StoredLinear`s, in place, as `layout.describe` describes them.

    Raises RankgateError if members of a group are missing.
    """
    groups: dict[int, list[dict[str, Any]]] = {}
    for spec in modules:
        if isinstance(model.get_submodule(spec["name"]), StoredLinear):
            groups.setdefault(spec["shared"], []).append(spec)
    for specs in groups.values():
        specs.sort(key=lambda spec: spec["start"])
        ends = [0, *(spec["start"] + spec["m"] for spec in specs)]
        if [spec["start"] for spec in specs] != ends[:-1] or ends[-1] != specs[0]["rows"]:
            raise RankgateError(
                f"the model is damaged, convert it again: {specs[0]['name']} lacks members of its group"
            )
        members = [dict(model.get_submodule(spec["name"]).named_parameters()) for spec in specs]
        group = build(specs[0], members)
        for spec, member in zip(specs, members, strict=True):
            bias = member.get("bias")
            rows = spec["start"], spec["start"] + spec["m"]
            head = spec["head"] and isinstance(group, QuantizedGroup)
            made = QuantizedHead(group, bias, dtype) if head else GroupedLinear(group, *rows, bias)  # type: ignore[arg-type]
            model.set_submodule(spec["name"], made)


def build(spec: dict[str, Any], members: list[dict[str, Any]]) -> LinearGroup:
    """The group of stored members, in the order of their rows. spec: of the first, see `layout.describe`."""
    n, first = spec["n"], members[0]

    def joined(name: str) -> Tensor:
        return torch.cat([member[name].detach() for member in members])

    if spec["kind"] == GatedGroup.__name__:
        W = None if spec["eps"] is None else joined("W")
        return GatedGroup(Subspace(first["B"], spec["eps"]), joined("A"), W)
    codes = unpack(joined("weight_packed"), spec["bits"])
    zero = None if spec["symmetric"] else joined("weight_zero_point")
    stored = pack_nibbles(codes) if spec["bits"] == 4 else codes
    base = QuantizedMatrix(n, stored, joined("weight_scale"), zero)
    low_rank = refinement = None
    if spec["rank"]:
        low_rank = LowRank(joined("low_rank_A"), first["low_rank_B"], first["low_rank_scale"])
    if spec["refined"]:
        plane = unpack(joined("refinement_packed"), 4)[:, :n]
        vectors = joined("refinement_row"), first["refinement_column"], first["refinement_threshold"]
        refinement = Refinement.pack(plane, *vectors)
    return QuantizedGroup(base, low_rank, refinement)
