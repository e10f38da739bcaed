"""`rounding.round_block` on the CPU (Numba): stripes of rows of W that stay in cache."""

from __future__ import annotations

import numpy as np
import torch
from numba import carray
from torch import Tensor

from rankgate.ops.cpu import team
from rankgate.ops.cpu.compile import Kernel
from rankgate.ops.cpu.vector import float_pointer, read_int64

STRIPE = 64  # rows of W that stay in cache together


@Kernel
def _round_stripe(arguments: int, stripe: int) -> None:
    """Arguments: columns, rows of W, lowest and highest code; addresses of rows, s, z, U, codes and errors."""
    count, m = read_int64(arguments, 0), read_int64(arguments, 8)
    low, high = np.float32(read_int64(arguments, 16)), np.float32(read_int64(arguments, 24))
    rows = carray(float_pointer(read_int64(arguments, 32)), (count, m))
    s = carray(float_pointer(read_int64(arguments, 40)), (count, m))
    z = carray(float_pointer(read_int64(arguments, 48)), (count, m))
    U = carray(float_pointer(read_int64(arguments, 56)), (count, count))
    codes = carray(float_pointer(read_int64(arguments, 64)), (count, m))
    errors = carray(float_pointer(read_int64(arguments, 72)), (count, m))
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
    count, m = rows.shape
    tensors = [rows, *(t.contiguous() for t in (s, z, U)), codes, errors]
    words = np.array([count, m, low, high, *(t.data_ptr() for t in tensors)], np.int64)
    team.run_between(team.program([team.row(_round_stripe, words, -(-m // STRIPE))]))
    return codes, errors
