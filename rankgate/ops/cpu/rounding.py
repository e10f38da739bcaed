"""`rounding.round_block` on the CPU (Numba): stripes of rows of W that stay in cache."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numba import njit, prange
from torch import Tensor

STRIPE = 64  # rows of W that stay in cache together


@njit(cache=True, nogil=True, parallel=True)
def _round_block(rows: Any, s: Any, z: Any, U: Any, low: float, high: float, codes: Any, errors: Any) -> None:
    count, m = rows.shape
    for stripe in prange((m + STRIPE - 1) // STRIPE):
        start, stop = stripe * STRIPE, min((stripe + 1) * STRIPE, m)
        for j in range(count):
            inverse = np.float32(1) / U[j, j]
            for r in range(start, stop):
                code = min(max(np.rint(rows[j, r] / s[j, r] + z[j, r]), low), high)
                codes[j, r] = code
                errors[j, r] = (rows[j, r] - (code - z[j, r]) * s[j, r]) * inverse
            for later in range(j + 1, count):
                u = U[j, later]
                for r in range(start, stop):
                    rows[later, r] -= u * errors[j, r]


def round_block(rows: Tensor, s: Tensor, z: Tensor, U: Tensor, low: int, high: int) -> tuple[Tensor, Tensor]:
    """See `ops.rounding`."""
    codes, errors = torch.empty_like(rows), torch.empty_like(rows)
    arrays = (t.numpy() for t in (rows, s, z, U))
    _round_block(*arrays, np.float32(low), np.float32(high), codes.numpy(), errors.numpy())
    return codes, errors
