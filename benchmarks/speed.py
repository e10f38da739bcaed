"""Plans within budgets, and how fast everything decodes: results/plans.json and results/speed.json.

    python benchmarks/speed.py ../shared/data/wikitext-2

SmolLM2-135M: one calibration on valid.txt, a plan for each budget, and fixed settings beside them; quality on test.txt,
speed at batch 1 in turn with dense and torchao, which must be installed. About 40 minutes on two cores that do nothing
else, half of it for torchao's compiler.
"""

from __future__ import annotations

import copy
import dataclasses
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from provenance import SEED, write

from rankgate.common.files import atomic_path
from rankgate.common.terminal import quiet_libraries, show_table
from rankgate.conversion.calibration import Stats, calibrate
from rankgate.conversion.convert import convert_, twin
from rankgate.conversion.evaluation import evaluate
from rankgate.conversion.groups import linears
from rankgate.conversion.plan import VERIFY_TOKENS, Budget, Planner
from rankgate.hub import checkpoint
from rankgate.hub.opening import Opened, open_dense
from rankgate.hub.sources import DEFAULT
from rankgate.methods import Int8Config, LRQConfig, Method
from rankgate.reporting.bench import HEADERS, TORCHAO, Subject, bench, quantize_torchao, subjects_for, table
from rankgate.reporting.pipeline import provenance

CONTEXT = 512
CALIBRATION_TOKENS = 16_384
TOKENS = 16_384
BUDGETS = ("ppl=1.01", "top1=0.95", "bits=5")
FIXED: dict[str, Method] = {
    "int8": Int8Config(),
    "lrq r=16": LRQConfig(rank=16, refine=0.0),
    "lrq r=16 refine=0.2": LRQConfig(rank=16, refine=0.2),
}
BOTH_LOOPS = "ppl=1.01"  # the others run in ours only


def main() -> None:
    folder = Path(sys.argv[1])
    quiet_libraries()
    torch.manual_seed(SEED)
    opened = open_dense(DEFAULT)
    valid = opened.windows(str(folder / "valid.txt"), CALIBRATION_TOKENS + VERIFY_TOKENS, CONTEXT)
    calibration, held_out = valid.split(CALIBRATION_TOKENS // CONTEXT)
    test = opened.windows(str(folder / "test.txt"), TOKENS, CONTEXT)
    stats = calibrate(opened.model, calibration, sensitivity=True)
    stats.text = "WikiText-2 valid"
    settings = {"model": DEFAULT, "context": CONTEXT, "calibration_tokens": CALIBRATION_TOKENS, "tokens": TOKENS}
    with tempfile.TemporaryDirectory() as place:
        plans, quality = plan(opened, stats, held_out, test, Path(place))
        write("plans", {**settings, "held_out_tokens": VERIFY_TOKENS}, plans)
        quality += [convert(opened, method, stats, test, Path(place) / name) for name, method in FIXED.items()]
        quality += [dense_or_torchao(opened, test, dtype, kind) for dtype, kind in OTHERS]
        del stats
        report = bench(subjects(place))
    for row in report["rows"]:
        row["name"], row["model"] = row["name"].replace(f"{place}/", ""), Path(row["model"]).name
    show_table(HEADERS, table(report))
    rows = report.pop("rows")
    write("speed", {**settings, **report}, [{"quality": quality, "rows": rows}])


def subjects(place: str) -> list[Subject]:
    """Dense and torchao, one converted model in both loops, and the rest in ours."""
    others = [name for name in (*BUDGETS, *FIXED) if name != BOTH_LOOPS]
    return [
        *subjects_for([f"{place}/{BOTH_LOOPS}"], DEFAULT, torchao=True),
        *(Subject(f"{place}/{name}", "decode") for name in others),
    ]


def plan(
    opened: Opened, stats: Stats, held_out: torch.Tensor, test: torch.Tensor, place: Path
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """What the planner says for each budget, and the quality of what it makes; the models go to `place`."""
    plans, quality = [], []
    start = time.perf_counter()
    planner = Planner(opened.model, stats, held_out, lm_head=True)
    prepared = time.perf_counter() - start
    for text in BUDGETS:
        start = time.perf_counter()
        chosen = planner.plan(Budget.parse(text))
        seconds = time.perf_counter() - start
        quality.append(convert(opened, chosen.method(), stats, test, place / text))
        counts = [option.setting for option in chosen.chosen.values()]
        plans.append(
            {
                "budget": text,
                "predicted": chosen.predicted,
                "held_out": dataclasses.asdict(chosen.measured),
                "test": {key: quality[-1][key] for key in ("ppl_ratio", "top1", "bits")},
                "settings": {str(s): counts.count(s) for s in dict.fromkeys(counts)},
                "planner_s": prepared + seconds,
            }
        )
        print(plans[-1], flush=True)
    return plans, quality


OTHERS = (("float32", None), ("bfloat16", None), *(("bfloat16", kind) for kind in TORCHAO))


def convert(opened: Opened, method: Method, stats: Stats, test: torch.Tensor, directory: Path) -> dict[str, Any]:
    """Convert a twin with the output embedding, save it, and measure its quality."""
    model = twin(opened.model)
    layers = convert_(model, method, stats, lm_head=True)
    with atomic_path(directory) as temporary:
        checkpoint.Checkpoint(model, opened.tokenizer, method, layers, provenance(opened, stats)).save(temporary)
    return {"name": directory.name, **figures(opened, model, test)}


def dense_or_torchao(opened: Opened, test: torch.Tensor, dtype: str, kind: str | None) -> dict[str, Any]:
    """Quality of the dense model in another dtype, and of torchao's weight-only quantisation of it."""
    model = copy.deepcopy(opened.model).to(getattr(torch, dtype))
    if kind is not None:
        quantize_torchao(model, kind)
    weights = [module.weight for module in linears(model).values()]
    stored = 8 * sum(map(stored_bytes, weights)) / sum(weight.numel() for weight in weights)
    return {"name": Subject(DEFAULT, "generate", dtype, kind).name, **figures(opened, model, test), "bits": stored}


def stored_bytes(weight: Any) -> int:
    """Of a tensor, or of the tensors that a subclass wraps."""
    if type(weight) in {torch.Tensor, torch.nn.Parameter}:
        return int(weight.nbytes)
    return sum(getattr(weight, name).nbytes for name in weight.__tensor_flatten__()[0])


def figures(opened: Opened, model: Any, test: torch.Tensor) -> dict[str, Any]:
    e = evaluate(opened.model, model, test)
    return {"ppl_ratio": e.ppl_ratio, "top1": e.top1, "kl_mean": e.kl_mean, "bits": e.reads.bits_per_weight}


if __name__ == "__main__":
    main()
