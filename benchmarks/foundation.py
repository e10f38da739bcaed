"""Every method on SmolLM2-135M and WikiText-2, held-out beside in-sample: results/foundation.json.

    python benchmarks/foundation.py ../shared/data/wikitext-2

Calibrated on valid.txt; held-out rows are measured on test.txt, in-sample rows on the beginning of what was calibrated
on. About 15 minutes on two cores.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from frame import MODEL, Content, Row, parser, record, source, start
from matplotlib.figure import Figure

from rankgate.hub.opening import Opened, open_dense
from rankgate.methods import ASVDConfig, GSIConfig, Method, SVDConfig
from rankgate.reporting.pipeline import Reference, statistics
from rankgate.reporting.tables import HEADERS, describe, markdown, number, row

CONTEXT, CALIBRATION_TOKENS, TOKENS, PROMPTS = 512, 16_384, 4_096, 8

HELD_OUT: tuple[Method, ...] = (
    GSIConfig(rank=0.125, eps=0.05),
    GSIConfig(rank=0.25, eps=0.05),
    GSIConfig(rank=0.5, eps=0.05, allow_larger=True),
    GSIConfig(rank=0.25, eps=0.2),
    GSIConfig(rank=0.25, eps=0.05, basis="context"),
    GSIConfig(rank=0.25, eps=0.2, basis="context"),
    SVDConfig(energy=0.9, allow_larger=True),
    SVDConfig(energy=0.9),
    ASVDConfig(rank=0.5, allow_larger=True),
    ASVDConfig(rank=0.5),
)
IN_SAMPLE: tuple[Method, ...] = (
    GSIConfig(rank=0.25, eps=0.05),
    GSIConfig(rank=0.25, eps=0.2),
    ASVDConfig(rank=0.5, allow_larger=True),
)


COLORS = {"gsi": "C0", "svd": "C1", "asvd": "C2"}


def main() -> None:
    folder = start(parser(__doc__, "folder")).folder
    corpus = "WikiText-2, calibrated on valid, held-out rows on test"
    sizes = {"context": CONTEXT, "calibration_tokens": CALIBRATION_TOKENS, "tokens": TOKENS, "prompts": PROMPTS}
    record("foundation", {"model": MODEL, "corpus": corpus, **sizes}, measured(open_dense(MODEL), folder))


def measured(opened: Opened, folder: Path) -> Iterator[Row]:
    valid, test = str(folder / "valid.txt"), str(folder / "test.txt")
    stats = statistics(opened, valid, CALIBRATION_TOKENS, CONTEXT)
    unseen, seen = (Reference.of(opened, opened.windows(text, TOKENS, CONTEXT), PROMPTS) for text in (test, valid))
    for method in HELD_OUT:
        yield unseen.measure(method, stats).record()
    for method in IN_SAMPLE:
        yield seen.measure(method, stats, in_sample=True).record()


def section(content: Content) -> str:
    settings = content["settings"]
    return f"""## The methods of the literature, as published

{settings["corpus"]}. {settings["calibration_tokens"]:,} calibration tokens, {settings["tokens"]:,} evaluation tokens
in fixed windows of {settings["context"]}, {settings["prompts"]} prompts continued by 32 tokens. {source(content)}

{markdown(HEADERS, [row(r) for r in content["results"]])}

*reads / dense* counts the weight bytes that the linear layers read per token: modelled from stored bytes and the
measured fire rate; above 1 a method reads more than the dense model. The dense weights are float32 (32 bits).
*all layers*: also those whose factors are larger than the layer; otherwise these stay dense.
*same text*: share of prompts continued with the same characters. In-sample rows are measured on the text that was
calibrated on.

![divergence from the dense model against weight reads](foundation.png)
"""


def plot(content: Content) -> Figure:
    """Divergence against reads: one wants to be low and on the left."""
    figure = Figure(figsize=(9, 4.2), layout="constrained")
    axes = figure.subplots()
    for i, r in enumerate((r for r in content["results"] if not r["in_sample"]), 1):
        x, y, method = 1 / r["read_speedup"], r["kl_mean"], r["method"]
        label = f"{i}  {describe(method)}: perplexity x {number(r['ppl_ratio'], 3)}"
        axes.scatter(x, y, color=COLORS[method["name"]], zorder=3, label=label)
        offset = (6, 4) if i % 2 else (-12, -10)  # rows that nearly coincide are neighbours
        axes.annotate(str(i), (x, y), xytext=offset, textcoords="offset points", fontsize=8)
    axes.axvline(1, color="0.6", linewidth=0.8)
    axes.annotate("dense", (1, 1), xycoords=("data", "axes fraction"), xytext=(3, -10), textcoords="offset points")
    axes.set(xlabel="weight reads / dense (modelled)", ylabel="KL(dense ‖ converted), nats", yscale="log")
    figure.legend(loc="outside right center", frameon=False, fontsize=8)
    return figure


if __name__ == "__main__":
    main()
