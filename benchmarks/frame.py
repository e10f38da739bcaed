"""What the benchmarks share: arguments, timing in turn, results with where they come from, and tables.

A script measures rows, writes them to results/NAME.json (or results/NAME/DEVICE.json) and says in `section` how
that file reads in docs/results.md; `render` puts the sections together.
"""

from __future__ import annotations

import argparse
import datetime
import functools
import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
import transformers

from rankgate import __version__
from rankgate.common.files import atomic_path
from rankgate.common.terminal import quiet_libraries
from rankgate.hub.sources import DEFAULT
from rankgate.reporting.tables import markdown

T = TypeVar("T")
Row = dict[str, Any]
Content = dict[str, Any]  # of a file: "provenance", "settings", "results"
Columns = Mapping[str, Callable[[Any], str]]  # the cell of a row, by header

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
MODEL = DEFAULT
SEED = 0
ARGUMENTS: dict[str, dict[str, Any]] = {
    "folder": {"type": Path, "help": "with valid.txt and test.txt"},
    "--device": {"choices": ("cpu", "cuda"), "default": "cpu"},
    "--model": {"default": MODEL, "help": "where it is, on a machine that cannot fetch it"},
}


def parser(description: str | None, *names: str) -> argparse.ArgumentParser:
    """With these of ARGUMENTS; a script adds its own."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in names:
        made.add_argument(name, **ARGUMENTS[name])
    return made


def start(options: argparse.ArgumentParser) -> argparse.Namespace:
    """The arguments of a script that begins."""
    arguments = options.parse_args()
    quiet_libraries()
    torch.manual_seed(SEED)
    commit()
    return arguments


def timed(call: Callable[[], T], device: str = "cpu") -> tuple[T, float]:
    """What it returns, and its seconds until the device is done."""
    wait = torch.cpu.synchronize if device == "cpu" else torch.cuda.synchronize
    wait()
    begin = time.perf_counter()
    result = call()
    wait()
    return result, time.perf_counter() - begin


def in_turn(calls: Mapping[str, Callable[[], object]], repeats: int, device: str = "cpu") -> dict[str, list[float]]:
    """Seconds by name. Every call once a round, so that a slow minute hits all; the first round warms up."""
    rounds = [{name: timed(call, device)[1] for name, call in calls.items()} for _ in range(repeats + 1)]
    return {name: [seconds[name] for seconds in rounds[1:]] for name in calls}


def device_name(device: str = "cuda") -> str:
    """Short, for the name of a file: cpu, h100, h200."""
    if device == "cpu":
        return device
    words = card(device).lower().replace("-", " ").split()
    return next((word for word in words if word.startswith(("h1", "h2", "a1", "b2"))), "gpu")


def card(device: str = "cuda") -> str:
    """What is recorded as "device" in settings: the name of the GPU, or cpu."""
    return device if device == "cpu" else torch.cuda.get_device_name()


@functools.cache
def commit() -> str:
    """Of the code that is running, with '+' if it was changed: as it was when first asked for, by `start`."""
    if "BENCHMARK_COMMIT" in os.environ:  # a copy of the tree on a machine without its history
        return os.environ["BENCHMARK_COMMIT"]
    changed = "+" if _git("status", "--porcelain", "rankgate", "benchmarks", ":!benchmarks/results") else ""
    return _git("rev-parse", "--short", "HEAD") + changed


def _git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    models = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(models, platform.machine())


def provenance() -> dict[str, Any]:
    """Versions, CPU, commit and seed."""
    return {
        "date": datetime.date.today().isoformat(),
        "commit": commit(),
        "device": f"{_cpu()}, {torch.get_num_threads()} threads",
        "rankgate": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "seed": SEED,
    }


def write(name: str, settings: dict[str, Any], results: Sequence[Row]) -> None:
    """Write `results/NAME.json`."""
    content = {"provenance": provenance(), "settings": settings, "results": results}
    with atomic_path(RESULTS / f"{name}.json") as temporary:
        temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def record(name: str, settings: dict[str, Any], rows: Iterable[Row], before: Sequence[Row] = ()) -> None:
    """Write `before` and what was measured of `rows`, anew after every one, so that a run that ends early has some."""
    results = list(before)
    for row in rows:
        results.append(row)
        print(str(row)[:500], flush=True)
        write(name, settings, results)


def load(name: str) -> Content:
    content: Content = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    return content


def of_devices(name: str) -> list[Content]:
    """The results called `name` of every device that was measured on."""
    return [load(f"{name}/{path.stem}") for path in sorted((RESULTS / name).glob("*.json"))]


def source(content: Content) -> str:
    """Where a result comes from, in one line."""
    p, where = content["provenance"], content["settings"].get("device", "cpu")
    where = p["device"] if where == "cpu" else where
    versions = ", ".join(f"{name} {p[name]}" for name in ("rankgate", "torch", "transformers", "python"))
    return f"{where}; {versions}; commit {p['commit']}; {p['date']}; seed {p['seed']}."


def place(content: Content) -> str:
    """The device, for a heading."""
    device: str = content["settings"].get("device", "cpu")
    return "CPU" if device == "cpu" else device


def table(rows: Iterable[Row], *parts: Columns) -> str:
    """A Markdown table: columns of each part, side by side."""
    columns = [column for part in parts for column in part.items()]
    return markdown(tuple(name for name, _ in columns), [tuple(cell(row) for _, cell in columns) for row in rows])


def shown(value: float | None, form: str, unit: float = 1) -> str:
    """In units, by a format; a dash where there is none."""
    return "-" if value is None else format(value / unit, form)


def spread(values: Iterable[float], digits: int = 2) -> str:
    """Mean ± standard deviation."""
    values = list(values)
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.fmean(values):.{digits}f} ± {deviation:.{digits}f}"
