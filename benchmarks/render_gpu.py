"""The sections of docs/results.md about GPUs, and the roofline; `render` calls these where there are results."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from matplotlib.figure import Figure

from rankgate.reporting.tables import describe, markdown

KERNELS = (
    "method",
    "m × n",
    "k",
    "open",
    "batch",
    "µs",
    "MB",
    "TB/s",
    "of a copy",
    "x F.linear",
    "x by bytes",
    "reached",
)
ERRORS = ("method", "dtype", "largest error", "torch's", "largest ratio")
DECODING = (
    *("method, loop", "open", "ms/token", "tokens/s", "graph, ms", "GB/token", "TB/s", "of a copy"),
    *("x engine", "x generate", "peak GB"),
)
MODELS = {"llama": "Llama-7B", "gptj": "GPT-J-6B", "opt": "OPT-6.7B", "smollm2": "SmolLM2-135M"}
COLORS = {"dense": "C7", "gsi": "C0", "svd": "C1", "int4": "C2", "int8": "C4", "lrq": "C3", "torch int4": "C5"}


def kernels(content: dict[str, Any], source: str) -> str:
    settings, (result,) = content["settings"], content["results"]
    ceiling = settings["ceiling_tb_s"]
    rows = [kernel_row(r, ceiling) for r in result["times"]]
    return f"""## GPU kernels ({settings["device"]})

One call by itself, {settings["dtype"]} activations, random weights that come from memory: calls on different weights
in one CUDA graph, the median of its replays. *open*: share of tokens (gsi) or channels (lrq) whose gate opens. *MB*:
bytes of weights that must be read, as stored; *TB/s*: these over the time; *of a copy*: of the {ceiling:.2f} TB/s that
a copy on the device moves, reads and writes counted. *x F.linear*: the time of cuBLAS in the same run over this one;
*x by bytes*: bytes of the dense weights over bytes read, and the share of that which is *reached*. {source}

{markdown(KERNELS, rows)}
{accuracy(result["errors"])}"""


def accuracy(errors: list[dict[str, Any]]) -> str:
    """Nothing if the run ended before it got there."""
    if not errors:
        return ""
    *few, most = map(str, sorted({r["batch"] for r in errors}))
    return f"""
Relative error against float64 over odd shapes and batches of {", ".join(few)} and {most}: the largest, torch's in that
case from dequantised weights in the same dtype, and the largest ratio of the two.

{markdown(ERRORS, error_rows(errors))}
"""


def kernel_row(r: dict[str, Any], ceiling: float) -> tuple[str, ...]:
    speed = bandwidth(r)
    speedup, theory = r.get("speedup", 1.0), r.get("theory", 1.0)
    return (
        r["method"],
        f"{r['m']} × {r['n']}",
        f"{r['k']}" if r["k"] else "-",
        f"{r['fire']:.0%}" if has_gate(r) else "-",
        f"{r['batch']}",
        f"{r['us']:.1f}",
        f"{r['bytes'] / 1e6:.2f}",
        f"{speed:.2f}",
        f"{speed / ceiling:.0%}",
        f"{speedup:.2f}",
        f"{theory:.2f}",
        f"{speedup / theory:.0%}",
    )


def has_gate(r: dict[str, Any]) -> bool:
    return bool(r["method"] == "gsi" or r["fire"])


def bandwidth(r: dict[str, Any]) -> float:
    """TB/s."""
    return float(r["bytes"] / r["us"] / 1e6)


def error_rows(errors: list[dict[str, Any]]) -> list[tuple[str, ...]]:
    cases: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for r in errors:
        cases.setdefault((r["method"], r["dtype"]), []).append(r)
    rows = []
    for (method, dtype), found in cases.items():
        worst, ratio = max(found, key=lambda r: r["error"]), max(r["error"] / r["torch"] for r in found)
        rows.append((method, dtype, f"{worst['error']:.1e}", f"{worst['torch']:.1e}", f"{ratio:.2f}"))
    return rows


def decoding(content: dict[str, Any], source: str) -> str:
    settings, results = content["settings"], content["results"]
    few, many = settings["new"]
    compared = any(r["method"].startswith("torchao") for r in results)
    torchao = "" if compared else "torchao was not at hand there, so it is not compared with. "
    by_model = {name: [r for r in results if r["model"] == name] for name in MODELS}
    sections = "\n\n".join(model_section(name, rows) for name, rows in by_model.items() if rows)
    return f"""## GPU decoding ({settings["device"]})

