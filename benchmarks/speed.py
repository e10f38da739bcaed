"""Plans within budgets, and how fast everything decodes: results/plans.json and results/speed.json.

    python benchmarks/speed.py ../shared/data/wikitext-2

SmolLM2-135M: one calibration on valid.txt, a plan for each budget, and fixed settings beside them; quality on test.txt,
speed at batch 1 in turn with dense and torchao, which must be installed. About 40 minutes on two cores that do nothing
else, half of it for torchao's compiler.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from frame import MODEL, Columns, Content, Row, parser, shown, source, start, table, timed, write

from rankgate.common.copies import twin
from rankgate.common.files import atomic_path
from rankgate.common.terminal import show_table
from rankgate.conversion.budget import Budget
from rankgate.conversion.calibration import Stats, calibrate
from rankgate.conversion.convert import convert_
from rankgate.conversion.evaluation import evaluate
from rankgate.conversion.groups import linears
from rankgate.conversion.plan import VERIFY_TOKENS, Planner
from rankgate.hub import checkpoint
from rankgate.hub.opening import Opened, open_dense
from rankgate.methods import Int8Config, LRQConfig, Method
from rankgate.reporting.bench import HEADERS, TORCHAO, bench, subjects_for
from rankgate.reporting.bench import table as bench_table
from rankgate.reporting.pipeline import provenance
from rankgate.reporting.runner import Subject, quantize_torchao
from rankgate.reporting.tables import number

CONTEXT, CALIBRATION_TOKENS, TOKENS = 512, 16_384, 16_384
BUDGETS = ("ppl=1.01", "top1=0.95", "bits=5")
FIXED: dict[str, Method] = {
    "int8": Int8Config(),
    "lrq r=16": LRQConfig(rank=16, refine=0.0),
    "lrq r=16 refine=0.2": LRQConfig(rank=16, refine=0.2),
}
BOTH_LOOPS = "ppl=1.01"  # the others run in ours only


def main() -> None:
    folder = start(parser(__doc__, "folder")).folder
    opened = open_dense(MODEL)
    valid = opened.windows(str(folder / "valid.txt"), CALIBRATION_TOKENS + VERIFY_TOKENS, CONTEXT)
    calibration, held_out = valid.split(CALIBRATION_TOKENS // CONTEXT)
    test = opened.windows(str(folder / "test.txt"), TOKENS, CONTEXT)
    stats = calibrate(opened.model, calibration, sensitivity=True)
    stats.text = "WikiText-2 valid"
    settings = {"model": MODEL, "context": CONTEXT, "calibration_tokens": CALIBRATION_TOKENS, "tokens": TOKENS}
    with tempfile.TemporaryDirectory() as place:
        plans, quality = plan(opened, stats, held_out, test, Path(place))
        write("plans", {**settings, "held_out_tokens": VERIFY_TOKENS}, plans)
        quality += [convert(opened, method, stats, test, Path(place) / name) for name, method in FIXED.items()]
        quality += [dense_or_torchao(opened, test, dtype, kind) for dtype, kind in OTHERS]
        del stats
        report = bench(subjects(place))
    for row in report["rows"]:
        row["name"], row["model"] = row["name"].replace(f"{place}/", ""), Path(row["model"]).name
    show_table(HEADERS, bench_table(report))
    rows = report.pop("rows")
    write("speed", {**settings, **report}, [{"quality": quality, "rows": rows}])


def subjects(place: str) -> list[Subject]:
    """Dense and torchao, one converted model in both loops, and the rest in ours."""
    others = [name for name in (*BUDGETS, *FIXED) if name != BOTH_LOOPS]
    return [
        *subjects_for([f"{place}/{BOTH_LOOPS}"], MODEL, torchao=True),
        *(Subject(f"{place}/{name}", "decode") for name in others),
    ]


def plan(
    opened: Opened, stats: Stats, held_out: torch.Tensor, test: torch.Tensor, place: Path
) -> tuple[list[Row], list[Row]]:
    """What the planner says for each budget, and the quality of what it makes; the models go to `place`."""
    plans, quality = [], []
    planner, prepared = timed(lambda: Planner(opened.model, stats, {"valid": held_out}, lm_head=True))
    for text in BUDGETS:
        chosen, seconds = timed(functools.partial(planner.plan, Budget.parse(text)))
        quality.append(convert(opened, chosen.method(), stats, test, place / text))
        counts = [option.setting for option in chosen.chosen.values()]
        plans.append(
            {
                "budget": text,
                "predicted": chosen.predicted,
                "held_out": dataclasses.asdict(chosen.measured["valid"]),
                "test": {key: quality[-1][key] for key in ("ppl_ratio", "top1", "bits")},
                "settings": {str(s): counts.count(s) for s in dict.fromkeys(counts)},
                "planner_s": prepared + seconds,
            }
        )
        print(plans[-1], flush=True)
    return plans, quality


OTHERS = (("float32", None), ("bfloat16", None), *(("bfloat16", kind) for kind in TORCHAO))


def convert(
    opened: Opened, method: Method, stats: Stats, test: torch.Tensor, directory: Path, *, lm_head: bool = True
) -> Row:
    """Convert a twin, by default with the output embedding, save it, and measure its quality."""
    model = twin(opened.model)
    layers = convert_(model, method, stats, lm_head=lm_head)
    with atomic_path(directory) as temporary:
        checkpoint.Checkpoint(model, opened.tokenizer, method, layers, provenance(opened, stats)).save(temporary)
    return {"name": directory.name, **figures(opened, model, test)}


def dense_or_torchao(opened: Opened, test: torch.Tensor, dtype: str, kind: str | None) -> Row:
    """Quality of the dense model in another dtype, and of torchao's weight-only quantisation of it."""
    model = copy.deepcopy(opened.model).to(getattr(torch, dtype))
    if kind is not None:
        quantize_torchao(model, kind)
    weights = [module.weight for module in linears(model).values()]
    stored = 8 * sum(map(stored_bytes, weights)) / sum(weight.numel() for weight in weights)
    return {"name": Subject(MODEL, "generate", dtype, kind).name, **figures(opened, model, test), "bits": stored}


