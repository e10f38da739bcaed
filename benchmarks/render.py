"""Write docs/results.md, its charts and the tables in README.md from results/*.json.

python benchmarks/render.py            (tests check that it changes nothing)
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import render_api
import render_attention
import render_ecosystem
import render_gpu
from matplotlib.figure import Figure

from rankgate.reporting.tables import HEADERS, describe, markdown, row
from rankgate.reporting.tables import number as short

ROOT = Path(__file__).parent.parent
BEGIN, END = "<!-- {}: written by benchmarks/render.py -->\n", "<!-- end of {} -->"
STORED = {"lrq", "int8", "int4"}  # methods with a format of their own; the others' weights count as bfloat16
BITS_ASKED = ((4.7, 1.045), (5.0, 1.03), (5.5, 1.02), (6.2, 1.008))  # at most so many bits: at most this ratio


def main() -> None:
    for path, text in documents().items():
        path.write_text(text, encoding="utf-8")
    plot_reads(load("foundation")).savefig(ROOT / "docs" / "foundation.png", dpi=120)
    plot_curve(load("curve"), load("speed")).savefig(ROOT / "docs" / "curve.png", dpi=120)
    if kernels := of_devices("gpu_kernels"):
        render_gpu.plot_roofline(kernels).savefig(ROOT / "docs" / "roofline.png", dpi=120)


def documents() -> dict[Path, str]:
    """Every generated text by its path."""
    readme = ROOT / "README.md"
    text = readme.read_text(encoding="utf-8")
    text = between(text, "results", overview(load("curve"), load("speed")))
    text = between(text, "attention", render_attention.overview(load("attention_quality")))
    return {
        readme: text,
        ROOT / "docs" / "api.md": render_api.reference(),
        ROOT / "docs" / "results.md": "\n".join(
            (
                "# Results\n\nWritten by `benchmarks/render.py` from `benchmarks/results/*.json`; do not edit.\n",
                quality(load("curve")),
                controls(load("controls")),
                plans(load("plans")),
                speed(load("speed")),
                literature(load("foundation")),
                memory(load("memory")),
                costs(load("calibration")),
                render_attention.quality(load("attention_quality"), source(load("attention_quality"))),
                render_attention.selection(load("attention"), source(load("attention"))),
                *(render_attention.speed(content, source(content)) for content in of_devices("attention_speed")),
                *(render_ecosystem.exact(content, source(content)) for content in of_devices("exact")),
                render_ecosystem.harness(load("harness"), source(load("harness"))),
                render_ecosystem.serving(load("serving"), source(load("serving"))),
                *gpus(),
            )
        ),
    }


def between(text: str, name: str, content: str) -> str:
    """`text` with `content` between the marks of `name`."""
    begin, end = BEGIN.format(name), END.format(name)
    before, rest = text.split(begin)
    _, after = rest.split(end)
    return f"{before}{begin}{content}\n{end}{after}"


def load(name: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text(encoding="utf-8"))
    return content


def of_devices(name: str) -> list[dict[str, Any]]:
    """The results called `name` of every device that was measured on."""
    return [load(path.stem) for path in sorted((ROOT / "benchmarks" / "results").glob(f"{name}_*.json"))]


def gpus() -> list[str]:
    """Sections, as far as there are results."""
    kernels, decoding = of_devices("gpu_kernels"), of_devices("gpu_decode")
    plot = ["![bandwidth against bytes read, for each kernel](roofline.png)\n"] if kernels else []
    return [
        *(render_gpu.decoding(content, source(content)) for content in decoding),
        *(render_gpu.kernels(content, source(content)) for content in kernels),
        *plot,
        *(render_gpu.converting(content, source(content)) for content in of_devices("gpu_convert")),
    ]


def overview(curve: dict[str, Any], measured: dict[str, Any]) -> str:
    """The README's tables: quality at the bits read, and speed."""
    rows = [curve_row(r)[:4] for r in methods(curve)]
    fast = [speed_row(r, qualities(measured))[:4] for r in measured["results"][0]["rows"] if "error" not in r]
    return markdown(CURVE[:4], rows) + "\n\n" + markdown(SPEED[:4], fast)


