"""Every GPU kernel by itself: correctness, time, bandwidth and speed-up against cuBLAS: results/gpu_kernels_h100.json.

    python benchmarks/gpu_kernels.py

One token, bfloat16 activations, random weights that come from memory and not from a cache. Two minutes on an H100.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from gpu import copy_ceiling, device_name, gated, microseconds, noise, quantized, read_bytes, rotate
from provenance import SEED, write
from torch import Tensor
from torch.nn import functional as F

from rankgate.core import GatedGroup
from rankgate.quantized import QuantizedGroup

SQUARE = ((16384, 4096), (4096, 16384), (28672, 8192))  # of the weight-decomposition and subspace papers' models
LLAMA = ((12288, 4096), (4096, 4096), (22016, 4096), (4096, 11008), (960, 576), (3072, 576))  # 7B, SmolLM2-135M
ODD = ((129, 577), (65, 300), (1000, 4096))
K = 256
SVD_THEORY = 2.9  # the rank of `svd` is the one whose bytes are this many times fewer than dense
CLOSED, OPEN = 2.0, 0.0


def main() -> None:
    torch.manual_seed(SEED)
    with torch.inference_mode():
        errors = [row for shape in ODD for row in correctness(*shape)]
        ceiling = copy_ceiling()
        times = [row for m, n in SQUARE for row in subspaces(m, n)]
        times += [row for m, n in LLAMA for row in quantised(m, n)]
    settings = {"device": torch.cuda.get_device_name(), "ceiling_tb_s": ceiling, "dtype": "bfloat16"}
    write(f"gpu_kernels_{device_name()}", settings, [{"errors": errors, "times": times}])


def correctness(m: int, n: int) -> Iterator[dict[str, Any]]:
    """Relative error against float64, beside that of torch on the same weights in the same dtype."""
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        for batch in (1, 3, 8):
            x = noise(batch, n, dtype=dtype)
            open_, closed = gated(m, n, min(m, n) // 2, OPEN, dtype), gated(m, n, min(m, n) // 2, CLOSED, dtype)
            assert open_.W is not None
            cases = {
                "gsi, gate open": (open_(x), open_.W.double()),
                "gsi, gate closed": (closed(x), closed.A.double() @ closed.subspace.B.double()),
            }
            for name, group in (("int4", quantized(m, n)), ("int8", quantized(m, n, bits=8))):
                cases[name] = group(x), group.base.dequantize().double()
            for name, (y, W) in cases.items():
                exact = x.double() @ W.T
                row = {"method": name, "m": m, "n": n, "batch": batch, "dtype": str(dtype).removeprefix("torch.")}
                yield {**row, "error": error(y, exact), "torch": error(F.linear(x, W.to(dtype)), exact)}
            group = quantized(m, n, rank=16, opened=0.1)
            exact = group.reference(x.double())
            parts = F.linear(x, group.base.dequantize(dtype)) + group.low_rank(x) + group.refinement(x)  # type: ignore[misc]
            row = {"method": "lrq", "m": m, "n": n, "batch": batch, "dtype": str(dtype).removeprefix("torch.")}
            yield {**row, "error": error(group(x), exact), "torch": error(parts, exact)}


def error(y: Tensor, exact: Tensor) -> float:
    return float((y.double() - exact).norm() / exact.norm())


def subspaces(m: int, n: int) -> Iterator[dict[str, Any]]:
    """Dense, gsi with the gate closed and open, and svd, at one shape."""
    x = noise(1, n)
    dense = dense_row(m, n, x)
    yield dense
    rank = round(m * n / (SVD_THEORY * (m + n)) / 16) * 16
    for name, k, eps, fire in (("gsi", K, CLOSED, 0.0), ("gsi", K, OPEN, 1.0), ("svd", rank, None, 0.0)):
        groups = rotate(lambda k=k, eps=eps: gated(m, n, k, eps), 2 * k * (m + n) + fire * 2 * m * n)
        yield measured(name, groups, x, fire, dense, k=k)
        del groups


def quantised(m: int, n: int) -> Iterator[dict[str, Any]]:
    """Dense, int4, int8, and lrq without and with a gate, at one shape; lrq and int4 at several batches."""
    x = noise(1, n)
    dense = dense_row(m, n, x)
    yield dense
    if n % 128 == 0:
        yield torch_int4(m, n, x, dense)
    for name, options, fire in (
        ("int8", {"bits": 8}, 0.0),
        ("int4", {}, 0.0),
        ("lrq", {"rank": 16}, 0.0),
        ("lrq", {"rank": 16, "opened": 0.05}, 0.05),
        ("lrq", {"rank": 16, "opened": 0.2}, 0.2),
    ):
        groups = rotate(lambda options=options: quantized(m, n, **options), m * n / 2)
        yield measured(name, groups, x, fire, dense)
        if m * n > 1 << 26 and fire in {0.0, 0.05} and name in {"int4", "lrq"}:
            for batch in (4, 8):
                many = noise(batch, n)
                yield measured(name, groups, many, fire, dense_row(m, n, many))


def torch_int4(m: int, n: int, x: Tensor, dense: dict[str, Any]) -> dict[str, Any]:
    """What torchao's int4 calls on a GPU, in groups of 64."""
    pack, multiply = torch.ops.aten._convert_weight_to_int4pack, torch.ops.aten._weight_int4pack_mm

    def make() -> tuple[Tensor, Tensor]:
        return pack(torch.randint(0, 256, (m, n // 2), device="cuda").to(torch.uint8), 8), noise(n // 64, m, 2)

    weights = rotate(make, m * n / 2)
    us = microseconds([lambda W=W, s=s: multiply(x, W, 64, s) for W, s in weights])  # type: ignore[misc]
    result = row("torch int4", m, n, len(x), 0.0, us, sum(t.nbytes for t in weights[0]))
    return {**result, "speedup": dense["us"] / us, "theory": dense["bytes"] / result["bytes"]}


def dense_row(m: int, n: int, x: Tensor) -> dict[str, Any]:
    weights = rotate(lambda: noise(m, n), 2 * m * n)
    us = microseconds([lambda W=W: F.linear(x, W) for W in weights])  # type: ignore[misc]
    return row("dense", m, n, len(x), 0.0, us, 2 * m * n)


def measured(
    name: str,
    groups: list[GatedGroup] | list[QuantizedGroup],
    x: Tensor,
    fire: float,
    dense: dict[str, Any],
    **more: int,
) -> dict[str, Any]:
    us = microseconds([kernel(group, x) for group in groups])
    result = row(name, groups[0].m, groups[0].n, len(x), fire, us, read_bytes(groups[0], fire), **more)
    return {**result, "speedup": dense["us"] / us, "theory": dense["bytes"] / result["bytes"]}


def kernel(group: GatedGroup | QuantizedGroup, x: Tensor) -> Callable[[], object]:
    """The launches of a group, without the last sum: the compiler fuses it with what is done to y."""
    if isinstance(group, GatedGroup):
        return lambda: group(x)
    if group.low_rank is None and group.refinement is None:
        return lambda: torch.ops.rankgate.quantized_gemv.base(x, *group.parts[:3])
    return lambda: torch.ops.rankgate.quantized_gemv.refined(x, group.parts)


def row(name: str, m: int, n: int, batch: int, fire: float, us: float, nbytes: float, **more: int) -> dict[str, Any]:
    return {"method": name, "m": m, "n": n, "batch": batch, "fire": fire, "us": us, "bytes": nbytes, **more}


if __name__ == "__main__":
    main()
