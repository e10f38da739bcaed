"""Kernels that start while the one before them ends (programmatic dependent launch, sm_90): their agreement.

The first kernel of an operation calls `begin` before it reads its inputs. What follows it within the operation may
let its successor start at once, and waits before it reads what the kernel before it wrote. So whoever starts finds
everything that was written before the operation in front of it; Inductor's kernels, which wait only for the one
directly before them, rely on that too (`rankgate.decoding.recorded`).
"""

import functools

import torch
import triton
import triton.language as tl

HOPPER = 9  # compute capability from which a kernel can begin before the one before it is through


@functools.cache
def capability(device: torch.device) -> int:
    """The first number of the compute capability of a GPU."""
    return torch.cuda.get_device_capability(device)[0]


def overlaps(device: torch.device) -> bool:
    """Whether a launch of a kernel on `device` can begin before the one before it is through."""
    return device.type == "cuda" and capability(device) >= HOPPER


@triton.jit
def begin(OVERLAP: tl.constexpr) -> None:
    """Wait for the kernel before, and only then let the next one start."""
    if OVERLAP:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
