"""`rankgate demo`: the whole story on the embedded SmolLM2-135M, in a few minutes on two CPU cores."""

from __future__ import annotations

import platform
import tempfile
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers

from rankgate import __version__
from rankgate.common.copies import twin
from rankgate.common.files import check_writable
from rankgate.conversion.budget import Budget
from rankgate.conversion.calibration import Stats
from rankgate.conversion.convert import convert_
from rankgate.conversion.plan import HEADERS as PLAN_HEADERS
from rankgate.conversion.plan import QUICK, Planner
from rankgate.conversion.plan import table as plan_table
from rankgate.hub.checkpoint import Checkpoint
from rankgate.hub.opening import Opened, open_dense
from rankgate.hub.sources import DEFAULT
from rankgate.hub.texts import CALIBRATION, HELD_OUT
from rankgate.methods import ASVDConfig, GSIConfig, Int4Config, Method, SparseConfig
from rankgate.reporting.analyze import activation_profiles, weight_spectra
from rankgate.reporting.bench import HEADERS as SPEED_HEADERS
from rankgate.reporting.bench import bench, subjects_for
from rankgate.reporting.bench import table as speed_table
from rankgate.reporting.page import Report
from rankgate.reporting.pipeline import Reference, Result, provenance, statistics
from rankgate.reporting.spectra import TOLERANCES, plots, profiles_table, spectra_summary
from rankgate.reporting.tables import HEADERS, describe, row, verdict

CONTEXT = 512
CALIBRATION_TOKENS = 8192
CHECK_TOKENS = 4096
LOSS = 0.02  # of perplexity: what so few tokens can tell from none
TOKENS = 1024
PROMPTS = 2
SHOWN_PROMPT = 0

BUDGET = Budget("ppl", 1.01)
BENCH_ROUNDS, NEW_TOKENS = 3, 64

METHODS: tuple[Method, ...] = (
    GSIConfig(rank=0.25, eps=0.05),
    ASVDConfig(rank=0.5),
    SparseConfig(keep=0.5),
    Int4Config(),
)


