"""The GPU's part of docs/results.md and its chart, from results/gpu_*.json."""

from __future__ import annotations

from typing import Any

from matplotlib.figure import Figure

from rankgate.tables import markdown
from rankgate.tables import number as short

SAME_PROMPTS = 20


def kernels(content: dict[str, Any], source: str) -> str:
    """Every kernel by itself."""
    measured, ceiling = content["results"][0], content["settings"]["ceiling_tb_s"]
    rows = [kernel_row(r, ceiling) for r in measured["times"]]
    worst = {}
    for e in measured["errors"]:
        key = e["method"], e["dtype"]
        worst[key] = max(worst.get(key, (0.0, 0.0)), (e["error"], e["torch"]))
    errors = [(*key, f"{error:.1e}", f"{torch:.1e}") for key, (error, torch) in worst.items()]
    return f"""## GPU kernels on an {name(content)}

An input group at batch 1 (and a few more), bfloat16, random weights that come from memory. *of the ceiling*: bytes per
second over what a copy on the same device moves, {ceiling:.2f} TB/s counting reads and writes (only to read can be
faster); *x cuBLAS*: against `F.linear` in the same run; *of theory*: that over what the bytes alone would give.
{source}

{markdown(("method", "m x n", "gate open", "batch", "µs", "TB/s", "of the ceiling", "x cuBLAS", "of theory"), rows)}

Largest relative error against float64 over odd shapes and batches of 1, 3 and 8, beside that of torch on the same
weights unpacked to the same dtype:

{markdown(("method", "dtype", "error", "torch"), errors)}
"""


def kernel_row(r: dict[str, Any], ceiling: float) -> tuple[str, ...]:
    rate = r["bytes"] / r["us"] / 1e6
    against = (short(r["speedup"], 2), f"{r['speedup'] / r['theory']:.0%}") if "speedup" in r else ("1", "")
    method = f"{r['method']} k={r['k']}" if "k" in r else r["method"]
    share = f"{r['fire']:.0%}" if r["method"] in {"gsi", "lrq"} else ""
    shape = f"{r['m']} x {r['n']}"
    return (method, shape, share, str(r["batch"]), f"{r['us']:.1f}", f"{rate:.2f}", f"{rate / ceiling:.0%}", *against)


def decoding(content: dict[str, Any], source: str) -> str:
    """Whole models."""
    settings, results = content["settings"], content["results"]
    ceiling = settings["ceiling_tb_s"]
    rows = []
    for r in results:
        own = [o for o in results if o["model"] == r["model"] and o["method"] == "dense"]
        dense = {o["loop"]: o["ms"] for o in own}
        rate = r["bytes"] / r["ms"] / 1e9 if "bytes" in r else None
        rows.append(
            (
                r["model"],
                r["method"],
                f"{r['fire']:.0%}" if r["method"] in {"gsi", "lrq"} else "",
                r["loop"],
                f"{r['ms']:.2f}",
                f"{1000 / r['ms']:.0f}",
                "" if rate is None else f"{rate:.2f}",
                "" if rate is None else f"{rate / ceiling:.0%}",
                short(dense["engine"] / r["ms"], 2) if "engine" in dense else "",
                short(dense["generate"] / r["ms"], 2) if "generate" in dense else "",
            )
        )
    headers = ("model", "method", "gate open", "loop", "ms per token", "tokens/s", "TB/s", "of the ceiling")
    same = next((r["same_text"] for r in results if "same_text" in r), None)
    text = (
        ""
        if same is None
        else f" In float32 the engine says what `generate()` says on {same} of {SAME_PROMPTS} prompts."
    )
    torchao = "" if settings["torchao"] else " torchao cannot be had on that machine."
    return f"""## GPU decoding on an {name(content)}

Batch 1, after a prompt of {settings["prompt"]} tokens; bfloat16 where nothing else is said. llama, gptj and opt are
Llama-7B, GPT-J-6B and OPT-6.7B with random weights, smollm2 is SmolLM2-135M itself. *gate open*: the share of the
groups (gsi) or of the channels (lrq).{text}{torchao} {source}

{markdown((*headers, "x dense engine", "x generate()"), rows)}
"""


def name(content: dict[str, Any]) -> str:
    return str(content["settings"]["device"]).removeprefix("NVIDIA ")


def plot_roofline(content: dict[str, Any]) -> Figure:
    """Time against bytes, and what the ceiling allows: one wants to be near the line."""
    ceiling = content["settings"]["ceiling_tb_s"]
    rows = [r for r in content["results"][0]["times"] if r["batch"] == 1]
    figure = Figure(figsize=(9, 4.5), layout="constrained")
    axes = figure.subplots()
    for number, method in enumerate(dict.fromkeys(r["method"] for r in rows)):
        own = [r for r in rows if r["method"] == method]
        axes.scatter([r["bytes"] / 1e6 for r in own], [r["us"] for r in own], s=20, color=f"C{number}", label=method)
    span = [min(r["bytes"] for r in rows) / 1e6, max(r["bytes"] for r in rows) / 1e6]
    axes.plot(span, [x / ceiling for x in span], color="0.5", linewidth=1, label=f"a copy, {ceiling:.2f} TB/s")
    axes.set(xlabel="MB of weights that a token reads", ylabel="µs", xscale="log", yscale="log")
    figure.legend(loc="outside right center", frameon=False, fontsize=8)
    return figure
