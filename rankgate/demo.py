"""`rankgate demo`: the whole story on the embedded SmolLM2-135M, in a few minutes on two CPU cores."""

from __future__ import annotations

import platform
import textwrap
from collections.abc import Callable, Sequence
from typing import Any

import torch
import transformers

from rankgate import __version__
from rankgate.analyze import activation_profiles, weight_spectra
from rankgate.files import check_writable
from rankgate.methods import ASVDConfig, GSIConfig, Method, SVDConfig
from rankgate.pipeline import Reference, Result, open_dense, statistics
from rankgate.report import TOLERANCES, Report, plots, profiles_table, spectra_summary
from rankgate.sources import DEFAULT
from rankgate.tables import HEADERS, describe, row, verdict
from rankgate.texts import CALIBRATION, HELD_OUT

CONTEXT = 512
CALIBRATION_TOKENS = 8192
TOKENS = 1024
PROMPTS = 2
SHOWN_PROMPT = 0

METHODS: tuple[Method, ...] = (
    GSIConfig(rank=0.25, eps=0.05),
    GSIConfig(rank=0.25, eps=0.2),
    GSIConfig(rank=0.25, eps=0.2, basis="context"),
    SVDConfig(energy=0.9),
    ASVDConfig(rank=0.5),
)
IN_SAMPLE: Method = GSIConfig(rank=0.25, eps=0.05)


def demo(
    output: str, say: Callable[[str], None], show_table: Callable[[Sequence[str], Sequence[Sequence[str]]], None]
) -> dict[str, Any]:
    """Load, calibrate, convert with each method, evaluate on held-out text, report. Returns all rows as JSON values."""
    check_writable(output)
    say(f"loading {DEFAULT}")
    opened = open_dense(DEFAULT)
    say(f"calibrating on {CALIBRATION_TOKENS:,} tokens of Python's language reference")
    seen = opened.windows(CALIBRATION, CALIBRATION_TOKENS, CONTEXT)[: TOKENS // CONTEXT]
    unseen = opened.windows(HELD_OUT, TOKENS, CONTEXT)
    stats = statistics(opened, CALIBRATION, CALIBRATION_TOKENS, CONTEXT, progress=True)
    held_out, in_sample = (Reference.of(opened, windows, PROMPTS) for windows in (unseen, seen))
    runs = [(method, held_out) for method in METHODS] + [(IN_SAMPLE, in_sample)]
    results: list[Result] = []
    for number, (method, reference) in enumerate(runs, 1):
        say(f"[{number} of {len(runs)}] {describe(method.record())}")
        results.append(reference.measure(method, stats, in_sample=reference is in_sample, progress=True))
    records = [{**result.record(), "fire_rates": None} for result in results]
    rows = [row(record) for record in records]
    show_table(HEADERS, rows)
    print(verdict(records))
    samples = list(_samples(results))
    for title, text in samples:
        print(f"\n{title}\n{textwrap.indent(text.strip(), '    ')}")
    say("\nanalysing weights and activations for the report")
    spectra = weight_spectra(opened.model, progress=True)
    profiles = activation_profiles(opened.model, stats, {"in-sample": seen, "held-out": unseen}, progress=True)
    report = Report(
        f"Rankgate on {DEFAULT}",
        {
            "model": "SmolLM2-135M-Instruct, weights dequantised from Q4_1 to float32",
            "calibration": f"{stats.tokens:,} tokens of Python's language reference",
            "evaluation": f"{TOKENS:,} other tokens of it, fixed windows of {CONTEXT}",
            "versions": f"rankgate {__version__}, torch {torch.__version__}, transformers {transformers.__version__}, "
            f"Python {platform.python_version()}",
        },
        [
            (verdict(records), LEGEND, HEADERS, rows),
            ("Rank of the weights", "Median layer of each kind; the last row is the model.", *spectra_summary(spectra)),
            ("Inputs", "Effective rank of the second moment; median residual.", *profiles_table(profiles)),
        ],
        samples,
        plots(spectra, profiles, TOLERANCES),
    )
    say(f"wrote {report.write(output)}")
    return {"model": DEFAULT, "results": records}


LEGEND = (
    "Ratio of perplexities, share of equal top-1 predictions, KL(dense ‖ converted) in nats, share of prompts "
    "continued with exactly the same text, share of tokens whose gate opened. Reads: weight bytes per token of the "
    "linear layers over dense, modelled from the stored bytes and the measured fire rate; above 1 the method reads "
    "more than dense. Layers that would not get smaller stay dense."
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
