"""A quantised input group on tensor cores, for 2 to 64 tokens: the contract of `QuantizedGroup.reference`.

Triton does not let one choose how a factor of a product lies in registers, and moving codes from one layout to another
costs more than reading them. So this kernel is CUDA C++ (`fragments.cu`), which NVRTC compiles at the first call, a
second for each shape of a block; both come with torch. Weights are rounded to 16 bits as in torch's products, sums are
float32. What low rank and refinement add is computed before, see `refined`.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor

from rankgate.ops.gpu import refined
from rankgate.ops.gpu.quantized import padded

LARGEST = 64  # tokens at once
AMPERE = 8  # compute capability from which tensor cores take bfloat16
SOURCE = Path(__file__).with_suffix(".cu")


def takes(x: Tensor) -> bool:
    """Whether the kernel takes x (tokens, n)."""
    known = x.dtype in {torch.bfloat16, torch.float16} and hasattr(torch.cuda, "_compile_kernel")
    return known and len(x) <= LARGEST and torch.cuda.get_device_capability(x.device)[0] >= AMPERE


def shape(tokens: int, m: int) -> dict[str, int]:
    """Of a block, as `fragments.cu` defines it: the fastest on an H100, where small matrices need many blocks."""
    columns = min(4, triton.next_power_of_2(triton.cdiv(tokens, 8)))
    large = m >= 1 << 14
    if columns == 4:
        tiles, warps = (4, 4) if large else (2, 4 if tokens > 32 else 8)
    else:
        tiles, warps = 2 if large or columns == 2 else 1, 8
    return {"TILES": tiles, "WARPS": warps, "COLUMNS": columns}


def source(**values: int) -> str:
    """The program for these values of its macros."""
    lines = [f"#define {name} {value}\n" for name, value in values.items()]
    return "".join(lines) + SOURCE.read_text(encoding="utf-8")


@functools.cache
def _compiled(device: int, **values: int) -> Any:
    with torch.cuda.device(device):
        return torch.cuda._compile_kernel(source(**values), "fragments")


def multiply(x: Tensor, parts: list[Any]) -> Tensor:
    """y (tokens, m) from tokens that the kernel `takes` (tokens, n), and `QuantizedGroup.parts`."""
    codes, scale, zero, *added = parts
    (m, blocks), tokens, block = scale.shape, len(x), shape(len(x), len(scale))
    bits, half = 4 if codes.dtype == torch.uint8 else 8, x.dtype == torch.float16
    values = {**block, "BITS": bits, "ZERO": int(zero is not None), "HALF": int(half)}
    extra = refined.added(x, m, *added)
    whole, y = padded(x), x.new_empty((tokens, m))
    with torch.cuda.device(x.device):
        _compiled(x.device.index, **values)(
            grid=(triton.cdiv(tokens, 8 * block["COLUMNS"]), triton.cdiv(m, 16 * block["TILES"]), 1),
            block=(32 * block["WARPS"], 1, 1),
            args=[
                *(whole, y, codes, scale, scale if zero is None else zero, y if extra is None else extra),
                *(tokens, m, blocks, 0 if extra is None else len(extra)),
            ],
        )
    return y
