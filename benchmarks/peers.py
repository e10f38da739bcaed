"""Beside llama.cpp on the same machine: results/peers/MODEL.json.

    python benchmarks/peers.py Q4_0.gguf Q8_0.gguf BF16.gguf [--model smollm2-135m]

Files of the same model, by llama-quantize without an importance matrix; llama-cpp-python must be installed. Converted
with the default calibration. Decoding, prompts of 512 and of 2,048 tokens, eight sequences at once, and what a busy
core costs; about 15 minutes on two cores that do nothing else, twice that for a large vocabulary.
"""

from __future__ import annotations

import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from frame import Columns, Content, Row, in_turn, of_devices, parser, source, start, table, write
from matplotlib.figure import Figure

from rankgate.common.copies import twin
from rankgate.common.files import atomic_path
from rankgate.conversion.convert import convert_
from rankgate.decoding.loop import fast_generate
from rankgate.hub import checkpoint
from rankgate.hub.opening import Opened, open_any, open_dense
from rankgate.hub.texts import CALIBRATION, HELD_OUT
from rankgate.methods import Int8Config, LRQConfig, Method
from rankgate.reporting import pipeline
from rankgate.reporting.bench import bench, subjects_for
from rankgate.reporting.runner import NEVER
from rankgate.reporting.tables import number

METHODS: dict[str, Method] = {
    "int8": Int8Config(),
    "lrq r=16": LRQConfig(rank=16, refine=0.0),
    "lrq r=16 refine=0.05": LRQConfig(rank=16, refine=0.05),
}
CALIBRATION_TOKENS, CONTEXT = 8192, 512
LONG, BATCH, PROMPT, FEW, NEW = 2048, 8, 32, 4, 68


def main() -> None:
    options = parser(__doc__, "--model")
    options.add_argument("files", nargs="+", type=Path, metavar="FILE")
    arguments = start(options)
    opened = open_dense(arguments.model)
    stats = pipeline.statistics(opened, CALIBRATION, CALIBRATION_TOKENS, CONTEXT, sensitivity=True)
    with tempfile.TemporaryDirectory() as place:
        for name, method in METHODS.items():
            model = twin(opened.model)
            layers = convert_(model, method, stats, lm_head=True)
            with atomic_path(Path(place) / name) as temporary:
                saved = checkpoint.Checkpoint(
                    model, opened.tokenizer, method, layers, pipeline.provenance(opened, stats)
                )
                saved.save(temporary)
        names = [f"{place}/{name}" for name in METHODS]
        subjects = subjects_for(names, opened.name, torchao=False, gguf=[str(file) for file in arguments.files])
        chosen = [s for s in subjects if s.loop != "generate" or s.is_dense]
        report = bench(chosen, progress=True)
        longer = bench(chosen, new_tokens=3, rounds=3, long_prompt=LONG, quality=False, progress=True)
        others = {name: together(open_any(f"{place}/{name}")) for name in METHODS}
        rows = report.pop("rows")
        for row, other in zip(rows, longer["rows"], strict=True):
            row["prefill_long_tok_s"] = other["prefill_tok_s"]
            row["name"] = row["name"].replace(f"{place}/", "").replace(f"{Path(row['model']).parent}/", "")
            row["model"] = Path(row["model"]).name
            if row["model"] in METHODS:
                row.update(others[row["model"]])
        settings = {"model": Path(opened.name).name, "calibration_tokens": CALIBRATION_TOKENS, "batch": BATCH}
    write(f"peers/{settings['model']}", {**settings, "long": LONG, **report}, rows)


def together(opened: Opened) -> Row:
    """Tokens per second of eight sequences at once against one, and of one alone against one beside a busy process."""
    ids = opened.windows(HELD_OUT, BATCH * CONTEXT, CONTEXT)[:, :PROMPT]

    def write(sequences: int, new: int) -> None:
        given = ids[:sequences]
        how: dict[str, Any] = {"eos_token_id": NEVER, "do_sample": False, "pad_token_id": 0, "max_new_tokens": new}
        fast_generate(opened.model, given, attention_mask=torch.ones_like(given), **how)

    def seconds(*counts: int) -> list[float]:
        """Of the tokens after the first few, by numbers of sequences."""
        cases = {f"{n} {new}": partial(write, n, new) for n in counts for new in (FEW, NEW)}
        times = {name: statistics.median(taken) for name, taken in in_turn(cases, 5).items()}
        return [times[f"{n} {NEW}"] - times[f"{n} {FEW}"] for n in counts]

    one, several = seconds(1, BATCH)
    other = multiprocessing.get_context("spawn").Process(target=_spin, daemon=True)
    other.start()
    time.sleep(5)  # until it spins
    (beside,) = seconds(1)
    other.terminate()
    return {"batch_speedup": BATCH * one / several, "busy_slowdown": beside / one}


def _spin() -> None:
    while True:
        pass


def matches(row: Row, files: list[Row]) -> Row:
    """The file with about as many bits."""
    wanted = "Q8_0" if row["model"] == "int8" else "Q4_0" if row["model"].startswith("lrq") else "BF16"
    return next((f for f in files if wanted.lower() in f["model"].lower()), files[0])