def demo(
    output: str, say: Callable[[str], None], show_table: Callable[[Sequence[str], Sequence[Sequence[str]]], None]
) -> dict[str, Any]:
    """Load, calibrate, convert with each method and as planned, evaluate on held-out text, time, report.

    Returns all rows as JSON values.
    """
    check_writable(output)
    say(f"loading {DEFAULT}")
    opened = open_dense(DEFAULT)
    say(f"calibrating on {CALIBRATION_TOKENS:,} tokens of {CALIBRATION}")
    calibration = opened.windows(CALIBRATION, CALIBRATION_TOKENS + CHECK_TOKENS, CONTEXT)
    seen, rest = calibration.split([CALIBRATION_TOKENS // CONTEXT, CHECK_TOKENS // CONTEXT])
    unseen = opened.windows(HELD_OUT, TOKENS, CONTEXT)
    stats = statistics(opened, CALIBRATION, CALIBRATION_TOKENS, CONTEXT, sensitivity=True, progress=True)
    reference = Reference.of(opened, unseen, PROMPTS)
    results: list[Result] = []
    for number, method in enumerate(METHODS, 1):
        say(f"[{number} of {len(METHODS) + 1}] {describe(method.record())}")
        results.append(reference.measure(method, stats, progress=True))
    say(f"[{len(METHODS) + 1} of {len(METHODS) + 1}] planning within {BUDGET}, int8 output embedding")
    plan = Planner(opened.model, stats, {CALIBRATION: rest}, lm_head=True, settings=QUICK, progress=True).plan(BUDGET)
    planned = plan.method()
    results.append(reference.measure(planned, stats, lm_head=True, progress=True))
    records = [{**result.record(), "fire_rates": None} for result in results]
    rows = [row(record) for record in records]
    show_table(HEADERS, rows)
    print(verdict(records, LOSS))
    say("\ntiming dense and planned, in turn")
    speed = timed(opened, planned, stats)
    show_table(SPEED_HEADERS, speed_table(speed))
    print(conclusion(speed, records[-1]))
    samples = list(_samples(results))
    for title, text in samples:
        print(f"\n{title}\n{textwrap.indent(text.strip(), '    ')}")
    say("\nanalysing weights and activations for the report")
    spectra = weight_spectra(opened.model, progress=True)
    profiles = activation_profiles(
        opened.model, stats, {"in-sample": seen[: len(unseen)], "held-out": unseen}, progress=True
    )
    report = Report(
        f"Rankgate on {DEFAULT}",
        {
            "model": "SmolLM2-135M-Instruct, weights dequantised from Q4_1 to float32",
            "calibration": f"{stats.tokens:,} tokens of {CALIBRATION}",
            "evaluation": f"{TOKENS:,} tokens of {HELD_OUT}, fixed windows of {CONTEXT}",
            "versions": f"rankgate {__version__}, torch {torch.__version__}, transformers {transformers.__version__}, "
            f"Python {platform.python_version()}",
        },
        [
            (verdict(records, LOSS), LEGEND, HEADERS, rows),
            (conclusion(speed, records[-1]), SPEED_LEGEND, SPEED_HEADERS, speed_table(speed)),
            ("The plan", f"Settings chosen within {BUDGET}.", PLAN_HEADERS, plan_table(plan)),
            ("Rank of the weights", "Median layer of each kind; the last row is the model.", *spectra_summary(spectra)),
            ("Inputs", "Effective rank of the second moment; median residual.", *profiles_table(profiles)),
        ],
        samples,
        plots(spectra, profiles, TOLERANCES),
    )
    say(f"wrote {report.write(output)}")
    return {"model": DEFAULT, "results": records, "plan": plan.predicted, "speed": speed}


def timed(opened: Opened, method: Method, stats: Stats) -> dict[str, Any]:
    """The bench of the dense model and of a conversion with `method`."""
    with tempfile.TemporaryDirectory() as place:
        directory = Path(place) / "planned"
        model = twin(opened.model)
        layers = convert_(model, method, stats, lm_head=True)
        Checkpoint(model, opened.tokenizer, method, layers, provenance(opened, stats)).save(directory)
        del model
        report = bench(
            subjects_for([str(directory)], DEFAULT, torchao=False),
            new_tokens=NEW_TOKENS,
            rounds=BENCH_ROUNDS,
            progress=True,
        )
        for line in report["rows"]:
            line["name"] = line["name"].replace(str(directory), "planned")
    return report


def conclusion(speed: dict[str, Any], record: dict[str, Any]) -> str:
    """One sentence: how much faster at what loss."""
    ours = max((line for line in speed["rows"] if not line["dense"]), key=lambda line: line["decode_tok_s"])
    return (
        f"Planned for {BUDGET}, which holds on {CHECK_TOKENS:,} tokens beside the calibration: "
        f"{ours['decode_speedup']:.1f} x the tokens per second of dense generate(); on the {record['tokens']:,} tokens "
        f"of the table perplexity x {record['ppl_ratio']:.4f}, top-1 {record['top1']:.3f}."
    )


SPEED_LEGEND = (
    "Batch 1, each in a process of its own, measured in turn. Dense is generate() of transformers in float32 and "
    "bfloat16; decode is Rankgate's loop, which gives the same tokens as generate()."
)
LEGEND = (
    "Ratio of perplexities, share of equal top-1 predictions, KL(dense ‖ converted) in nats, share of prompts "
    "continued with exactly the same text, share of tokens or channels whose gate opened. Reads: weight bytes per "
    "token of the linear layers over dense, modelled from the stored bytes and the measured fire rate; above 1 the "
    "method reads more than dense. Layers that would not get smaller stay dense."
)


def _samples(results: list[Result]) -> list[tuple[str, str]]:
    first = results[0].text
    assert first is not None
    samples = [("prompt", first.prompts[SHOWN_PROMPT]), ("dense", first.dense[SHOWN_PROMPT])]
    for result in results:
        if result.text and result.conversion and not result.conversion.in_sample:
            title = describe(result.conversion.method.record())
            samples.append((title, result.text.converted[SHOWN_PROMPT]))
    return samples