CURVE = ("method", "bits read", "ppl ratio", "top-1", "KL mean", "on the front")


def bits(record: dict[str, Any]) -> float:
    """Bits per weight that a token reads of the linear layers."""
    return float(record["bits_per_weight"]) if record["method"]["name"] in STORED else 16 / record["read_speedup"]


def methods(curve: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows of the curve, and every baseline; the first row of the ablation is one of these."""
    return [r for r in curve["results"] if r["part"] != "ablation" or r["method"]["name"] != "lrq"]


def front(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Those that no other beats in both bits and divergence."""
    return [
        r for r in records if not any(bits(o) <= bits(r) and o["kl_mean"] < r["kl_mean"] for o in records if o is not r)
    ]


def curve_row(record: dict[str, Any], best: list[dict[str, Any]] | None = None) -> tuple[str, ...]:
    return (
        describe(record["method"]),
        f"{bits(record):.2f}",
        short(record["ppl_ratio"], 4),
        short(record["top1"], 4),
        short(record["kl_mean"], 4),
        "yes" if best is not None and record in best else "",
    )


def quality(curve: dict[str, Any]) -> str:
    settings, records = curve["settings"], curve["results"]
    best = front(records)
    rows = [curve_row(r, best) for r in methods(curve)]
    ablation = [(r["what"], *curve_row(r)[1:5]) for r in records if r["part"] == "ablation"]
    asked = []
    for limit, ratio in BITS_ASKED:
        inside = min((r for r in records if bits(r) <= limit), key=lambda r: float(r["kl_mean"]))
        got = inside["ppl_ratio"]
        goal = f"at most {limit} bits: ratio ≤ {ratio}"
        met = "yes" if got <= ratio else "**no**"
        asked.append((goal, describe(inside["method"]), f"{bits(inside):.2f}", f"{got:.4f}", met))
    return f"""## Quality against bytes

{settings["corpus"]}: {settings["calibration_tokens"]:,} calibration tokens,
{settings["tokens"]:,} test tokens in windows of {settings["context"]}. *bits read*: 8 x bytes of the linear layers that
a token reads / weights, as stored and with the measured share of open gates. Methods without a format of their own are
counted in bfloat16, where dense is 16 bits. *on the front*: no row of these tables reads fewer bits at less divergence.
{source(curve)}

{markdown(CURVE, rows)}

![KL divergence from the dense model against bits read per weight](curve.png)

The least divergence within a number of bits:

{markdown(("goal", "method", "bits read", "ppl ratio", "met"), asked)}

The difference of two perplexities of nearly equal models is noise of about sqrt(2 KL / tokens), one standard deviation:
± {noise(records, 5, settings["tokens"]):.4f} near 5 bits, ± {noise(records, 6.2, settings["tokens"]):.4f} near 6.2.
The mean KL orders settings better.

### What each part contributes

{markdown(("what", *CURVE[1:5]), ablation)}
"""


def controls(content: dict[str, Any]) -> str:
    rows, costs = [], []
    by_model: dict[str, list[dict[str, Any]]] = {}
    for record in content["results"]:
        by_model.setdefault(record["part"], []).append(record)
    for plain, dithered, rotated in zip(*(by_model[name] for name in ("as it is", "dithered", "rotated")), strict=True):
        costs.append(dithered["kl_mean"] / plain["kl_mean"] - 1)
        ratios = (f"{short(r['ppl_ratio'], 4)} / {short(r['kl_mean'], 4)}" for r in (plain, dithered, rotated))
        rows.append((describe(plain["method"]), f"{bits(plain):.2f}", *ratios))
    return f"""### Off the grid that the weights were on

The model comes from a 4-bit file (Q4_1: asymmetric, groups of 32), so its weights lie on a grid of their own, and a
method could do well by finding it again. The same settings, perplexity ratio / mean KL, each against its own dense
model: *dithered* has uniform noise of one step of that grid on every weight; *rotated* has its residual stream in
another basis, where every weight is different and every output the same. {source(content)}

{markdown(("method", "bits read", "as it is", "dithered", "rotated"), rows)}

Dithering makes the divergence {min(costs):.0%} to {max(costs):.0%} larger: at most that much rests on the grid (noise
in the weights is harder to round by itself). Rotation takes away something else besides, which gates live on: a few
channels of the residual stream that are much larger than the rest. A rotation and channel gates exclude each other.
"""


def noise(records: list[dict[str, Any]], near: float, tokens: int) -> float:
    """Standard deviation of the loss difference between dense and the row of `near` bits."""
    kl = min(records, key=lambda r: abs(bits(r) - near))["kl_mean"]
    return float((2 * kl / tokens) ** 0.5)


def plans(content: dict[str, Any]) -> str:
    settings = content["settings"]
    rows = []
    for r in content["results"]:
        kind = {"ppl": "ppl_ratio"}.get(r["budget"].partition("=")[0], r["budget"].partition("=")[0])
        held_out = r["held_out"].get(kind)
        rows.append(
            (
                r["budget"],
                short(r["predicted"][kind], 4),
                "-" if held_out is None else short(held_out, 4),
                short(r["test"][kind], 4),
                ", ".join(f"{count} x {'dense' if name == 'None' else name}" for name, count in r["settings"].items()),
                f"{r['predicted']['speedup']:.2f}",
                f"{r['planner_s'] / 60:.1f}",
            )
        )
    headers = ("budget", "predicted", "held-out valid", "test", "groups", "linears predicted x dense", "minutes")
    return f"""## Plans within budgets

`convert --budget`, with `--lm-head`. What is budgeted, as predicted from the groups one by one, as measured on
{settings["held_out_tokens"]:,} tokens of valid that were not calibrated on, and on {settings["tokens"]:,} tokens of
test, which the planner never sees. {source(content)}

{markdown(headers, rows)}
"""


SPEED = ("model, loop", "ppl ratio", "bits", "decode x dense", "10–90 %", "prefill x dense", "MB/token", "of a copy")


def qualities(content: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {q["name"]: q for q in content["results"][0]["quality"]}


def speed_row(row: dict[str, Any], quality_of: dict[str, dict[str, Any]]) -> tuple[str, ...]:
    name = next(n for n in sorted(quality_of, key=len, reverse=True) if row["name"].startswith(n))
    low, high = (x / row["decode_tok_s"] * row["decode_speedup"] for x in row["decode_tok_s_quantiles"])
    reads = row["bytes_per_token"]
    return (
        ("plan for " if "=" in name.partition(" ")[0] else "") + row["name"].removeprefix("smollm2-135m "),
        short(quality_of[name]["ppl_ratio"], 4),
        f"{quality_of[name]['bits']:.2f}",
        f"{row['decode_speedup']:.2f}",
        f"{low:.2f} – {high:.2f}",
        f"{row['prefill_speedup']:.2f}",
        "-" if reads is None else f"{reads / 1e6:.0f}",
        "-" if reads is None else f"{row['ceiling_share']:.0%}",
    )


def speed(content: dict[str, Any]) -> str:
    settings, quality_of = content["settings"], qualities(content)
    rows = content["results"][0]["rows"]
    lines = [speed_row(r, quality_of) for r in rows if "error" not in r]
    failed = "".join(f"\n{r['name']} did not run: {r['error']}\n" for r in rows if "error" in r)
    return f"""## Speed at batch 1 on a CPU

SmolLM2-135M, greedy, prompt of {settings["prompt_tokens"]} tokens, {settings["new_tokens"]} new ones, every subject in
a process of its own, in turn, {settings["rounds"]} rounds: medians as ratios to *dense*, the faster of transformers'
`generate()` in float32 and bfloat16. *generate* is that loop, *decode* ours. Converted models have an int8 output
embedding, torchao's are converted likewise. *compiled*: static cache and `torch.compile`. *of a copy*: weight bytes per
second over what a plain copy moves. Quality on {settings["tokens"]:,} test tokens.
torchao {settings["torchao"]}. {source(content)}

{markdown(SPEED, lines)}
{failed}"""


def literature(foundation: dict[str, Any]) -> str:
    settings = foundation["settings"]
    return f"""## The methods of the literature, as published

{settings["corpus"]}. {settings["calibration_tokens"]:,} calibration tokens, {settings["tokens"]:,} evaluation tokens
in fixed windows of {settings["context"]}, {settings["prompts"]} prompts continued by 32 tokens. {source(foundation)}

{markdown(HEADERS, [row(record) for record in foundation["results"]])}

*reads / dense* counts the weight bytes that the linear layers read per token: modelled from stored bytes and the
measured fire rate; above 1 a method reads more than the dense model. The dense weights are float32 (32 bits).
*all layers*: also those whose factors are larger than the layer; otherwise these stay dense.
*same text*: share of prompts continued with the same characters. In-sample rows are measured on the text that was
calibrated on.

![divergence from the dense model against weight reads](foundation.png)
"""


def memory(content: dict[str, Any]) -> str:
    records = content["results"]
    dense = next(r for r in records if r["name"] == "dense, answering")

    def cell(record: dict[str, Any], key: str) -> str:
        return f"{record[key] / 1e6:.0f} ({record[key] / dense[key]:.2f})" if key in record else "-"

    keys = ("peak_bytes", "resident_bytes", "file_bytes")
    rows = [(r["name"], *(cell(r, key) for key in keys)) for r in records]
    return f"""## Memory

SmolLM2-135M in float32, in MB and in relation to a process that has loaded the dense model and read 8 tokens,
interpreter and libraries included. *convert* loads, calibrates on 8,192 tokens, converts and saves. {source(content)}

{markdown(("process", "highest resident", "resident at the end", "files"), rows)}
"""


def costs(calibration: dict[str, Any]) -> str:
    by_what: dict[str, list[dict[str, Any]]] = {}
    for record in calibration["results"]:
        by_what.setdefault(record["what"], []).append(record)
    times = [
        (
            "SmolLM2-135M" if r["what"] == "tokens" else "random Llama, 4 layers",
            f"{r['width']}",
            f"{r['tokens']:,}",
            f"{r['ratio']:.2f}",
            f"{min(r['ratios']):.2f} – {max(r['ratios']):.2f}",
        )
        for r in by_what["tokens"] + by_what["width"]
    ]
    return f"""## What calibration costs

Calibration over plain forward passes on the same tokens, run in turn {calibration["settings"]["repeats"]} times; the
ratio of the medians, and the range of the ratios. {source(calibration)}

{markdown(("model", "width", "tokens", "ratio", "range"), times)}
"""


def source(content: dict[str, Any]) -> str:
    p, settings = content["provenance"], content["settings"]
    versions = ", ".join(f"{name} {p[name]}" for name in ("rankgate", "torch", "transformers", "python"))
    device = settings.get("device", "cpu")
    device = p["device"] if device == "cpu" else device
    return f"{device}; {versions}; commit {p['commit']}; {p['date']}; seed {p['seed']}."


def plot_reads(foundation: dict[str, Any]) -> Figure:
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


def plot_curve(curve: dict[str, Any], measured: dict[str, Any]) -> Figure:
    """Divergence against bits read: one wants to be low and on the left."""
    figure = Figure(figsize=(9, 5), layout="constrained")
    axes = figure.subplots()
    best = sorted(front(curve["results"]), key=bits)
    shown = [r for r in curve["results"] if r in best or r in methods(curve)]
    points = [(bits(r), r["kl_mean"], describe(r["method"]), r["method"]["name"] == "lrq") for r in shown]
    for name, q in qualities(measured).items():
        if "torchao" in name:
            label = name.removeprefix("smollm2-135m bfloat16 ").removesuffix(" generate")
            points.append((q["bits"], q["kl_mean"], label, False))
    axes.plot([bits(r) for r in best], [r["kl_mean"] for r in best], color="C0", linewidth=1, zorder=2)
    for number, (x, y, label, own) in enumerate(sorted(dict.fromkeys(points)), 1):
        axes.scatter(x, y, color="C0" if own else "C3", s=18, zorder=3, label=f"{number}  {label}")
        offset = (-4, -12) if number % 2 else (3, 5)  # neighbours on different sides
        axes.annotate(str(number), (x, y), xytext=offset, textcoords="offset points", fontsize=8)
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
