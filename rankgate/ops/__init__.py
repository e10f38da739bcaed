"""Kernels behind one signature each; the choice between them is made here and nowhere else.

A kernel module is imported when it is first needed: `ops.cpu` brings Numba, `ops.quantized_gpu` Triton.
"""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from rankgate.quantized import QuantizedGroup

FEW = 8  # tokens up to which one matrix-vector product each is faster than unpacking the matrix


def has_triton(device: torch.device) -> bool:
    """Whether Triton's kernels run on `device`."""
    return device.type == "cuda" and importlib.util.find_spec("triton") is not None


_library = torch.library.Library("rankgate", "DEF")
_library.define("quantized_gemv(Tensor x, int table, int m) -> Tensor")


def _gemv(x: Tensor, table: int, m: int) -> Tensor:
    from rankgate.ops import cpu

    return cpu.gemv(x, table, m)


def _gemv_gpu(*arguments: Any) -> Tensor:
    from rankgate.ops import quantized_gpu

    return quantized_gpu.gemv(*arguments)


def _attend_at(*arguments: Any) -> Tensor:
    from rankgate.ops import attention_gpu

    return attention_gpu.attend(*arguments)


_library.impl("quantized_gemv", _gemv, "CPU")
_library.impl("quantized_gemv", lambda x, table, m: x.new_empty((*x.shape[:-1], m)), "Meta")
_library.define(
    "quantized_gemv_gpu(Tensor x, Tensor spread, Tensor codes, Tensor scale, Tensor? zero, "
    "Tensor? A, Tensor? B, Tensor? factor, Tensor? plane, Tensor? row, Tensor? column, Tensor? threshold) -> "
    "Tensor"
)
_library.impl("quantized_gemv_gpu", _gemv_gpu, "CUDA")
_library.impl("quantized_gemv_gpu", lambda x, spread, codes, *_: x.new_empty((*x.shape[:-1], len(codes))), "Meta")
_library.define("attend_at(Tensor q, Tensor k, Tensor v, Tensor cache, int layer, Tensor position, float s) -> Tensor")
_library.impl("attend_at", _attend_at, "CUDA")
_library.impl("attend_at", lambda q, k, v, *_: q.new_empty((1, 1, q.shape[1], v.shape[3])), "Meta")


def quantized(group: QuantizedGroup, x: Tensor) -> Tensor:
    """y (…, m) of a quantised input group.

    A few tokens take a kernel that reads packed bytes; more of them share one unpacked matrix.
    """
    y: Tensor
    here = x.device == group.base.codes.device and not group.watched and not x.requires_grad
    few = x.numel() <= FEW * x.shape[-1]
    if here and x.device.type == "cpu":
        from rankgate.ops import cpu

        if few:
            y = torch.ops.rankgate.quantized_gemv(x, group.table(cpu.table_of), group.base.m)
            return y
        return group.reference(x, cpu.dequantize(group.base))
    if here and few and x.dtype != torch.float64 and has_triton(x.device):
        from rankgate.ops import quantized_gpu

        low, fine = group.low_rank, group.refinement
        y = torch.ops.rankgate.quantized_gemv_gpu(
            x,
            quantized_gpu.spread(x, group.base.bits),
            *(group.base.codes, group.base.scale, group.base.zero),
            *((None,) * 3 if low is None else (low.A, low.B, low.scale)),
            *((None,) * 4 if fine is None else (fine.codes, fine.row, fine.column, fine.gate.threshold)),
        )
        return y
    return group.reference(x)
