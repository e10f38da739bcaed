"""Memory and time of calibrating and converting a model shaped like Llama-7B on a GPU: results/gpu_convert_h100.json.

    python benchmarks/gpu_convert.py [--tokens 4096]

Random weights and random text: neither changes what is allocated. About three minutes on an H100.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from gpu import DEVICE, device_name
from gpu_decode import MODELS, build
from provenance import SEED, write

from rankgate.conversion.calibration import calibrate
from rankgate.conversion.convert import convert_
from rankgate.methods import LRQConfig

T = TypeVar("T")
CONTEXT = 512
METHOD = LRQConfig(rank=16, refine=0.05)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=4096)
    arguments = parser.parse_args()
    torch.manual_seed(SEED)
    model = build("llama")
    weights = sum(p.nbytes for p in model.parameters())
    windows = torch.randint(5, MODELS["llama"].vocab_size, (arguments.tokens // CONTEXT, CONTEXT))
    stats, calibrating = measured(lambda: calibrate(model, windows, sensitivity=True, progress=True))
    _, converting = measured(lambda: convert_(model, METHOD, stats, consume=True, progress=True))
    rows: list[dict[str, Any]] = [{"step": "calibrate", **calibrating}, {"step": "convert", **converting}]
    settings = {
        "device": torch.cuda.get_device_name(),
        "tokens": arguments.tokens,
        "context": CONTEXT,
        "method": METHOD.record(),
        "weight_bytes": weights,
        "converted_bytes": sum(p.nbytes for p in model.parameters()),
    }
    print(settings, rows)
    write(f"gpu_convert_{device_name()}", settings, rows)


def measured(work: Callable[[], T]) -> tuple[T, dict[str, Any]]:
    """Its result, seconds and peak of allocated memory."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats(DEVICE)
    start = time.perf_counter()
    result = work()
    torch.cuda.synchronize()
    return result, {"seconds": time.perf_counter() - start, "peak_bytes": torch.cuda.max_memory_allocated(DEVICE)}


if __name__ == "__main__":
    main()
