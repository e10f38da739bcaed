"""Quality against bits read, for lrq, its parts one by one, and every baseline: results/curve.json.

    python benchmarks/curve.py ../shared/data/wikitext-2 [--device cuda]

SmolLM2-135M, calibrated on valid.txt, measured on test.txt. About an hour on two cores, five minutes on a GPU.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from frame import MODEL, Columns, Content, Row, card, parser, record, source, start, table
from matplotlib.figure import Figure

from rankgate.conversion.calibration import calibrate
from rankgate.hub.opening import Opened, open_dense
from rankgate.methods import ASVDConfig, GSIConfig, Int4Config, Int8Config, LRQConfig, Method, SparseConfig, SVDConfig
from rankgate.reporting.pipeline import Reference
from rankgate.reporting.tables import describe, number

CONTEXT, CALIBRATION_TOKENS, TOKENS = 512, 16_384, 16_384

CURVE: dict[str, Method] = {
    "rank 8": LRQConfig(rank=8, refine=0.0),
    "rank 16": LRQConfig(rank=16, refine=0.0),
    "rank 16, 2 % of the channels": LRQConfig(rank=16, refine=0.02),
    "5 %": LRQConfig(rank=16, refine=0.05),
    "9 %": LRQConfig(rank=16, refine=0.09),
    "20 %": LRQConfig(rank=16, refine=0.2),
    "36 %, asymmetric": LRQConfig(rank=16, refine=0.36, symmetric=False),
    "50 %, asymmetric": LRQConfig(rank=16, refine=0.5, symmetric=False),
    "8 bits": LRQConfig(bits=8, rank=0, refine=0.0),
}
ABLATION: dict[str, Method] = {
    "rounded to nearest": Int4Config(),
    "+ error compensation": LRQConfig(rank=0, refine=0.0),
    "+ rank 16, chosen once": LRQConfig(rank=16, refine=0.0, rounds=1),
    "+ Q and A B in turn": LRQConfig(rank=16, refine=0.0),
    "+ gate, 5 % of the channels": LRQConfig(rank=16, refine=0.05),
    "gate without rank": LRQConfig(rank=0, refine=0.05),
    "rank without gate, asymmetric": LRQConfig(rank=16, refine=0.0, symmetric=False),
    "rank and gate, asymmetric": LRQConfig(rank=16, refine=0.05, symmetric=False),
}
BASELINES: dict[str, Method] = {
    "int8": Int8Config(),
    "sparse, 75 %": SparseConfig(keep=0.75),
    "sparse, 50 %": SparseConfig(keep=0.5),
    "gsi": GSIConfig(rank=0.25, eps=0.05),
    "gsi, wide gate": GSIConfig(rank=0.25, eps=0.2),
    "svd": SVDConfig(energy=0.9),
    "asvd": ASVDConfig(rank=0.5),
}


STORED = {"lrq", "int8", "int4"}  # methods with a format of their own; the others' weights count as bfloat16
GOALS = ((4.7, 1.045), (5.0, 1.03), (5.5, 1.02), (6.2, 1.008))  # at most so many bits: at most this ratio


def main() -> None:
    arguments = start(parser(__doc__, "folder", "--device"))
    opened = open_dense(MODEL)
    opened.model.to(arguments.device)
    parts = {"curve": CURVE, "ablation": ABLATION, "baseline": BASELINES}
    rows = (row for part, methods in parts.items() for row in measured(opened, arguments.folder, methods, part))
    corpus = "WikiText-2, calibrated on valid, measured on test"
    record("curve", {"model": MODEL, "corpus": corpus, **conditions(arguments.device)}, rows)


def conditions(device: str) -> dict[str, Any]:
    return {"context": CONTEXT, "calibration_tokens": CALIBRATION_TOKENS, "tokens": TOKENS, "device": card(device)}


def measured(opened: Opened, folder: Path, methods: Mapping[str, Method], part: str) -> Iterator[Row]:
    """The rows of one part of the table."""
    windows = opened.windows(str(folder / "valid.txt"), CALIBRATION_TOKENS, CONTEXT)
    stats = calibrate(opened.model, windows, sensitivity=True)
    reference = Reference.of(opened, opened.windows(str(folder / "test.txt"), TOKENS, CONTEXT), prompts=0)
    for what, method in methods.items():
        row = {**reference.measure(method, stats).record(), "part": part, "what": what}
        row.pop("fire_rates")
        yield row


def bits(r: Row) -> float:
    """Bits per weight that a token reads of the linear layers."""
    return float(r["bits_per_weight"]) if r["method"]["name"] in STORED else 16 / r["read_speedup"]


def of_methods(rows: list[Row]) -> list[Row]:
    """The rows of the curve, and every baseline; the first row of the ablation is one of these."""
    return [r for r in rows if r["part"] != "ablation" or r["method"]["name"] != "lrq"]


def front(rows: list[Row]) -> list[Row]:
    """Those that no other beats in both bits and divergence."""
    return [r for r in rows if not any(bits(o) <= bits(r) and o["kl_mean"] < r["kl_mean"] for o in rows if o is not r)]


METHOD: Columns = {"method": lambda r: describe(r["method"])}
BITS: Columns = {"bits read": lambda r: f"{bits(r):.2f}"}
RATIO: Columns = {"ppl ratio": lambda r: number(r["ppl_ratio"], 4)}
TOP: Columns = {"top-1": lambda r: number(r["top1"], 4)}
DIVERGENCE: Columns = {"KL mean": lambda r: number(r["kl_mean"], 4)}


def section(content: Content) -> str:
    settings, rows = content["settings"], content["results"]
    best = front(rows)
    on_front: Columns = {"on the front": lambda r: "yes" if r in best else ""}
    asked = []
    for limit, ratio in GOALS:
        least = min((r for r in rows if bits(r) <= limit), key=lambda r: float(r["kl_mean"]))
        asked.append({**least, "goal": f"at most {limit} bits: ratio ≤ {ratio}", "met": least["ppl_ratio"] <= ratio})
    goal: Columns = {"goal": lambda r: r["goal"]}
    met: Columns = {"met": lambda r: "yes" if r["met"] else "**no**"}
    what: Columns = {"what": lambda r: r["what"]}
    return f"""## Quality against bytes

