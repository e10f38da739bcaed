"""What calibration and conversion cost: results/calibration.json.

    python benchmarks/calibration.py

Time: calibration over plain forward passes on the same tokens, the two run in turn and their medians divided; on
SmolLM2-135M as the number of tokens grows, and on random Llamas as the width grows. Memory: the resident set of a fresh
process, at its highest and at the end, that loads SmolLM2-135M, dense or converted; or that loads, calibrates, converts
and saves it, for each method. About 15 minutes.
"""

from __future__ import annotations

import multiprocessing
import resource
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from provenance import SEED, write
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from rankgate import checkpoint, cli
from rankgate.bench import peak_memory
from rankgate.calibration import calibrate
from rankgate.pipeline import open_dense
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
    "lrq r=16 refine=0.2": ("--method", "lrq", "--rank", "16", "--refine", "0.2", "--lm-head"),
}
DENSE = "dense, loaded"


def main() -> None:
    quiet_libraries()
    torch.manual_seed(SEED)
    results = []
    with tempfile.TemporaryDirectory() as folder:
        saved = Path(folder) / "dense"
        opened = open_dense(DEFAULT)
        opened.model.save_pretrained(saved)
        opened.tokenizer.save_pretrained(saved)
        del opened
        results.append({"what": "memory", "name": DENSE, **memory(load_dense, saved), "file_bytes": file_bytes(saved)})
        for name, options in METHODS.items():
            made = Path(folder) / "converted"
            arguments = ["convert", str(saved), "-o", str(made), *options]
            results.append({"what": "memory", "name": f"{name}, convert", **memory(run, arguments)})
            loaded = memory(checkpoint.load, made)
            results.append({"what": "memory", "name": f"{name}, loaded", **loaded, "file_bytes": file_bytes(made)})
            shutil.rmtree(made)
            print(results[-2:], flush=True)
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


def memory(work: Callable[[Any], object], argument: Any) -> dict[str, int]:
    """Resident bytes of a process of its own that does this `work`: at their highest, and at the end."""
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=measure, args=(work, argument, queue))
    process.start()
    peak, resident = queue.get(timeout=600)
    process.join()
    return {"peak_bytes": peak, "resident_bytes": resident}


def measure(work: Callable[[Any], object], argument: Any, queue: multiprocessing.Queue[tuple[int, int]]) -> None:
    quiet_libraries()
    kept = work(argument)
    resident = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    queue.put((peak_memory(), resident))
    del kept


def load_dense(directory: Path) -> object:
    return open_dense(str(directory))


def run(arguments: list[str]) -> None:
    if cli.main(arguments):
        raise SystemExit("convert failed")


def file_bytes(directory: Path) -> int:
    return sum(file.stat().st_size for file in directory.iterdir())


if __name__ == "__main__":
    main()
