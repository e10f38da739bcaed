"""The backend of NVIDIA GPUs (Triton). Without Triton everything there is computed as it is defined."""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
from torch import Tensor

from rankgate.core import gated as gated_definition
from rankgate.errors import RankgateError
from rankgate.ops.register import register
from rankgate.ops.rounding import round_block_reference
from rankgate.quantized import linear as linear_definition

TRITON = importlib.util.find_spec("triton") is not None


def has_triton(device: torch.device) -> bool:
    """Whether Triton's kernels run on `device`."""
    return device.type == "cuda" and TRITON


def takes(x: Tensor, *_: Any) -> bool:
    """Whether the kernels take x (…, n)."""
    return TRITON and x.dtype != torch.float64


def _no_kernel(x: Tensor, *_: Any) -> Tensor:
    """Raises RankgateError: what an address stands for only a kernel knows."""
    raise RankgateError(f"chosen experts are multiplied on a GPU by Triton, and not in {x.dtype}")


register("gated", "CUDA", "rankgate.ops.gpu.gathered.linear", takes=takes, definition=gated_definition)
register("quantized_linear.parts", "CUDA", "rankgate.ops.gpu.linear.linear", takes=takes, definition=linear_definition)
register("chosen_linear.parts", "CUDA", "rankgate.ops.gpu.chosen.linear", takes=takes, definition=_no_kernel)
register("attend_at", "CUDA", "rankgate.ops.gpu.attention.attend")
register("attend_held_at", "CUDA", "rankgate.ops.gpu.attention.attend_held")
register(
    *("round_block", "CUDA", "rankgate.ops.gpu.rounding.round_block"),
    takes=lambda *_: TRITON,
    definition=round_block_reference,
)