Batch 1, end to end: a prompt of {settings["prompt"]} tokens and {many} new ones less the same with {few}, the median
of three; *graph*: the replay of a step's CUDA graph alone. *generate* is transformers' loop, *engine* ours. *open*:
share of gates that open, as set, and as measured on the text that the model wrote. *GB/token*: weights read, modelled
from stored bytes and measured gates; *TB/s*: these over the time of the graph; *of a copy*: of what a copy on the
device moved in that run. *x engine*, *x generate*: against the dense bfloat16 model through either loop, end to end, in
the same run. Models but SmolLM2 have the shapes named and random weights: their speed says nothing about quality.
{torchao}{source}

{sections}
"""


def model_section(name: str, results: list[dict[str, Any]]) -> str:
    rows = [r for r in results if "error" not in r]
    half = [r for r in rows if r["method"] == "dense" and r.get("dtype", "bfloat16") == "bfloat16"]
    dense = {r["loop"]: r["ms"] for r in half}
    title = f"### {MODELS[name]}\n\nCommit {results[0]['commit']}, a copy moves {results[0]['ceiling_tb_s']:.2f} TB/s."
    same = "".join(
        f" Of {r['same_text'][1]} prompts, {r['same_text'][0]} are continued by the engine with the same tokens as by"
        " `generate()` (dense, float32, greedy)."
        for r in rows
        if "same_text" in r
    )
    failed = "".join(f"\n\n{label(r)} did not run: {r['error']}" for r in results if "error" in r)
    return f"{title}{same}\n\n{markdown(DECODING, [decoding_row(r, dense) for r in rows])}{failed}"


def label(r: dict[str, Any]) -> str:
    return " ".join(word for word in (r["method"], r.get("dtype", ""), r["loop"]) if word)


def decoding_row(r: dict[str, Any], dense: dict[str, float]) -> tuple[str, ...]:
    graph, nbytes = r.get("graph_ms"), r.get("bytes")
    speed = nbytes / graph / 1e9 if graph and nbytes else None
    return (
        label(r),
        f"{r['fire']:.0%}, {r['opened']:.1%}" if "opened" in r else "-",
        f"{r['ms']:.2f}",
        f"{1e3 / r['ms']:.0f}",
        f"{graph:.2f}" if graph else "-",
        f"{nbytes / 1e9:.2f}" if nbytes else "-",
        f"{speed:.2f}" if speed else "-",
        f"{speed / r['ceiling_tb_s']:.0%}" if speed else "-",
        *(f"{dense[loop] / r['ms']:.2f}" if loop in dense else "-" for loop in ("engine", "generate")),
        f"{r['peak_bytes'] / 1e9:.2f}" if "peak_bytes" in r else "-",
    )


def converting(content: dict[str, Any], source: str) -> str:
    settings, weights = content["settings"], content["settings"]["weight_bytes"]
    rows = [
        (r["step"], f"{r['seconds']:.0f}", f"{r['peak_bytes'] / 1e9:.2f}", f"{r['peak_bytes'] / weights:.2f}")
        for r in content["results"]
    ]
    return f"""## Converting on a GPU ({settings["device"]})

A model of the shape of Llama-7B, bfloat16, {weights / 1e9:.2f} GB of weights; {describe(settings["method"])} on
{settings["tokens"]:,} tokens, {settings["converted_bytes"] / 1e9:.2f} GB when converted. *peak*: of allocated memory,
and that over the weights. {source}

{markdown(("step", "seconds", "peak, GB", "x weights"), rows)}
"""


def plot_roofline(contents: Sequence[dict[str, Any]]) -> Figure:
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
        axes.annotate(
            "a copy", (0, ceiling), xycoords=("axes fraction", "data"), xytext=(3, 3), textcoords="offset points"
        )
        axes.set(
            title=content["settings"]["device"], xlabel="MB of weights read by a call", ylabel="TB/s", xscale="log"
        )
        axes.set_ylim(0, 1.05 * max(ceiling, *map(bandwidth, rows)))
        axes.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    return figure


def case(r: dict[str, Any]) -> str:
    if r["method"] == "gsi":
        return f"gsi, gate {'open' if r['fire'] else 'closed'}"
    return f"{r['method']}, {r['fire']:.0%} open" if r["fire"] else str(r["method"])
