"""The inner loop of compensated rounding: column by column within a block, each error made up for by later columns."""

from __future__ import annotations

import torch
from torch import Tensor

from rankgate.core import operators


def round_block_reference(rows: Tensor, s: Tensor, z: Tensor, U: Tensor, low: int, high: int) -> tuple[Tensor, Tensor]:
    """The definition: codes and errors (both b × m) of b columns of W, given as rows (b × m, float32, overwritten).

    s, z: scale and zero of every weight (b × m). U: their part of the propagation (b × b, upper). All are contiguous.
    """
    codes, errors = torch.empty_like(rows), torch.empty_like(rows)
    for j in range(len(rows)):
        codes[j] = (rows[j] / s[j]).add_(z[j]).round_().clamp_(low, high)
        errors[j] = (codes[j] - z[j]).mul_(s[j]).sub_(rows[j]).div_(-U[j, j])
        rows[j + 1 :].addr_(U[j, j + 1 :], errors[j], alpha=-1)
    return codes, errors


operators.define(
    "round_block(Tensor(a!) rows, Tensor s, Tensor z, Tensor U, int low, int high) -> (Tensor codes, Tensor errors)"
)
operators.impl("round_block", round_block_reference, "CompositeExplicitAutograd")


def round_block(rows: Tensor, s: Tensor, z: Tensor, U: Tensor, low: int, high: int) -> tuple[Tensor, Tensor]:
    """`round_block_reference` on the device of `rows`, which are contiguous."""
    codes, errors = torch.ops.rankgate.round_block(rows, s.contiguous(), z.contiguous(), U.contiguous(), low, high)
    return codes, errors
