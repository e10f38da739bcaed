"""Write docs/results.md, docs/foundation.png and the table in README.md from results/*.json.

python benchmarks/render.py            (tests check that it changes nothing)
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from rankgate.tables import HEADERS, describe, markdown, row
from rankgate.tables import number as short

ROOT = Path(__file__).parent.parent
BEGIN, END = "<!-- results: written by benchmarks/render.py -->\n", "<!-- end of results -->"
README_COLUMNS = (0, 1, 2, 3, 5, 6, 7)


def main() -> None:
    for path, text in documents().items():
        path.write_text(text, encoding="utf-8")
    plot(load("foundation")).savefig(ROOT / "docs" / "foundation.png", dpi=120)


def documents() -> dict[Path, str]:
    """Every generated text by its path."""
    foundation, calibration = load("foundation"), load("calibration")
    readme = ROOT / "README.md"
    before, rest = readme.read_text(encoding="utf-8").split(BEGIN)
    _, after = rest.split(END)
    rows = [row(record) for record in foundation["results"]]
    short = markdown(pick(HEADERS), [pick(cells) for cells in rows])
    return {
        readme: f"{before}{BEGIN}{short}\n{END}{after}",
        ROOT / "docs" / "results.md": results(foundation, rows, calibration),
    }


def load(name: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text(encoding="utf-8"))
    return content


def pick(cells: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(cells[i] for i in README_COLUMNS)


def results(foundation: dict[str, Any], rows: list[tuple[str, ...]], calibration: dict[str, Any]) -> str:
    settings = foundation["settings"]
    by_what: dict[str, list[dict[str, Any]]] = {}
    for record in calibration["results"]:
        by_what.setdefault(record["what"], []).append(record)
    memory = [(r["method"], f"{r['peak_bytes'] / 2**30:.2f}") for r in by_what["memory"]]
    costs = [
        (
            "SmolLM2-135M" if r["what"] == "tokens" else "random Llama, 4 layers",
            f"{r['width']}",
            f"{r['tokens']:,}",
            f"{r['ratio']:.2f}",
            f"{min(r['ratios']):.2f} – {max(r['ratios']):.2f}",
        )
        for r in by_what["tokens"] + by_what["width"]
    ]
    return f"""# Results

Written by `benchmarks/render.py` from `benchmarks/results/*.json`; do not edit.

## Methods on SmolLM2-135M

{settings["corpus"]}. {settings["calibration_tokens"]:,} calibration tokens, {settings["tokens"]:,} evaluation tokens in
fixed windows of {settings["context"]}, {settings["prompts"]} prompts continued by 32 tokens. {source(foundation)}

{markdown(HEADERS, rows)}

*reads / dense* counts the weight bytes that the linear layers read per token: modelled from stored bytes and the
measured fire rate; above 1 a method reads more than the dense model. The dense weights are float32 (32 bits).
*all layers*: also those whose factors are larger than the layer; otherwise these stay dense.
*same text*: share of prompts continued with the same characters. In-sample rows are measured on the text that was
calibrated on.

![divergence from the dense model against weight reads](foundation.png)

## What calibration costs

Calibration over plain forward passes on the same tokens, run in turn {calibration["settings"]["repeats"]} times; the
ratio of the medians, and the range of the ratios. {source(calibration)}

{markdown(("model", "width", "tokens", "ratio", "range"), costs)}

Peak resident memory of a process that loads, calibrates (8,192 tokens), converts and saves SmolLM2-135M:

{markdown(("method", "GiB"), memory)}
"""


def source(content: dict[str, Any]) -> str:
    p = content["provenance"]
    versions = ", ".join(f"{name} {p[name]}" for name in ("rankgate", "torch", "transformers", "python"))
    return f"{p['device']}; {versions}; commit {p['commit']}; {p['date']}; seed {p['seed']}."


def plot(foundation: dict[str, Any]) -> Figure:
    """Divergence against reads: one wants to be low and on the left."""
    figure = Figure(figsize=(9, 4.2), layout="constrained")
    axes = figure.subplots()
    colors = {"gsi": "C0", "svd": "C1", "asvd": "C2"}
    held_out = [record for record in foundation["results"] if not record["in_sample"]]
    for number, record in enumerate(held_out, 1):
        x, y, color = 1 / record["read_speedup"], record["kl_mean"], colors[record["method"]["name"]]
        label = f"{number}  {describe(record['method'])}: perplexity x {short(record['ppl_ratio'], 3)}"
        axes.scatter(x, y, color=color, zorder=3, label=label)
        offset = (6, 4) if number % 2 else (-12, -10)  # rows that nearly coincide are neighbours
        axes.annotate(str(number), (x, y), xytext=offset, textcoords="offset points", fontsize=8)
    axes.axvline(1, color="0.6", linewidth=0.8)
    axes.annotate("dense", (1, 1), xycoords=("data", "axes fraction"), xytext=(3, -10), textcoords="offset points")
    axes.set(xlabel="weight reads / dense (modelled)", ylabel="KL(dense ‖ converted), nats", yscale="log")
    figure.legend(loc="outside right center", frameon=False, fontsize=8)
    return figure


if __name__ == "__main__":
    main()
