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
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from frame import MODEL, Columns, Content, Row, parser, record, source, start, table

from rankgate.cli import parser as cli
from rankgate.common.terminal import quiet_libraries
from rankgate.hub.opening import open_any
from rankgate.hub.sources import resolve
from rankgate.reporting.runner import peak_memory

METHODS = {
    "gsi k=0.25n": ("--method", "gsi"),
    "asvd k=0.5": ("--method", "asvd"),
    "lrq r=16 refine=0.2": ("--method", "lrq", "--rank", "16", "--refine", "0.2", "--lm-head"),
}


def main() -> None:
    start(parser(__doc__))
    record("memory", {"model": MODEL}, measured())


def measured() -> Iterator[Row]:
    open_any(MODEL)  # the first time unpacks it
    yield {"name": "dense, answering", **memory(answer, MODEL), "file_bytes": file_bytes(Path(resolve(MODEL).path))}
    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder) / "converted"
        for name, options in METHODS.items():
            yield {"name": f"{name}, convert", **memory(run, ["convert", MODEL, "-o", str(made), *options])}
            yield {"name": f"{name}, answering", **memory(answer, made), "file_bytes": file_bytes(made)}
            shutil.rmtree(made)


def memory(work: Callable[[Any], object], argument: Any) -> dict[str, int]:
    """Resident bytes of a process of its own that does this `work`: at their highest, and at the end."""
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=at_work, args=(work, argument, queue))
    process.start()
    peak, resident = queue.get(timeout=600)
    process.join()
    return {"peak_bytes": peak, "resident_bytes": resident}


def at_work(work: Callable[[Any], object], argument: Any, queue: multiprocessing.Queue[tuple[int, int]]) -> None:
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
        raise SystemExit(f"{arguments[0]} failed")


def file_bytes(directory: Path) -> int:
    return sum(file.stat().st_size for file in directory.iterdir())


def section(content: Content) -> str:
    dense = next(r for r in content["results"] if r["name"] == "dense, answering")

    def megabytes(key: str) -> Callable[[Row], str]:
        return lambda r: f"{r[key] / 1e6:.0f} ({r[key] / dense[key]:.2f})" if key in r else "-"

    columns: Columns = {
        "process": lambda r: r["name"],
        "highest resident": megabytes("peak_bytes"),
        "resident at the end": megabytes("resident_bytes"),
        "files": megabytes("file_bytes"),
    }
    return f"""## Memory

SmolLM2-135M in float32, in MB and in relation to a process that has loaded the dense model and read 8 tokens,
interpreter and libraries included. *convert* loads, calibrates on 8,192 tokens, converts and saves. {source(content)}

{table(content["results"], columns)}
"""


if __name__ == "__main__":
    main()