{settings["corpus"]}: {settings["calibration_tokens"]:,} calibration tokens,
{settings["tokens"]:,} test tokens in windows of {settings["context"]}. *bits read*: 8 x bytes of the linear layers that
a token reads / weights, as stored and with the measured share of open gates. Methods without a format of their own are
counted in bfloat16, where dense is 16 bits. *on the front*: no row of these tables reads fewer bits at less divergence.
{source(content)}

{table(of_methods(rows), METHOD, BITS, RATIO, TOP, DIVERGENCE, on_front)}

![KL divergence from the dense model against bits read per weight](curve.png)

The least divergence within a number of bits:

{table(asked, goal, METHOD, BITS, RATIO, met)}

The difference of two perplexities of nearly equal models is noise of about sqrt(2 KL / tokens), one standard deviation:
± {noise(rows, 5, settings["tokens"]):.4f} near 5 bits, ± {noise(rows, 6.2, settings["tokens"]):.4f} near 6.2.
The mean KL orders settings better.

### What each part contributes

{table((r for r in rows if r["part"] == "ablation"), what, BITS, RATIO, TOP, DIVERGENCE)}
"""


def noise(rows: list[Row], near: float, tokens: int) -> float:
    """Standard deviation of the loss difference between dense and the row of `near` bits."""
    kl = min(rows, key=lambda r: abs(bits(r) - near))["kl_mean"]
    return float((2 * kl / tokens) ** 0.5)


def plot(content: Content, speed: Content) -> Figure:
    """Divergence against bits read, torchao's of results/speed.json included: one wants to be low and on the left."""
    figure = Figure(figsize=(9, 5), layout="constrained")
    axes = figure.subplots()
    rows = content["results"]
    best = sorted(front(rows), key=bits)
    drawn = [r for r in rows if r in best or r in of_methods(rows)]
    points = [(bits(r), r["kl_mean"], describe(r["method"]), r["method"]["name"] == "lrq") for r in drawn]
    for q in speed["results"][0]["quality"]:
        if "torchao" in q["name"]:
            label = q["name"].removeprefix("smollm2-135m bfloat16 ").removesuffix(" generate")
            points.append((q["bits"], q["kl_mean"], label, False))
    axes.plot([bits(r) for r in best], [r["kl_mean"] for r in best], color="C0", linewidth=1, zorder=2)
    for i, (x, y, label, own) in enumerate(sorted(dict.fromkeys(points)), 1):
        axes.scatter(x, y, color="C0" if own else "C3", s=18, zorder=3, label=f"{i}  {label}")
        offset = (-4, -12) if i % 2 else (3, 5)  # neighbours on different sides
        axes.annotate(str(i), (x, y), xytext=offset, textcoords="offset points", fontsize=8)
    axes.axvline(16, color="0.6", linewidth=0.8)
    axes.annotate("dense", (16, 0), xycoords=("data", "axes fraction"), xytext=(3, 5), textcoords="offset points")
    ticks = [4, 5, 6, 8, 12, 16, 24]
    axes.set(xlabel="bits read per weight of the linear layers", ylabel="KL(dense ‖ converted), nats per token")
    axes.set(xscale="log", yscale="log", xticks=ticks, xticklabels=[str(tick) for tick in ticks])
    axes.minorticks_off()
    figure.legend(loc="outside right center", frameon=False, fontsize=8)
    return figure


if __name__ == "__main__":
    main()