def stored_bytes(weight: Any) -> int:
    """Of a tensor, or of the tensors that a subclass wraps."""
    if type(weight) in {torch.Tensor, torch.nn.Parameter}:
        return int(weight.nbytes)
    return sum(getattr(weight, name).nbytes for name in weight.__tensor_flatten__()[0])


def figures(opened: Opened, model: Any, test: torch.Tensor) -> Row:
    e = evaluate(opened.model, model, test)
    found = {"ppl_dense": e.ppl_dense, "ppl_ratio": e.ppl_ratio, "top1": e.top1, "kl_mean": e.kl_mean}
    return {**found, "bits": e.reads.bits_per_weight}


def of_budget(where: str) -> Callable[[Row], str]:
    """A cell: what is budgeted, as found there."""

    def cell(r: Row) -> str:
        kind = r["budget"].partition("=")[0]
        value = r[where].get("ppl_ratio" if kind == "ppl" else kind)
        return "-" if value is None else number(value, 4)

    return cell


PLANS: Columns = {
    "budget": lambda r: r["budget"],
    "predicted": of_budget("predicted"),
    "held-out valid": of_budget("held_out"),
    "test": of_budget("test"),
    "groups": lambda r: ", ".join(f"{n} x {'dense' if name == 'None' else name}" for name, n in r["settings"].items()),
    "linears predicted x dense": lambda r: f"{r['predicted']['speedup']:.2f}",
    "minutes": lambda r: f"{r['planner_s'] / 60:.1f}",
}


def plans(content: Content) -> str:
    settings = content["settings"]
    return f"""## Plans within budgets

`convert --budget`, with `--lm-head`. What is budgeted, as predicted from the groups one by one, as measured on
{settings["held_out_tokens"]:,} tokens of valid that were not calibrated on, and on {settings["tokens"]:,} tokens of
test, which the planner never sees. {source(content)}

{table(content["results"], PLANS)}
"""


def label(r: Row) -> str:
    planned = "=" in r["quality"]["name"].partition(" ")[0]
    return ("plan for " if planned else "") + r["name"].removeprefix(f"{MODEL} ")


QUALITY: Columns = {
    "model, loop": label,
    "ppl ratio": lambda r: number(r["quality"]["ppl_ratio"], 4),
    "bits": lambda r: f"{r['quality']['bits']:.2f}",
    "decode x dense": lambda r: f"{r['decode_speedup']:.2f}",
}
SPEED: Columns = {
    "10–90 %": lambda r: " – ".join(
        f"{x / r['decode_tok_s'] * r['decode_speedup']:.2f}" for x in r["decode_tok_s_quantiles"]
    ),
    "prefill x dense": lambda r: f"{r['prefill_speedup']:.2f}",
    "MB/token": lambda r: shown(r["bytes_per_token"], ".0f", 1e6),
    "of a copy": lambda r: shown(r.get("ceiling_share"), ".0%"),
}


def rows(content: Content) -> list[Row]:
    """What ran, each row with the quality of its model, whose name its own begins with."""
    (result,) = content["results"]
    longest_first = sorted(result["quality"], key=lambda q: len(q["name"]), reverse=True)
    return [
        {**r, "quality": next(q for q in longest_first if r["name"].startswith(q["name"]))}
        for r in result["rows"]
        if "error" not in r
    ]


def section(content: Content) -> str:
    settings, measured = content["settings"], content["results"][0]["rows"]
    failed = "".join(f"\n{r['name']} did not run: {r['error']}\n" for r in measured if "error" in r)
    return f"""## Speed at batch 1 on a CPU

SmolLM2-135M, greedy, prompt of {settings["prompt_tokens"]} tokens, {settings["new_tokens"]} new ones, every subject in
a process of its own, in turn, {settings["rounds"]} rounds: medians as ratios to *dense*, the faster of transformers'
`generate()` in float32 and bfloat16. *generate* is that loop, *decode* ours. Converted models have an int8 output
embedding, torchao's are converted likewise. *compiled*: static cache and `torch.compile`. *of a copy*: weight bytes per
second over what a plain copy moves. Quality on {settings["tokens"]:,} test tokens.
torchao {settings["torchao"]}. {source(content)}

{table(rows(content), QUALITY, SPEED)}
{failed}"""


if __name__ == "__main__":
    main()
