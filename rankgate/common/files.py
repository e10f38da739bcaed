"""Outputs appear whole or not at all; what is too large for memory lies in files."""

from __future__ import annotations

import math
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from rankgate.errors import RankgateError


@contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success it is renamed to `path`, on failure removed.

    The caller writes a file or a directory there. An existing file is replaced; an existing directory must be empty.
    Raises RankgateError, before anything is yielded, if `path` cannot be written.
    """
    path = Path(path).absolute()
    if path.is_dir() and any(path.iterdir()):
        raise RankgateError(f"{path} is a directory that is not empty; choose another or delete it")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    except OSError as error:
        raise RankgateError(f"cannot write {path}: {error.strerror}") from error
    try:
        temporary = scratch / path.name
        yield temporary
        if path.is_dir():
            path.rmdir()
        temporary.replace(path)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def in_file(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Zeros in a file that has no name and is gone with them: the system moves what is not in use out of memory.

    It lies where temporary files do (TMPDIR). Raises RankgateError if there is no room.
    """
    count = math.prod(shape)
    try:
        with tempfile.NamedTemporaryFile(prefix="rankgate.") as file:
            reserve = (
                os.posix_fallocate if hasattr(os, "posix_fallocate") else lambda fd, _, size: os.truncate(fd, size)
            )
            reserve(file.fileno(), 0, count * dtype.itemsize)
            return torch.from_file(file.name, shared=True, size=count, dtype=dtype).view(shape)
    except OSError as error:
        where = f"{count * dtype.itemsize / 1e9:.1f} GB in {tempfile.gettempdir()}: {error.strerror}"
        raise RankgateError(f"no room for {where}; set TMPDIR to a directory on a larger disk") from error


def check_writable(directory: str | Path) -> None:
    """Raises RankgateError unless `directory`, which need not exist yet, can be written to. Writes nothing."""
    path = Path(directory).absolute()
    existing = next(parent for parent in (path, *path.parents) if parent.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        raise RankgateError(f"cannot write to {directory}: {existing} is not a directory that you may write to")