def against(key: str) -> Any:
    return lambda row: "-" if row["match"] is row else f"{row[key] / row['match'][key]:.2f}"


COLUMNS: Columns = {
    "model, loop": lambda r: r["name"],
    "of llama.cpp's": lambda r: "-" if r["match"] is r else r["match"]["model"].removesuffix(".gguf").upper(),
    "decode": against("decode_tok_s"),
    "prompt of 512": against("prefill_tok_s"),
    "prompt of 2,048": against("prefill_long_tok_s"),
    "of a copy": lambda r: f"{r['ceiling_share']:.0%}" if "ceiling_share" in r else "-",
    "8 at once": lambda r: f"{r['batch_speedup']:.1f}" if "batch_speedup" in r else "-",
    "beside a busy core": lambda r: f"{r['busy_slowdown']:.2f}" if "busy_slowdown" in r else "-",
    "KL": lambda r: number(r["kl"], 4) if "kl" in r else "-",
    "top-1": lambda r: number(r["top1"], 3) if "top1" in r else "-",
}


def overview() -> str:
    """The README's table: of every model the converted rows, and the dense one in our loop."""
    rows = []
    for content in of_devices("peers"):
        dense = content["settings"]["model"]
        name = dense.removesuffix(".gguf")
        rows += [{**r, "name": f"{name} {r['name'].removeprefix(f'{dense} ')}"} for r in ours(content)]
    return table([r for r in rows if r["loop"] == "decode" and "float32" not in r["name"]], OVERVIEW)


def files_of(content: Any) -> list[Row]:
    return [r for r in content["results"] if r["loop"] == "llama.cpp"]


def ours(content: Any) -> list[Row]:
    """The rows that are not llama.cpp's, each with the file to compare it with."""
    files = files_of(content)
    return [{**r, "match": matches(r, files)} for r in content["results"] if r["loop"] != "llama.cpp"]


OVERVIEW: Columns = {
    "model, loop": lambda r: r["name"],
    "of llama.cpp's": COLUMNS["of llama.cpp's"],
    "decode": COLUMNS["decode"],
    "prompt of 512": COLUMNS["prompt of 512"],
    "prompt of 2,048": COLUMNS["prompt of 2,048"],
    "KL": COLUMNS["KL"],
    "its KL": lambda r: number(r["match"]["kl"], 4),
}


def section() -> str:
    parts = []
    for content in of_devices("peers"):
        title = f"### {content['settings']['model']}\n\n{source(content)}"
        parts.append(f"{title}\n\n{table(ours(content), COLUMNS)}\n{of_files(files_of(content))}")
    body = "\n".join(parts)
    return f"""## Beside llama.cpp (CPU)

Tokens per second as multiples of llama.cpp's on the same machine, in turn, with its file of about as many bits; the two
`generate()` rows are transformers' own loop. `8 at once`: tokens per second of eight sequences over those of one, both
in our loop. `beside a busy core`: seconds of a token over those without. KL and top-1 from the dense model on 2,048
held-out tokens. Its files are by llama-quantize, without an importance matrix.

![divergence from the dense model against speed, beside llama.cpp](peers.png)

{body}"""


def of_files(files: list[Row]) -> str:
    """What the files are worth beside each other and in quality."""
    slowest = min(files, key=lambda r: r["decode_tok_s"])
    columns: Columns = {
        "llama.cpp's": lambda r: r["model"].removesuffix(".gguf").upper(),
        f"decode x {slowest['model'].removesuffix('.gguf').upper()}": lambda r: (
            f"{r['decode_tok_s'] / slowest['decode_tok_s']:.2f}"
        ),
        "KL": lambda r: number(r["kl"], 4),
        "top-1": lambda r: number(r["top1"], 3),
    }
    return f"\n{table(files, columns)}\n"


def plot(contents: Sequence[Content]) -> Figure:
    """Divergence against speed, a panel for each model: one wants to be low and on the right."""
    figure = Figure(figsize=(4.8 * len(contents), 4), layout="constrained")
    for axes, content in zip(figure.subplots(1, len(contents), squeeze=False).flat, contents, strict=True):
        unit = next(r["decode_tok_s"] for r in files_of(content) if "bf16" in r["model"].lower())
        for r in content["results"]:
            if "kl" in r:
                theirs = r["loop"] == "llama.cpp"
                x, y = r["decode_tok_s"] / unit, r["kl"]
                axes.scatter(x, y, color="C3" if theirs else "C0", s=24, zorder=3)
                label = f"llama.cpp {r['model'].removesuffix('.gguf').upper()}" if theirs else r["model"]
                axes.annotate(label, (x, y), xytext=(-4, 6), textcoords="offset points", ha="right", fontsize=8)
        axes.margins(y=0.15)
        name = content["settings"]["model"].removesuffix(".gguf")
        axes.set(title=name, yscale="log", xlabel="tokens per second, × llama.cpp's BF16", xlim=(0, None))
        axes.set(ylabel="KL from the dense model, nats per token")
    return figure


if __name__ == "__main__":
    main()
