"""Plans within budgets, and how fast everything decodes: results/plans.json and results/speed.json.

    python benchmarks/speed.py ../shared/data/wikitext-2

SmolLM2-135M: one calibration on valid.txt, a plan for each budget, and fixed settings beside them; quality on test.txt,
speed at batch 1 in turn with dense and torchao (as far as it is installed). About 40 minutes on two quiet cores, most
of it for torchao's compiler.
"""

from __future__ import annotations

import copy
import dataclasses
import resource
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from provenance import SEED, write

from rankgate import checkpoint
from rankgate.bench import HEADERS, TORCHAO, Subject, bench, peak_memory, quantize_torchao, subjects_for, table
from rankgate.calibration import calibrate
from rankgate.convert import convert_, twin
from rankgate.evaluation import evaluate
from rankgate.files import atomic_path
from rankgate.methods import Int8Config, LRQConfig, Method
from rankgate.pipeline import Opened, open_dense, provenance
from rankgate.plan import VERIFY_TOKENS, Budget, Planner
from rankgate.sources import DEFAULT
from rankgate.terminal import quiet_libraries, show_table

CONTEXT = 512
CALIBRATION_TOKENS = 16_384
TOKENS = 8_192
BUDGETS = ("ppl=1.01", "top1=0.95", "bits=5")
FIXED: dict[str, Method] = {
    "int8": Int8Config(),
    "lrq-4.6": LRQConfig(rank=16, refine=0.0),
    "lrq-5.4": LRQConfig(rank=16, refine=0.2),
}
CLEAR_PEAK = "5"


def main() -> None:
    folder = Path(sys.argv[1])
    quiet_libraries()
    torch.manual_seed(SEED)
    opened = open_dense(DEFAULT)
    loaded = resident()
    valid = opened.windows(str(folder / "valid.txt"), CALIBRATION_TOKENS + VERIFY_TOKENS, CONTEXT)
    calibration, held_out = valid.split(CALIBRATION_TOKENS // CONTEXT)
    test = opened.windows(str(folder / "test.txt"), TOKENS, CONTEXT)
    stats = calibrate(opened.model, calibration, sensitivity=True)
    stats.text = "WikiText-2 valid"
    settings = {"model": DEFAULT, "context": CONTEXT, "calibration_tokens": CALIBRATION_TOKENS, "tokens": TOKENS}
    quality, plans = [], []
    with tempfile.TemporaryDirectory() as place:
        planner_start = time.perf_counter()
        planner = Planner(opened.model, stats, held_out, lm_head=True)
        prepared = time.perf_counter() - planner_start
        for text in BUDGETS:
            start = time.perf_counter()
            plan = planner.plan(Budget.parse(text))
            seconds = time.perf_counter() - start
            result = convert(opened, plan.method(), stats, test, Path(place) / text)
            quality.append(result)
            counts = [option.setting for option in plan.chosen.values()]
            plans.append(
                {
                    "budget": text,
                    "predicted": plan.predicted,
                    "held_out": dataclasses.asdict(plan.measured),
                    "test": {key: result[key] for key in ("ppl_ratio", "top1", "bits")},
                    "settings": {str(s): counts.count(s) for s in dict.fromkeys(counts)},
                    "planner_s": prepared + seconds,
                }
            )
            print(plans[-1], flush=True)
        for name, method in FIXED.items():
            quality.append(convert(opened, method, stats, test, Path(place) / name))
        write("plans", {**settings, "held_out_tokens": VERIFY_TOKENS}, plans)
        quality += [dense_and_torchao(opened, test, dtype, kind) for dtype, kind in others()]
        models = [str(Path(place) / name) for name in (*BUDGETS, *FIXED)]
        del planner, stats
        report = bench(subjects_for(models, DEFAULT, torchao=True))
    for row in report["rows"]:
        row["name"], row["model"] = row["name"].replace(f"{place}/", ""), Path(row["model"]).name
    show_table(HEADERS, table(report))
    rows = report.pop("rows")
    write("speed", {**settings, **report, "dense_resident_bytes": loaded}, [{"quality": quality, "rows": rows}])


def others() -> list[tuple[str, str | None]]:
    return [("float32", None), ("bfloat16", None), *(("bfloat16", kind) for kind in TORCHAO)]


def convert(opened: Opened, method: Method, stats: Any, test: torch.Tensor, directory: Path) -> dict[str, Any]:
    """Convert a twin with the output embedding, save it, and measure its quality and what it holds."""
    model = twin(opened.model)
    clear_peak()
    before = resident()
    layers = convert_(model, method, stats, lm_head=True)
    peak = peak_memory()
    with atomic_path(directory) as temporary:
        checkpoint.Checkpoint(model, opened.tokenizer, method, layers, provenance(opened, stats)).save(temporary)
    e = evaluate(opened.model, model, test)
    tensors = {t.data_ptr(): t for t in (*model.parameters(), *model.buffers()) if t.device.type != "meta"}
    return {
        "name": directory.name,
        "ppl_ratio": e.ppl_ratio,
        "top1": e.top1,
        "kl_mean": e.kl_mean,
        "bits": e.reads.bits_per_weight,
        "file_bytes": sum(file.stat().st_size for file in directory.iterdir()),
        "tensor_bytes": sum(t.numel() * t.element_size() for t in tensors.values()),
        "resident_before_bytes": before,
        "peak_converting_bytes": peak,
    }


def dense_and_torchao(opened: Opened, test: torch.Tensor, dtype: str, kind: str | None) -> dict[str, Any]:
    """Quality of the dense model in another dtype, and of torchao's weight-only quantisation of it."""
    subject = Subject(DEFAULT, "generate", dtype, kind)
    try:
        model = copy.deepcopy(opened.model).to(getattr(torch, dtype))
        if kind is not None:
            quantize_torchao(model, kind)
        e = evaluate(opened.model, model, test)
    except Exception as error:  # whatever torchao may raise: it is a row of the table
        return {"name": subject.name, "error": " ".join(str(error).split())[:200]}
    return {"name": subject.name, "ppl_ratio": e.ppl_ratio, "top1": e.top1, "kl_mean": e.kl_mean}


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def clear_peak() -> None:
    Path("/proc/self/clear_refs").write_text(CLEAR_PEAK)


if __name__ == "__main__":
    main()
