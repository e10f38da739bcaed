"""Every GPU kernel by itself: correctness, time, bandwidth and speed-up against cuBLAS: results/gpu_kernels/h100.json.

    python benchmarks/gpu_kernels.py

One token, and up to 256 together, bfloat16 activations, random weights that come from memory and not from a cache. Then
the relative error of every kernel against float64, beside that of torch's products in the same dtype. The file is
written after every shape. Four minutes on an H100.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from frame import Columns, Content, Row, card, device_name, parser, source, start, table, write
from gpu import DEVICE, K, copy_ceiling, gated, microseconds, noise, quantized, read_bytes, rotate, svd_rank
from matplotlib.figure import Figure
from torch import Tensor
from torch.nn import functional as F

Calls = Sequence[Callable[[], object]]

SQUARE = ((16384, 4096), (4096, 16384), (28672, 8192))  # of the weight-decomposition and subspace papers' models
LLAMA = ((6144, 4096), (4096, 4096), (22016, 4096), (4096, 11008), (960, 576), (3072, 576))  # 7B, SmolLM2-135M
SEVERAL = (1, 2, 4, 8, 16, 32, 64, 128, 256)  # tokens
LARGE = 1 << 23  # weights of a matrix that several tokens are measured with
ODD = ((129, 577), (65, 300), (1000, 4096))
CLOSED, OPEN = 2.0, 0.0
OPTIONS: dict[str, Any] = {"int4": {}, "int8": {"bits": 8}, "lrq": {"rank": 16, "opened": 0.1}}  # checked
OPENED, USUAL = (0.0, 0.05, 0.2), 0.05  # by lrq
COLORS = {"dense": "C7", "gsi": "C0", "svd": "C1", "int4": "C2", "int8": "C4", "lrq": "C3", "torch int4": "C5"}


def main() -> None:
    start(parser(__doc__))
    times: list[Row] = []
    errors: list[Row] = []
    with torch.inference_mode():
        settings = {"device": card(), "ceiling_tb_s": copy_ceiling(), "dtype": "bfloat16"}
        parts = (times, subspaces, SQUARE), (times, quantised, LLAMA), (errors, correctness, ODD)
        for rows, measure, shapes in parts:
            for m, n in shapes:
                for row in measure(m, n):
                    rows.append(row)
                    print(row, flush=True)
                write(f"gpu_kernels/{device_name()}", settings, [{"errors": errors, "times": times}])


def correctness(m: int, n: int) -> Iterator[Row]:
    """Relative error against float64, beside that of torch on the same weights or factors in the same dtype."""
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        for batch in (1, 3, 17, 64):
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


def subspaces(m: int, n: int) -> Iterator[Row]:
    """Dense, gsi with the gate closed and open, and svd, at one shape."""
    dense = dense_rows(m, n, (1, 4, 8, 64) if (m, n) == SQUARE[0] else (1,))
    yield from dense.values()
    for name, k, eps, fire in (("gsi", K, CLOSED, 0.0), ("gsi", K, OPEN, 1.0), ("svd", svd_rank(m, n), None, 0.0)):
        groups = rotate(functools.partial(gated, m, n, k, eps), 2 * k * (m + n) + fire * 2 * m * n)
        for tokens, row in dense.items():
            yield measured(name, groups, noise(tokens, n), fire, row, k)
        del groups


def quantised(m: int, n: int) -> Iterator[Row]:
    """Dense, int8, int4, and lrq without and with a gate, at one shape."""
    dense = dense_rows(m, n, SEVERAL if m * n >= LARGE else (1,))
    yield from dense.values()
    if n % 128 == 0:
        yield from torch_int4(m, n, dense)
    for name, options in (("int8", {"bits": 8}), ("int4", {}), *(("lrq", {"rank": 16, "opened": s}) for s in OPENED)):
        groups = rotate(functools.partial(quantized, m, n, **options), m * n / 2)
        k, fire = options.get("rank", 0), options.get("opened", 0.0)
        for tokens, row in dense.items():
            if tokens == 1 or fire in (0.0, USUAL):
                yield measured(name, groups, noise(tokens, n), fire, row, k)
        del groups


def torch_int4(m: int, n: int, dense: dict[int, Row]) -> Iterator[Row]:
    """What torchao's int4 calls on a GPU, in groups of 64."""
    pack, multiply = torch.ops.aten._convert_weight_to_int4pack, torch.ops.aten._weight_int4pack_mm

    def make() -> tuple[Tensor, Tensor]:
        return pack(torch.randint(0, 256, (m, n // 2), device=DEVICE).to(torch.uint8), 8), noise(n // 64, m, 2)

    weights = rotate(make, m * n / 2)
    for tokens, of_dense in dense.items():
        x = noise(tokens, n)
        calls = [functools.partial(multiply, x, W, 64, scales) for W, scales in weights]
        yield against(of_dense, row("torch int4", m, x, calls, sum(t.nbytes for t in weights[0])))


def dense_rows(m: int, n: int, tokens: Sequence[int]) -> dict[int, Row]:
    """By the number of tokens."""
    weights = rotate(lambda: noise(m, n), 2 * m * n)
    rows = {}
    for count in tokens:
        x = noise(count, n)
        rows[count] = row("dense", m, x, [functools.partial(F.linear, x, W) for W in weights], 2 * m * n)
    return rows


def measured(name: str, groups: list[Any], x: Tensor, fire: float, dense: Row, k: int) -> Row:
    """`fire`: the share of tokens, or of a token's channels, whose gate opens; several tokens open others."""
    calls = [functools.partial(group, x) for group in groups]
    nbytes = read_bytes(groups[0], 1 - (1 - fire) ** len(x))
    return against(dense, row(name, groups[0].m, x, calls, nbytes, k, fire))


def row(name: str, m: int, x: Tensor, calls: Calls, nbytes: float, k: int = 0, fire: float = 0.0) -> Row:
    """Of products of x (batch × n) with m × n weights, of which a call reads `nbytes`."""
    case = {"method": name, "m": m, "n": x.shape[1], "k": k, "batch": len(x), "fire": fire}
    return {**case, "us": microseconds(calls), "bytes": nbytes}


def against(dense: Row, r: Row) -> Row:
    return {**r, "speedup": dense["us"] / r["us"], "theory": dense["bytes"] / r["bytes"]}


def bandwidth(r: Row) -> float:
    """TB/s."""
    return float(r["bytes"] / r["us"] / 1e6)


KERNELS: Columns = {
    "method": lambda r: r["method"],
    "m × n": lambda r: f"{r['m']} × {r['n']}",
    "k": lambda r: f"{r['k'] or '-'}",
    "open": lambda r: f"{r['fire']:.0%}" if r["method"] == "gsi" or r["fire"] else "-",
    "µs": lambda r: f"{r['us']:.1f}",
    "MB": lambda r: f"{r['bytes'] / 1e6:.2f}",
    "TB/s": lambda r: f"{bandwidth(r):.2f}",
    "of a copy": lambda r: f"{bandwidth(r) / r['ceiling']:.0%}",
    "x F.linear": lambda r: f"{r['speedup']:.2f}",
    "x by bytes": lambda r: f"{r['theory']:.2f}",
    "reached": lambda r: f"{r['speedup'] / r['theory']:.0%}",
}
ERRORS: Columns = {
    "method": lambda r: r["method"],
    "dtype": lambda r: r["dtype"],
    "largest error": lambda r: f"{r['error']:.1e}",
    "torch's": lambda r: f"{r['torch']:.1e}",
    "largest ratio": lambda r: f"{r['ratio']:.2f}",
}


def section(content: Content) -> str:
    settings, (result,) = content["settings"], content["results"]
    ceiling = settings["ceiling_tb_s"]
    rows = [{"ceiling": ceiling, "speedup": 1.0, "theory": 1.0, **r} for r in result["times"]]
    alone = [r for r in rows if r["batch"] == 1]
    return f"""## GPU kernels ({settings["device"]})

One call by itself, {settings["dtype"]} activations, random weights that come from memory: calls on different weights
in one CUDA graph, the median of its replays. *open*: share of tokens (gsi) or channels (lrq) whose gate opens. *MB*:
bytes of weights that must be read, as stored; *TB/s*: these over the time; *of a copy*: of the {ceiling:.2f} TB/s that
a copy on the device moves, reads and writes counted. *x F.linear*: the time of cuBLAS in the same run over this one;
*x by bytes*: bytes of the dense weights over bytes read, and the share of that which is *reached*. {source(content)}

{table(alone, KERNELS)}

Several tokens at once: how many times as fast as cuBLAS with as many.

{several(rows)}
{accuracy(result["errors"])}"""


def several(rows: list[Row]) -> str:
    """A line for each kernel and shape that was measured so, a column for each number of tokens."""
    lines: dict[tuple[str, str], Row] = {}
    for r in rows:
        lines.setdefault((case(r), f"{r['m']} × {r['n']}"), {})[r["batch"]] = f"{r['speedup']:.2f}"
    shown = {key: line for key, line in lines.items() if len(line) > 1 and key[0] != "dense"}
    counts = sorted({tokens for line in shown.values() for tokens in line})
    columns: Columns = {"method": lambda r: r["case"], "m × n": lambda r: r["shape"]}
    columns |= {f"{count}": functools.partial(_cell, count) for count in counts}
    return table([{"case": name, "shape": shape, **line} for (name, shape), line in shown.items()], columns)


def _cell(count: int, line: Row) -> str:
    return str(line.get(count, "-"))


def accuracy(errors: list[Row]) -> str:
    """Nothing if the run ended before it got there."""
    if not errors:
        return ""
    *few, most = map(str, sorted({r["batch"] for r in errors}))
    cases: dict[tuple[str, str], list[Row]] = {}
    for r in errors:
        cases.setdefault((r["method"], r["dtype"]), []).append(r)
    worst = [
        {**max(found, key=lambda r: r["error"]), "ratio": max(r["error"] / r["torch"] for r in found)}
        for found in cases.values()
    ]
    return f"""
Relative error against float64 over odd shapes and batches of {", ".join(few)} and {most}: the largest, torch's in that
case from dequantised weights in the same dtype, and the largest ratio of the two.

{table(worst, ERRORS)}
"""


def plot(contents: Sequence[Content]) -> Figure:
    """Bandwidth against bytes read, one token, for each device: one wants to be high, under the line of a copy."""
    figure = Figure(figsize=(9, 4.2 * len(contents)), layout="constrained")
    for axes, content in zip(figure.subplots(len(contents), squeeze=False).flat, contents, strict=True):
        ceiling = content["settings"]["ceiling_tb_s"]
        rows = [r for r in content["results"][0]["times"] if r["batch"] == 1]
        for name in dict.fromkeys(map(case, rows)):
            points = [r for r in rows if case(r) == name]
            color = COLORS[points[0]["method"]]
            inside = "none" if points[0]["fire"] else color
            x, y = [r["bytes"] / 1e6 for r in points], [bandwidth(r) for r in points]
            marker = "s" if points[0]["fire"] == 0.2 else "o"
            axes.scatter(x, y, facecolors=inside, edgecolors=color, marker=marker, zorder=3, label=name)
        axes.axhline(ceiling, color="0.6", linewidth=0.8)
        at = {"xycoords": ("axes fraction", "data"), "xytext": (3, 3), "textcoords": "offset points"}
        axes.annotate("a copy", (0, ceiling), **at)
        axes.set(title=content["settings"]["device"], xlabel="MB of weights read by a call", ylabel="TB/s")
        axes.set(xscale="log", ylim=(0, 1.05 * max(ceiling, *map(bandwidth, rows))))
        axes.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    return figure


def case(r: Row) -> str:
    if r["method"] == "gsi":
        return f"gsi, gate {'open' if r['fire'] else 'closed'}"
    return f"{r['method']}, {r['fire']:.0%} open" if r["fire"] else str(r["method"])


if __name__ == "__main__":
    main()
