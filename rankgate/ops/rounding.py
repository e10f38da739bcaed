"""The inner loop of compensated rounding: column by column within a block, each error made up for by later columns."""

from __future__ import annotations

import torch
from torch import Tensor

from rankgate.ops import has_triton


def round_block(rows: Tensor, s: Tensor, z: Tensor, U: Tensor, low: int, high: int) -> tuple[Tensor, Tensor]:
    """Codes and errors (both b × m) of b columns of W, given as rows (b × m, float32, contiguous, overwritten).

    s, z: scale and zero of every weight (b × m). U: their part of the propagation (b × b, upper).
    """
    codes, errors = torch.empty_like(rows), torch.empty_like(rows)
    if rows.device.type == "cpu":
        from rankgate.ops.rounding_cpu import round_block_
    elif has_triton(rows.device):
        from rankgate.ops.rounding_gpu import round_block_
    else:
        round_block_ = round_block_reference
    round_block_(rows, s.contiguous(), z.contiguous(), U.contiguous(), low, high, codes, errors)
    return codes, errors


def round_block_reference(
    rows: Tensor, s: Tensor, z: Tensor, U: Tensor, low: int, high: int, codes: Tensor, errors: Tensor
) -> None:
    """The definition, on any device."""
    for j in range(len(rows)):
        codes[j] = (rows[j] / s[j]).add_(z[j]).round_().clamp_(low, high)
        errors[j] = (codes[j] - z[j]).mul_(s[j]).sub_(rows[j]).div_(-U[j, j])
        rows[j + 1 :].addr_(U[j, j + 1 :], errors[j], alpha=-1)
