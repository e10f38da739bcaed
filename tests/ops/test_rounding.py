"""Compensated rounding of a block: every kernel, and the definition, against what it is to do."""

from typing import Any

import pytest
import torch

from rankgate.ops import rounding
from rankgate.ops.cpu import rounding as rounding_cpu
from rankgate.ops.gpu import rounding as rounding_gpu

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize(("columns", "rows"), [(1, 1), (64, 130), (7, 65)])
@pytest.mark.parametrize("kernel", [rounding_cpu.round_block, rounding_gpu.round_block, rounding.round_block_reference])
def test_rounding_makes_up_for_errors_in_later_columns(kernel: Any, columns: int, rows: int) -> None:
    generator, place = torch.Generator().manual_seed(0), DEVICE if kernel is rounding_gpu.round_block else "cpu"
    W, scale = torch.randn(columns, rows, generator=generator), torch.rand(columns, rows, generator=generator) + 0.1
    zero = torch.randint(0, 16, (columns, rows), generator=generator).float()
    U = torch.randn(columns, columns, generator=generator).triu() / 8 + torch.eye(columns)
    found = kernel(*(t.to(place) for t in (W.clone(), scale, zero, U)), 0, 15)
    codes, errors = (t.cpu() for t in found)
    left = W.double()
    for j in range(columns):
        wanted = (left[j] / scale[j] + zero[j]).round().clamp(0, 15)
        assert (codes[j] == wanted).float().mean() > 0.98  # float32 may fall on the other side of a half
        error = (left[j] - (codes[j] - zero[j]) * scale[j]) / U[j, j]
        torch.testing.assert_close(errors[j].double(), error, rtol=1e-3, atol=1e-4)
        left[j + 1 :] -= U[j, j + 1 :, None] * error
