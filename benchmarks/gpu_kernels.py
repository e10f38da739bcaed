"""Every GPU kernel by itself: correctness, time, bandwidth and speed-up against cuBLAS: results/gpu_kernels_h100.json.

    python benchmarks/gpu_kernels.py

One token (a few rows: 4 and 8), bfloat16 activations, random weights that come from memory and not from a cache. Then
the relative error of every kernel against float64, beside that of torch's products in the same dtype. The file is
written after every shape. Three minutes on an H100.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import torch
from gpu import DEVICE, copy_ceiling, device_name, gated, microseconds, noise, quantized, read_bytes, rotate
from provenance import SEED, write
from torch import Tensor
from torch.nn import functional as F

SQUARE = ((16384, 4096), (4096, 16384), (28672, 8192))  # of the weight-decomposition and subspace papers' models
LLAMA = ((12288, 4096), (4096, 4096), (22016, 4096), (4096, 11008), (960, 576), (3072, 576))  # 7B, SmolLM2-135M
ODD = ((129, 577), (65, 300), (1000, 4096))
K = 256
SVD_THEORY = 2.9  # the rank of `svd` is the one whose bytes are this many times fewer than dense
CLOSED, OPEN = 2.0, 0.0
OPTIONS: dict[str, Any] = {"int4": {}, "int8": {"bits": 8}, "lrq": {"rank": 16, "opened": 0.1}}  # checked


def main() -> None:
    torch.manual_seed(SEED)
    times: list[dict[str, Any]] = []
    errors: list[dict[str, Any]] = []
    with torch.inference_mode():
        settings = {"device": torch.cuda.get_device_name(), "ceiling_tb_s": copy_ceiling(), "dtype": "bfloat16"}
        parts = (times, subspaces, SQUARE), (times, quantised, LLAMA), (errors, correctness, ODD)
        for rows, measure, shapes in parts:
            for m, n in shapes:
                for row in measure(m, n):
                    rows.append(row)
                    print(row, flush=True)
                write(f"gpu_kernels_{device_name()}", settings, [{"errors": errors, "times": times}])


def correctness(m: int, n: int) -> Iterator[dict[str, Any]]:
    """Relative error against float64, beside that of torch on the same weights or factors in the same dtype."""
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        for batch in (1, 3, 8):
            x = noise(batch, n, dtype=dtype)
            case = {"m": m, "n": n, "batch": batch, "dtype": str(dtype).removeprefix("torch.")}
            for name, eps in (("gsi, gate closed", CLOSED), ("gsi, gate open", OPEN)):
                group = gated(m, n, min(m, n) // 2, eps, dtype)
                factors = [group.W] if eps == OPEN else [group.subspace.B, group.A]
                exact = product(x.double(), factors)
                own, plain = error(group(x), exact), error(product(x, factors), exact)
                yield {"method": name, **case, "error": own, "torch": plain}
            for name, options in OPTIONS.items():
                packed = quantized(m, n, **options)
                exact, parts = packed.reference(x.double()), F.linear(x, packed.base.dequantize(dtype))
                if packed.low_rank is not None:
                    parts += F.linear(x, packed.low_rank.dequantize().to(dtype))
                if packed.refinement is not None:
                    parts += packed.refinement(x)
                yield {"method": name, **case, "error": error(packed(x), exact), "torch": error(parts, exact)}


def product(x: Tensor, factors: list[Tensor]) -> Tensor:
    """Through one factor after the other, in the dtype of x."""
    return functools.reduce(lambda y, factor: F.linear(y, factor.to(y.dtype)), factors, x)


def error(y: Tensor, exact: Tensor) -> float:
    return float((y.double() - exact).norm() / exact.norm())


def subspaces(m: int, n: int) -> Iterator[dict[str, Any]]:
    """Dense, gsi with the gate closed and open, and svd, at one shape."""
    x = noise(1, n)
    dense = dense_row(m, n, x)
    yield dense
    rank = round(m * n / (SVD_THEORY * (m + n)) / 64) * 64
    for name, k, eps, fire in (("gsi", K, CLOSED, 0.0), ("gsi", K, OPEN, 1.0), ("svd", rank, None, 0.0)):
        groups = rotate(lambda k=k, eps=eps: gated(m, n, k, eps), 2 * k * (m + n) + fire * 2 * m * n)
        yield measured(name, groups, x, fire, dense, k=k)
        if (m, n) == SQUARE[0]:
            yield from batches(name, groups, fire, k=k)
        del groups


def quantised(m: int, n: int) -> Iterator[dict[str, Any]]:
    """Dense, int8, int4, and lrq without and with a gate, at one shape."""
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
        rank = options.get("rank", 0)
        yield measured(name, groups, x, fire, dense, k=rank)
        if (m, n) == LLAMA[2]:
            yield from batches(name, groups, fire, k=rank)
        del groups


def batches(name: str, groups: list[Any], fire: float, k: int) -> Iterator[dict[str, Any]]:
    """The same for several tokens at once."""
    for batch in (4, 8):
        x = noise(batch, groups[0].n)
        yield measured(name, groups, x, fire, dense_row(groups[0].m, groups[0].n, x), k=k)


def torch_int4(m: int, n: int, x: Tensor, dense: dict[str, Any]) -> dict[str, Any]:
    """What torchao's int4 calls on a GPU, in groups of 64."""
    pack, multiply = torch.ops.aten._convert_weight_to_int4pack, torch.ops.aten._weight_int4pack_mm

    def make() -> tuple[Tensor, Tensor]:
        return pack(torch.randint(0, 256, (m, n // 2), device=DEVICE).to(torch.uint8), 8), noise(n // 64, m, 2)

    weights = rotate(make, m * n / 2)
    us = microseconds([lambda W=W, s=s: multiply(x, W, 64, s) for W, s in weights])  # type: ignore[misc]
    result = row("torch int4", m, n, 0, len(x), 0.0, us, sum(t.nbytes for t in weights[0]))
    return {**result, "speedup": dense["us"] / us, "theory": dense["bytes"] / result["bytes"]}


def dense_row(m: int, n: int, x: Tensor) -> dict[str, Any]:
    weights = rotate(lambda: noise(m, n), 2 * m * n)
    us = microseconds([lambda W=W: F.linear(x, W) for W in weights])  # type: ignore[misc]
    return row("dense", m, n, 0, len(x), 0.0, us, 2 * m * n)


def measured(name: str, groups: list[Any], x: Tensor, fire: float, dense: dict[str, Any], k: int) -> dict[str, Any]:
    """`fire`: the share of tokens, or of a token's channels, whose gate opens; several tokens open others."""
    us = microseconds([lambda group=group: group(x) for group in groups])
    nbytes = read_bytes(groups[0], 1 - (1 - fire) ** len(x))
    result = row(name, groups[0].m, groups[0].n, k, len(x), fire, us, nbytes)
    return {**result, "speedup": dense["us"] / us, "theory": dense["bytes"] / nbytes}


def row(name: str, m: int, n: int, k: int, batch: int, fire: float, us: float, nbytes: float) -> dict[str, Any]:
    return {"method": name, "m": m, "n": n, "k": k, "batch": batch, "fire": fire, "us": us, "bytes": nbytes}


if __name__ == "__main__":
    main()
