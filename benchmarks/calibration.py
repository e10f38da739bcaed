"""What calibration and conversion cost: results/calibration.json.

    python benchmarks/calibration.py

Time: calibration over plain forward passes on the same tokens, the two run in turn and their medians divided; on
SmolLM2-135M as the number of tokens grows, and on random Llamas as the width grows. Memory: the highest resident set
of a fresh process that loads, calibrates, converts and saves SmolLM2-135M, for each method. About 10 minutes.
"""

from __future__ import annotations

import multiprocessing
import resource
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from provenance import SEED, write
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from rankgate import cli
from rankgate.calibration import calibrate
from rankgate.sources import DEFAULT, load, resolve
from rankgate.terminal import quiet_libraries

CONTEXT = 512
BATCH = 4
REPEATS = 3
TOKENS = (2_048, 4_096, 8_192)
WIDTHS = (256, 512, 1024, 2048)
WIDTH_TOKENS = 2_048
METHODS = {
    "gsi k=0.25n": ("--method", "gsi"),
    "gsi context": ("--method", "gsi", "--basis", "context"),
    "svd energy 0.9": ("--method", "svd"),
    "asvd k=0.5": ("--method", "asvd"),
}


def main() -> None:
    quiet_libraries()
    torch.manual_seed(SEED)
    results = []
    for name, options in METHODS.items():
        results.append({"what": "memory", "method": name, "peak_bytes": peak_memory(options)})
        print(results[-1], flush=True)
    model, _ = load(resolve(DEFAULT))
    for tokens in TOKENS:
        results.append({"what": "tokens", "tokens": tokens, "width": 576, **cost(model, tokens)})
        print(results[-1], flush=True)
    for width in WIDTHS:
        results.append({"what": "width", "tokens": WIDTH_TOKENS, "width": width, **cost(llama(width), WIDTH_TOKENS)})
        print(results[-1], flush=True)
    write("calibration", {"context": CONTEXT, "batch": BATCH, "repeats": REPEATS}, results)


def cost(model: PreTrainedModel, tokens: int) -> dict[str, float]:
    """Seconds of calibration over seconds of the plain forward passes (median of interleaved repeats)."""
    windows = torch.randint(10, model.config.vocab_size, (tokens // CONTEXT, CONTEXT))

    def forward() -> None:
        with torch.inference_mode():
            for batch in windows.split(BATCH):
                model(input_ids=batch, use_cache=False)

    forward()
    pairs = [(seconds(forward), seconds(lambda: calibrate(model, windows, batch_size=BATCH))) for _ in range(REPEATS)]
    plain, calibration = (statistics.median(column) for column in zip(*pairs, strict=True))
    return {"ratio": calibration / plain, "ratios": [c / p for p, c in pairs], "per_token": calibration / tokens}


def seconds(run: Callable[[], object]) -> float:
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def llama(width: int) -> PreTrainedModel:
    config = LlamaConfig(
        vocab_size=8_192,
        hidden_size=width,
        intermediate_size=width * 8 // 3,
        num_hidden_layers=4,
        num_attention_heads=width // 64,
        num_key_value_heads=width // 64,
    )
    return LlamaForCausalLM(config).eval()


def peak_memory(options: tuple[str, ...]) -> int:
    """Highest resident set, in bytes, of `rankgate convert` in a process of its own."""
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=convert, args=(options, queue))
    process.start()
    peak = queue.get(timeout=600)
    process.join()
    return int(peak)


def convert(options: tuple[str, ...], queue: multiprocessing.Queue[int]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        if cli.main(["convert", DEFAULT, "-o", str(Path(folder) / "out"), *options]):
            raise SystemExit("convert failed")
    queue.put(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)


if __name__ == "__main__":
    main()
