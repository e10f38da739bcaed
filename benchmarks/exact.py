"""Exact mode on SmolLM2-135M, dense in float32, with drafts of several methods: results/exact/cpu.json.

    python benchmarks/exact.py ../shared/data/wikitext-2 [--device cuda] [--prompts 20] [--model PATH]

WikiText-2 test, 50 prompts of 32 tokens, 128 new ones, greedy. On each prompt dense `generate()`, the dense model in
our loop and exact mode with every draft take turns, timed; what is reported is the share of identical texts, what was
accepted, and how many times as fast as dense `generate()` the median text was written. `lrq` is calibrated on
WikiText-2 valid. The file is written after every prompt. Half an hour on two cores that do nothing else; on a GPU it is
called h100.json and the like.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import fields
from typing import Any

import torch
from frame import MODEL, Columns, Content, Row, card, device_name, parser, place, source, start, table, timed, write

from rankgate.common.copies import twin
from rankgate.conversion.calibration import calibrate
from rankgate.conversion.convert import convert_
from rankgate.decoding.exact import Exact, Statistics
from rankgate.decoding.loop import decode
from rankgate.hub.opening import open_dense
from rankgate.methods import Int4Config, Int8Config, LRQConfig, Method, SVDConfig
from rankgate.reporting.runner import NEVER

DENSE = "none: dense, decode"
PROMPT_TOKENS, NEW_TOKENS = 32, 128
CONTEXT, CALIBRATION_TOKENS = 512, 4096
DRAFTS: dict[str, Method] = {
    "lrq r=16 refine=0.05": LRQConfig(rank=16, refine=0.05),
    "int4": Int4Config(),
    "int8": Int8Config(),
    "svd k=0.5": SVDConfig(rank=0.5, allow_larger=True),
}


def main() -> None:
    options = parser(__doc__, "folder", "--device", "--model")
    options.add_argument("--prompts", type=int, default=50)
    arguments = start(options)
    valid, test, device = str(arguments.folder / "valid.txt"), str(arguments.folder / "test.txt"), arguments.device
    opened = open_dense(arguments.model, device)
    prompts = opened.windows(test, arguments.prompts * PROMPT_TOKENS, PROMPT_TOKENS).to(device)
    stats = calibrate(opened.model, opened.windows(valid, CALIBRATION_TOKENS, CONTEXT), sensitivity=True)
    loops: dict[str, Any] = {DENSE: decode}
    for name, method in DRAFTS.items():
        draft = twin(opened.model)
        convert_(draft, method, stats, lm_head=True)
        loops[name] = Exact(draft)
    del stats
    for loop in (None, *loops.values()):
        generate(opened.model, prompts[:1], loop)  # compiles kernels and captures steps
    rows: dict[str, list[Row]] = {name: [] for name in loops}
    settings = {"model": MODEL, "text": "WikiText-2 test", "prompt_tokens": PROMPT_TOKENS, "new_tokens": NEW_TOKENS}
    settings["device"] = card(device)
    for prompt in prompts.split(1):
        expected, dense_s = generate(opened.model, prompt, None)
        for name, loop in loops.items():
            got, seconds = generate(opened.model, prompt, loop)
            drafts = vars(loop.statistics) if isinstance(loop, Exact) else {}
            rows[name].append({"identical": torch.equal(expected, got), "speedup": dense_s / seconds, **drafts})
        results = [{"draft": name, **summary(texts)} for name, texts in rows.items()]
        write(f"exact/{device_name(device)}", settings, results)
        print(results, flush=True)


def generate(model: Any, prompt: torch.Tensor, loop: Any) -> tuple[torch.Tensor, float]:
    """A greedy text of NEW_TOKENS, and its seconds."""
    options: dict[str, Any] = {"max_new_tokens": NEW_TOKENS, "eos_token_id": NEVER, "do_sample": False}
    if loop is not None:
        options["custom_generate"] = loop
    return timed(
        lambda: model.generate(prompt, attention_mask=torch.ones_like(prompt), pad_token_id=0, **options),
        prompt.device.type,
    )


def summary(texts: list[Row]) -> Row:
    speedups = sorted(text["speedup"] for text in texts)
    result = {
        "texts": len(texts),
        "identical": sum(text["identical"] for text in texts) / len(texts),
        "speedup": statistics.median(speedups),
        "speedup_quantiles": [speedups[round(q * (len(speedups) - 1))] for q in (0.1, 0.9)],
    }
    if "drafted" in texts[0]:
        total = Statistics(**{field.name: sum(text[field.name] for text in texts) for field in fields(Statistics)})
        result |= {**total.record(), "tokens_per_dense_pass": total.new_tokens / total.dense_passes}
    return result


def draft(form: str, value: Callable[[Row], float]) -> Callable[[Row], str]:
    """A cell of the rows that have drafts."""
    return lambda r: format(value(r), form) if "drafted" in r else "–"


EXACT: Columns = {
    "draft": lambda r: r["draft"],
    "identical texts": lambda r: f"{r['identical'] * r['texts']:.0f} of {r['texts']}",
    "acceptance": draft(".3f", lambda r: r["acceptance"]),
    "accepted per verification": draft(".2f", lambda r: r["mean_accepted"]),
    "tokens per dense pass": draft(".2f", lambda r: r["tokens_per_dense_pass"]),
    "pauses per text": draft(".1f", lambda r: r["pauses"] / r["texts"]),
    "speed (tenth to ninetieth percentile)": lambda r: "{:.2f} ({:.2f}–{:.2f})".format(
        r["speedup"], *r["speedup_quantiles"]
    ),
}


def section(content: Content) -> str:
    settings, results = content["settings"], content["results"]
    return f"""## Exact mode ({place(content)})

{settings["model"]} in float32, {results[0]["texts"]} prompts of {settings["prompt_tokens"]} tokens from
{settings["text"]}, {settings["new_tokens"]} new tokens each, greedy. The converted model drafts, the dense one
verifies; a text is identical if every token is that of dense `generate()`. Speed: how many times as fast as that, the
median of the texts; the first row is the dense model alone in our own loop. {source(content)}

{table(results, EXACT)}
"""


if __name__ == "__main__":
    main()
