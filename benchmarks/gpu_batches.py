"""Prompts and several sequences on a GPU, end to end: results/gpu_batches/h100.json.

    python benchmarks/gpu_batches.py [--budget 400]

A model of the shape of Llama-3-8B with random weights in bfloat16: dense, and its linears replaced by random groups,
with 5 % of the channels of `lrq` open. Time to the first token of one prompt of 512, 4,096 and 16,384 tokens, and time
of a step for 1, 8 and 32 sequences through the engine: the difference of 68 and 4 new tokens after a prompt of 64. The
median of three, every method by itself in one process; the file is written after every row.
"""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable, Iterator

import torch
from frame import Columns, Content, Row, card, device_name, in_turn, parser, record, source, start, table
from gpu import DEVICE, quantized
from gpu_decode import PROMPT, Make, build, open_gates, per_token, replace
from transformers import LlamaConfig, PreTrainedModel

from rankgate.conversion.groups import input_groups

SHAPE = LlamaConfig(
    intermediate_size=14336, num_key_value_heads=8, vocab_size=128_256, max_position_embeddings=32_768, head_dim=128
)
METHODS: dict[str, Make | None] = {
    "dense": None,
    "int4": quantized,
    "lrq": functools.partial(quantized, rank=16, opened=0.05),
    "int8": functools.partial(quantized, bits=8),
}
OPENED = 0.05
PROMPTS, SEQUENCES = (512, 4096, 16_384), (1, 8, 32)
FEW, MANY = 4, 68


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--budget", type=float, default=1e9, help="seconds after which no measurement is begun")
    arguments = start(options)
    end = time.monotonic() + arguments.budget
    record(f"gpu_batches/{device_name()}", {"device": card(), "new": [FEW, MANY]}, measured(end))


def measured(end: float) -> Iterator[Row]:
    for method, make in METHODS.items():
        if time.monotonic() < end:
            model = replaced(make)
            for count in SEQUENCES:
                if time.monotonic() < end:
                    yield {"method": method, "sequences": count, "ms": step(model, count)}
            for length in PROMPTS:
                yield {"method": method, "prompt": length, "ms": first_token(model, length)}
            del model


def replaced(make: Make | None) -> PreTrainedModel:
    model = build(SHAPE)
    if make is not None:
        replace(model, input_groups(model), make)
        open_gates(model, OPENED)
    return model


def step(model: PreTrainedModel, sequences: int) -> float:
    """Milliseconds of one token of each."""
    return per_token(model, torch.randint(5, 250, (sequences, PROMPT), device=DEVICE), "engine", FEW, MANY)


@torch.inference_mode()
def first_token(model: PreTrainedModel, length: int) -> float:
    """Milliseconds until its scores are there."""
    ids = torch.randint(5, 250, (1, length), device=DEVICE)
    call: Callable[[], object] = functools.partial(model, ids, logits_to_keep=1)
    return 1e3 * statistics.median(in_turn({"prompt": call}, 3, DEVICE)["prompt"])


def section(content: Content) -> str:
    rows = content["results"]
    dense = {key(row): row["ms"] for row in rows if row["method"] == "dense"}
    lines: list[Row] = []
    for method in dict.fromkeys(row["method"] for row in rows):
        own = {key(row): row["ms"] for row in rows if row["method"] == method}
        lines.append({"method": method, **{k: f"{dense[k] / ms:.2f}" for k, ms in own.items() if k in dense}})
    for k, ms in dense.items():
        lines[0][k] = f"{ms:.1f} ms"
    columns: Columns = {"method": lambda r: r["method"]}
    columns |= {f"{n} at once": functools.partial(_cell, ("sequences", n)) for n in SEQUENCES}
    columns |= {f"prompt of {n:,}": functools.partial(_cell, ("prompt", n)) for n in PROMPTS}
    return f"""## Prompts and several sequences on a GPU ({content["settings"]["device"]})

A model of the shape of Llama-3-8B, random weights, bfloat16. Dense: time of a step for so many sequences, and to the
first token; below, how many times as fast the others are. {source(content)}

{table(lines, columns)}
"""


def key(row: Row) -> tuple[str, int]:
    name = "sequences" if "sequences" in row else "prompt"
    return name, row[name]


def _cell(which: tuple[str, int], row: Row) -> str:
    return str(row.get(which, "-"))


if __name__ == "__main__":
    main()
