"""Write docs/results.md, docs/foundation.png and the table in README.md from results/*.json.

python benchmarks/render.py            (tests check that it changes nothing)
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from rankgate.tables import HEADERS, describe, markdown, row

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

![perplexity ratio against weight reads](foundation.png)

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
    """Quality against reads: the corner at the lower left is where one wants to be."""
    figure = Figure(figsize=(8, 4.6), layout="constrained")
    axes = figure.subplots()
    styles = {"gsi": ("o", "C0"), "svd": ("s", "C1"), "asvd": ("D", "C2")}
    for record in foundation["results"]:
        if record["in_sample"]:
            continue
        marker, color = styles[record["method"]["name"]]
        x, y = 1 / record["read_speedup"], record["ppl_ratio"]
        axes.scatter(x, y, marker=marker, color=color, zorder=3)
        axes.annotate(describe(record["method"]), (x, y), xytext=(5, 5), textcoords="offset points", fontsize=7)
    axes.scatter(1, 1, marker="*", s=120, color="black", zorder=4)
    axes.annotate("dense", (1, 1), xytext=(-8, -14), textcoords="offset points", fontsize=8)
    axes.axvline(1, color="0.7", linewidth=0.8)
    axes.set(xlabel="weight reads / dense (modelled)", ylabel="perplexity ratio (held-out)", yscale="log")
    axes.set_xlim(right=axes.get_xlim()[1] + 0.25)
    return figure


if __name__ == "__main__":
    main()
