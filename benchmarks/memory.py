"""What a model takes in memory and on disk, dense, converted and while it is converted: results/memory.json.

    python benchmarks/memory.py

SmolLM2-135M in float32. The resident set of a fresh process, at its highest and at the end, that loads the model, dense
or converted, and answers; or that loads, calibrates, converts and saves it, for each method. About 5 minutes.
"""

from __future__ import annotations

import multiprocessing
import resource
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from provenance import write

from rankgate.cli import parser as cli
from rankgate.common.terminal import quiet_libraries
from rankgate.hub.opening import open_any
from rankgate.hub.sources import DEFAULT, resolve
from rankgate.reporting.bench import peak_memory

METHODS = {
    "gsi k=0.25n": ("--method", "gsi"),
    "asvd k=0.5": ("--method", "asvd"),
    "lrq r=16 refine=0.2": ("--method", "lrq", "--rank", "16", "--refine", "0.2", "--lm-head"),
}


def main() -> None:
    quiet_libraries()
    open_any(DEFAULT)  # the first time unpacks it
    dense = Path(resolve(DEFAULT).path)
    results = [{"name": "dense, answering", **memory(answer, DEFAULT), "file_bytes": file_bytes(dense)}]
    with tempfile.TemporaryDirectory() as folder:
        for name, options in METHODS.items():
            made = Path(folder) / "converted"
            arguments = ["convert", DEFAULT, "-o", str(made), *options]
            results.append({"name": f"{name}, convert", **memory(run, arguments)})
            loaded = memory(answer, made)
            results.append({"name": f"{name}, answering", **loaded, "file_bytes": file_bytes(made)})
            shutil.rmtree(made)
            print(results[-2:], flush=True)
    write("memory", {"model": DEFAULT}, results)


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


def answer(name: str | Path) -> object:
    """Load a model and run it on a few tokens, which also reads what was only mapped."""
    model = open_any(str(name)).model
    with torch.inference_mode():
        model(input_ids=torch.arange(8)[None])
    return model


def run(arguments: list[str]) -> None:
    if cli.main(arguments):
        raise SystemExit("convert failed")


def file_bytes(directory: Path) -> int:
    return sum(file.stat().st_size for file in directory.iterdir())


if __name__ == "__main__":
    main()
