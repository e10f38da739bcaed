"""How many processors a process has."""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path


@cache
def processors() -> int:
    """NUMBA_NUM_THREADS, or as many as this process may use."""
    given = os.environ.get("NUMBA_NUM_THREADS", "")
    if given.isdigit() and int(given):
        return int(given)
    seen = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        share = quota(Path("/sys/fs/cgroup"), Path("/proc/self/cgroup").read_text())
    except OSError:
        share = None
    return seen if share is None else max(1, min(seen, int(share)))


def quota(root: Path, groups: str) -> float | None:
    """Processors' worth of time that the control groups of a process allow; None: as many as there are.

    root: where the hierarchy is mounted; groups: the text of /proc/self/cgroup. Every group above counts, too.
    A container may see only the root of its groups.
    """
    found = []
    for line in groups.splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        for mount in [root / controllers, root / "cpu"] if controllers else [root, root / "unified"]:
            own = mount / path.strip("/")
            for folder in [own, *(p for p in own.parents if p.is_relative_to(mount))]:
                if (share := _share(folder, bool(controllers))) is not None:
                    found.append(share)
    return min(found, default=None)


def _share(folder: Path, old: bool) -> float | None:
    """What one group allows: version 1 (`old`) or 2."""
    try:
        if old:
            words = [(folder / f"cpu.cfs_{name}_us").read_text().strip() for name in ("quota", "period")]
        else:
            words = (folder / "cpu.max").read_text().split()
        return int(words[0]) / int(words[1]) if int(words[0]) > 0 else None
    except (OSError, ValueError, IndexError, ZeroDivisionError):  # absent, or "max"
        return None
