"""Memory and time of calibrating and converting a model shaped like Llama-7B on a GPU: results/gpu_convert/h100.json.

    python benchmarks/gpu_convert.py [--tokens 4096]

Random weights and random text: neither changes what is allocated. About three minutes on an H100.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from frame import Columns, Content, Row, card, device_name, parser, record, source, start, table, timed
from gpu import DEVICE
from gpu_decode import MODELS, build
from transformers import PreTrainedModel

from rankgate.conversion.calibration import calibrate
from rankgate.conversion.convert import convert_
from rankgate.methods import LRQConfig
from rankgate.reporting.tables import describe

T = TypeVar("T")
CONTEXT = 512
METHOD = LRQConfig(rank=16, refine=0.05)


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--tokens", type=int, default=4096)
    tokens = start(options).tokens
    model = build("llama")
    settings = {
        "device": card(),
        "tokens": tokens,
        "context": CONTEXT,
        "method": METHOD.record(),
        "weight_bytes": nbytes(model),
    }
    windows = torch.randint(5, MODELS["llama"].vocab_size, (tokens // CONTEXT, CONTEXT))
    stats, calibrating = measured(lambda: calibrate(model, windows, sensitivity=True, progress=True))
    _, converting = measured(lambda: convert_(model, METHOD, stats, consume=True, progress=True))
    rows = {"step": "calibrate", **calibrating}, {"step": "convert", **converting}
    record(f"gpu_convert/{device_name()}", {**settings, "converted_bytes": nbytes(model)}, rows)


def nbytes(model: PreTrainedModel) -> int:
    return sum(p.nbytes for p in model.parameters())


def measured(work: Callable[[], T]) -> tuple[T, Row]:
    """Its result, seconds and peak of allocated memory."""
    torch.cuda.reset_peak_memory_stats(DEVICE)
    result, seconds = timed(work, DEVICE)
    return result, {"seconds": seconds, "peak_bytes": torch.cuda.max_memory_allocated(DEVICE)}


def section(content: Content) -> str:
    settings, weights = content["settings"], content["settings"]["weight_bytes"]
    columns: Columns = {
        "step": lambda r: r["step"],
        "seconds": lambda r: f"{r['seconds']:.0f}",
        "peak, GB": lambda r: f"{r['peak_bytes'] / 1e9:.2f}",
        "x weights": lambda r: f"{r['peak_bytes'] / weights:.2f}",
    }
    return f"""## Converting on a GPU ({settings["device"]})

A model of the shape of Llama-7B, bfloat16, {weights / 1e9:.2f} GB of weights; {describe(settings["method"])} on
{settings["tokens"]:,} tokens, {settings["converted_bytes"] / 1e9:.2f} GB when converted. *peak*: of allocated memory,
and that over the weights. {source(content)}

{table(content["results"], columns)}
"""


if __name__ == "__main__":
    main()
