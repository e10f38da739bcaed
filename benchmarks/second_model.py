"""Gemma-3-270M from a GGUF file, a second real model: results/second_model/quality.json and speed.json.

    python benchmarks/second_model.py ../shared/data/wikitext-2 gemma-3-270m.gguf MODELS
    python benchmarks/second_model.py ../shared/data/wikitext-2 gemma-3-270m.gguf MODELS --speed

The first measures quality on test.txt after the default calibration and leaves the converted models in MODELS, a folder
that it makes; half an hour and 6 GB of memory on two cores. The second measures how fast those are, in turn, and how
long the file takes to open; ten minutes on two cores that do nothing else, and 12 GB.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import patch

import torch
from exact import generate
from frame import Columns, Content, Row, parser, record, shown, source, start, table, timed, write
from speed import convert

from rankgate.conversion.calibration import Stats, calibrate
from rankgate.conversion.plan import VERIFY_TOKENS, Budget, Planner
from rankgate.decoding.loop import decode
from rankgate.hub.opening import Opened, open_dense
from rankgate.hub.texts import CALIBRATION
from rankgate.methods import Int8Config, LRQConfig, Method
from rankgate.reporting.bench import bench
from rankgate.reporting.runner import Subject
from rankgate.reporting.tables import number

MODEL, BUDGET, HEAD = "Gemma-3-270M", "ppl=1.01", " + head"
CONTEXT, CALIBRATION_TOKENS, TOKENS = 512, 8_192, 8_192
PROMPTS, PROMPT_TOKENS = 8, 32
METHODS: dict[str, Method] = {"int8": Int8Config(), "lrq": LRQConfig()}


def main() -> None:
    options = parser(__doc__, "folder")
    options.add_argument("file", type=Path)
    options.add_argument("models", type=Path)
    options.add_argument("--speed", action="store_true")
    options.add_argument("--rounds", type=int, default=5)
    arguments = start(options)
    text = str(arguments.folder / "test.txt")
    if arguments.speed:
        speed(str(arguments.file), arguments.models, text, arguments.rounds)
        return
    opened = open_dense(str(arguments.file))
    settings = {"context": CONTEXT, "calibration_tokens": CALIBRATION_TOKENS, "tokens": TOKENS}
    rows = quality(opened, opened.windows(text, TOKENS, CONTEXT), arguments.models)
    record("second_model/quality", settings, rows)


def quality(opened: Opened, test: torch.Tensor, models: Path) -> Iterator[Row]:
    """Of every method, and of a plan, with the output embedding; without it they are only left in `models`."""
    whole = opened.windows(CALIBRATION, CALIBRATION_TOKENS + VERIFY_TOKENS, CONTEXT)
    windows, held_out = whole.split(CALIBRATION_TOKENS // CONTEXT)
    stats = calibrate(opened.model, windows, sensitivity=True, batch_size=1)
    stats.text = CALIBRATION
    for name, method in METHODS.items():
        convert(opened, method, stats, test[:1], models / name, lm_head=False)
        yield convert(opened, method, stats, test, models / (name + HEAD))
    yield convert(opened, planned(opened, stats, held_out), stats, test, models / (f"plan for {BUDGET}" + HEAD))


def planned(opened: Opened, stats: Stats, held_out: torch.Tensor) -> Method:
    return Planner(opened.model, stats, held_out, lm_head=True).plan(Budget.parse(BUDGET)).method()


def speed(file: str, models: Path, text: str, rounds: int) -> None:
    subjects = [Subject(file, "generate", dtype) for dtype in ("float32", "bfloat16")]
    subjects += [Subject(file, "decode", "float32")]
    subjects += [Subject(str(path), "decode") for path in sorted(models.iterdir())]
    settings = {**opening_seconds(file), "prompts": PROMPTS, "same_text": same_text(open_dense(file), text)}
    report = bench(subjects, new_tokens=100, rounds=rounds, long_prompt=CONTEXT)
    rows = report.pop("rows")
    for row in rows:
        row["name"] = row["name"].replace(f"{models}/", "").replace(file, MODEL)
        row["model"] = Path(row["model"]).name
    write("second_model/speed", {**settings, "load": os.getloadavg()[2], **report}, rows)


def same_text(opened: Opened, text: str) -> int:
    """Of PROMPTS parts of it, those that our loop continues in float32 as `generate()` does."""
    prompts = opened.windows(text, PROMPTS * PROMPT_TOKENS, PROMPT_TOKENS).split(1)
    return sum(torch.equal(*(generate(opened.model, ids, loop)[0] for loop in (None, decode))) for ids in prompts)


def opening_seconds(file: str) -> dict[str, float]:
    """Of a first and a second opening, with a cache that is empty."""
    with tempfile.TemporaryDirectory() as cache, patch.dict(os.environ, RANKGATE_CACHE=cache):
        times = [timed(lambda: open_dense(file))[1] for _ in range(2)]
    return dict(zip(("first_s", "second_s"), times, strict=True))


QUALITY: Columns = {
    "model": lambda r: r["name"],
    "bits": lambda r: f"{r['bits']:.2f}",
    "ppl ratio": lambda r: number(r["ppl_ratio"], 4),
    "KL mean": lambda r: number(r["kl_mean"], 4),
    "top-1": lambda r: number(r["top1"], 4),
}
SPEED: Columns = {
    "model, loop": lambda r: r["name"].removeprefix(f"{MODEL} "),
    "decode x the faster generate()": lambda r: f"{r['decode_speedup']:.2f}",
    "10–90 %": lambda r: " – ".join(
        f"{x / r['decode_tok_s'] * r['decode_speedup']:.2f}" for x in r["decode_tok_s_quantiles"]
    ),
    "MB/token": lambda r: shown(r["bytes_per_token"], ".0f", 1e6),
    "of a copy": lambda r: shown(r.get("ceiling_share"), ".0%"),
}


def section(content: Content) -> str:
    settings, rows = content["settings"], content["results"]
    return f"""## A second model: {MODEL}

From a GGUF file of 4 bits, in float32. {settings["calibration_tokens"]:,} calibration tokens of the default text,
{settings["tokens"]:,} tokens of WikiText-2 test in windows of {settings["context"]}, each begun as the tokenizer begins
a text: with its BOS token. `<unk>` in the text is five characters, not the token of that name, which no model has met.
Dense perplexity {rows[0]["ppl_dense"]:.2f}. *head*: with an int8 output embedding (`--lm-head`). {source(content)}

{table(rows, QUALITY)}
"""


def speeds(content: Content) -> str:
    settings = content["settings"]
    return f"""### Its speed

Tokens per second after the first one, prompt of {settings["prompt_tokens"]} tokens, {settings["new_tokens"]} new ones,
in turn, {settings["rounds"]} rounds; *load* of the machine {settings["load"]:.1f} over 15 minutes. Our loop's text in
float32 is that of `generate()` for {settings["same_text"]} of {settings["prompts"]} prompts. The file opens in
{settings["first_s"]:.0f} s, the next time in {settings["second_s"]:.1f} s. {source(content)}

{table(content["results"], SPEED)}
"""


if __name__ == "__main__":
    main()
