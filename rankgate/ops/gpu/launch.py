"""Kernels in CUDA C++: compiled at the first call by NVRTC, which comes with torch, and launched by the driver.

torch launches what it compiles, but not so that a kernel may begin while the one before it ends (`overlap`).
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rankgate.errors import RankgateError
from rankgate.ops.gpu.overlap import capability, overlaps

AMPERE = 8  # compute capability from which there are tensor cores and conversions for bfloat16
PROGRAMMATIC_STREAM_SERIALIZATION = 6  # CU_LAUNCH_ATTRIBUTE_…, whose value is whether


class _Attribute(ctypes.Structure):
    """CUlaunchAttribute."""

    _fields_ = (("id", ctypes.c_int), ("padding", ctypes.c_int), ("value", ctypes.c_int * 16))


class _Config(ctypes.Structure):
    """CUlaunchConfig."""

    _fields_ = (
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(_Attribute)),
        ("count", ctypes.c_uint),
    )


def takes(x: Tensor) -> bool:
    """Whether what is written in CUDA C++ here takes x, by its dtype and device."""
    known = x.dtype in {torch.bfloat16, torch.float16} and hasattr(torch.cuda, "_compile_kernel")
    return known and x.is_cuda and capability(x.device) >= AMPERE


def source(program: str, **values: int) -> str:
    """common.cu and PROGRAM.cu for these values of their macros."""
    lines = [f"#define {macro} {value}\n" for macro, value in values.items()]
    files = [Path(__file__).with_name(f"{name}.cu") for name in ("common", program)]
    return "".join([*lines, *(file.read_text(encoding="utf-8") for file in files)])


@functools.cache
def _compiled(device: int, program: str, name: str, **values: int) -> Any:
    with torch.cuda.device(device):
        return torch.cuda._compile_kernel(source(program, **values), name)


@functools.cache
def _driver() -> ctypes.CDLL:
    return ctypes.CDLL("libcuda.so.1")


@functools.lru_cache(maxsize=4096)
def _configured(grid: tuple[int, int, int], threads: int, stream: int, overlap: bool) -> _Config:
    attribute = _Attribute(PROGRAMMATIC_STREAM_SERIALIZATION, 0, (ctypes.c_int * 16)(1))
    return _Config(grid, (threads, 1, 1), 0, stream, ctypes.pointer(attribute), int(overlap))


def launch(
    program: str,
    name: str,
    values: dict[str, int],
    grid: tuple[int, int, int],
    threads: int,
    arguments: Sequence[Tensor | int],
    device: torch.device,
) -> None:
    """Queue kernel NAME of PROGRAM.cu on the current stream of `device`; OVERLAP is one of its macros.

    Raises RankgateError if the driver refuses.
    """
    overlap = overlaps(device)
    kernel = _compiled(device.index, program, name, **values, OVERLAP=int(overlap))
    count = len(arguments)
    stored = (ctypes.c_int64 * count)(*(a.data_ptr() if isinstance(a, Tensor) else a for a in arguments))
    begin = ctypes.addressof(stored)  # of an int the driver reads the lower half
    addresses = (ctypes.c_void_p * count)(*range(begin, begin + 8 * count, 8))
    config = _configured(grid, threads, torch._C._cuda_getCurrentRawStream(device.index), overlap)
    with torch.cuda.device(device):
        failed = _driver().cuLaunchKernelEx(ctypes.byref(config), kernel.func, addresses, None)
    if failed:
        raise RankgateError(f"the CUDA driver refused to launch a kernel (error {failed} of CUresult)")
