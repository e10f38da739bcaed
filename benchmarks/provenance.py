"""What a committed result says about where it comes from, and how it is written."""

from __future__ import annotations

import datetime
import json
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch
import transformers

from rankgate import __version__
from rankgate.common.files import atomic_path

RESULTS = Path(__file__).parent / "results"
SEED = 0


def _git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], capture_output=True, text=True, check=True).stdout.strip()


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    models = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(models, platform.machine())


def _commit() -> str:
    if "BENCHMARK_COMMIT" in os.environ:  # a copy of the tree on a machine without its history
        return os.environ["BENCHMARK_COMMIT"]
    changed = "+" if _git("status", "--porcelain", "rankgate", "benchmarks", ":!benchmarks/results") else ""
    return _git("rev-parse", "--short", "HEAD") + changed


COMMIT = _commit()  # of the code that is running: read when the benchmark starts, not when it ends


def provenance() -> dict[str, Any]:
    """Versions, device, commit (with '+' if the tree was changed) and seed."""
    return {
        "date": datetime.date.today().isoformat(),
        "commit": COMMIT,
        "device": f"{_cpu()}, {torch.get_num_threads()} threads",
        "rankgate": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "seed": SEED,
    }


def write(name: str, settings: dict[str, Any], results: list[dict[str, Any]]) -> None:
    """Write `results/NAME.json`."""
    RESULTS.mkdir(exist_ok=True)
    content = {"provenance": provenance(), "settings": settings, "results": results}
    with atomic_path(RESULTS / f"{name}.json") as temporary:
        temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
