"""Kernels behind one signature each; the choice between them is made here and nowhere else.

A kernel module is imported when it is first needed: `ops.cpu` brings Numba, `ops.quantized_gpu` Triton.
"""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from rankgate.core import GatedGroup
    from rankgate.quantized import QuantizedGroup

HOPPER = 9  # compute capability from which a kernel can begin before the one before it is through
FEW = 8  # tokens up to which one matrix-vector product each is faster than unpacking the matrix
TRITON = importlib.util.find_spec("triton") is not None


def has_triton(device: torch.device) -> bool:
    """Whether Triton's kernels run on `device`."""
    return device.type == "cuda" and TRITON


def overlaps(device: torch.device) -> bool:
    """Whether a launch of a kernel on `device` can begin before the one before it is through."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] >= HOPPER


def _gemv(x: Tensor, table: int, m: int) -> Tensor:
    from rankgate.ops import cpu

    return cpu.gemv(x, table, m)


def _gemv_of(x: Tensor, parts: list[Tensor | None]) -> Tensor:
    """The same from `QuantizedGroup.parts`, in a graph: an address would outlive the tensors there."""
    from rankgate.ops import cpu

    table = cpu.table_of(x.shape[-1], parts)
    return cpu.gemv(x, table.ctypes.data, int(table[cpu.M]))


def _gemv_gpu(x: Tensor, parts: list[Any]) -> Tensor:
    from rankgate.ops import quantized_gpu

    return quantized_gpu.gemv(x.reshape(-1, x.shape[-1]), *parts).view(*x.shape[:-1], len(parts[0]))


def _gated(x: Tensor, B: Tensor, A: Tensor, W: Tensor | None, eps: float | None) -> Tensor:
    from rankgate.core import answer, project

    return answer(x, project(x, B, eps), A, W)


def _gated_gpu(x: Tensor, B: Tensor, A: Tensor, W: Tensor | None, eps: float | None) -> Tensor:
    if not _few(x) or x.dtype == torch.float64 or not TRITON:
        return _gated(x, B, A, W, eps)
    from rankgate.ops import gated_gpu

    return gated_gpu.gemv(x, B, A, W, eps)


def _attend_at(*arguments: Any) -> Tensor:
    from rankgate.ops import attention_gpu

    return attention_gpu.attend(*arguments)


def _few(x: Tensor) -> bool:
    return x.numel() <= FEW * x.shape[-1]


_library = torch.library.Library("rankgate", "DEF")
_library.define("quantized_gemv(Tensor x, int table, int m) -> Tensor")
_library.impl("quantized_gemv", _gemv, "CPU")
_library.impl("quantized_gemv", lambda x, table, m: x.new_empty((*x.shape[:-1], m)), "Meta")
_library.define("quantized_gemv.parts(Tensor x, Tensor?[] parts) -> Tensor")
_library.impl("quantized_gemv.parts", _gemv_of, "CPU")
_library.impl("quantized_gemv.parts", _gemv_gpu, "CUDA")
_library.impl("quantized_gemv.parts", lambda x, parts: x.new_empty((*x.shape[:-1], parts[0].shape[0])), "Meta")
_library.define("gated(Tensor x, Tensor B, Tensor A, Tensor? W, float? eps) -> Tensor")
_library.impl("gated", _gated, "CPU")
_library.impl("gated", _gated_gpu, "CUDA")
_library.impl("gated", lambda x, B, A, W, eps: x.new_empty((*x.shape[:-1], A.shape[0])), "Meta")
_library.define("attend_at(Tensor q, Tensor k, Tensor v, Tensor cache, int layer, Tensor position, float s) -> Tensor")
_library.impl("attend_at", _attend_at, "CUDA")
_library.impl("attend_at", lambda q, k, v, *_: q.new_empty((1, *q.shape[2:0:-1], v.shape[3])), "Meta")


def gated(group: GatedGroup, x: Tensor) -> Tensor:
    """y (…, m) of a gated group, or of an ungated one.

    An operator where a graph cannot hold what is done: the branch that a gate is, a kernel.
    """
    plain = group.gate is None and not (x.is_cuda and _few(x))
    if plain or group.watched or x.requires_grad:
        return group.reference(x)
    y: Tensor = torch.ops.rankgate.gated(x, group.subspace.B, group.A, group.W, group.subspace.eps)
    return y


def quantized(group: QuantizedGroup, x: Tensor) -> Tensor:
    """y (…, m) of a quantised input group.

    A few tokens take a kernel that reads packed bytes; more of them share one unpacked matrix.
    """
    y: Tensor
    here = x.device == group.base.codes.device and not group.watched and not x.requires_grad
    few = _few(x)
    if here and x.device.type == "cpu":
        if torch.compiler.is_compiling():
            return torch.ops.rankgate.quantized_gemv.parts(x, group.parts) if few else group.reference(x)
        from rankgate.ops import cpu

        if few:
            y = torch.ops.rankgate.quantized_gemv(x, group.table(cpu.table_of), group.m)
            return y
        return group.reference(x, cpu.dequantize(group.base))
    if here and few and x.dtype != torch.float64 and has_triton(x.device):
        return torch.ops.rankgate.quantized_gemv.parts(x, group.parts)
    return group.reference(x)
