"""What a person sees: one voice, tables that fit the place they are printed to."""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
import warnings
from collections.abc import Sequence

MMAP_THRESHOLD = -3  # glibc's name for it, in malloc.h, is M_MMAP_THRESHOLD


def quiet_libraries() -> None:
    """Only errors from the libraries below; their warnings and progress bars are not about the user's input."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TQDM_DISABLE", "1")
    warnings.filterwarnings("ignore")
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def return_freed_memory() -> None:
    """Have glibc give blocks above 1 MB back to the system when they are freed; elsewhere nothing happens."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").mallopt(MMAP_THRESHOLD, 1 << 20)


def say(text: str) -> None:
    """What is going on, on stderr, so that stdout has nothing but results."""
    print(text, file=sys.stderr, flush=True)


def show_table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A rich table on a terminal, aligned plain text in a pipe. The first column is text, the others numbers."""
    if sys.stdout.isatty():
        from rich.box import SIMPLE_HEAD
        from rich.console import Console
        from rich.table import Table

        table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
        for i, header in enumerate(headers):
            table.add_column(header, justify="left" if i == 0 else "right", overflow="fold")
        for cells in rows:
            table.add_row(*cells)
        Console().print(table)
        return
    widths = [max(map(len, column)) for column in zip(headers, *rows, strict=True)]
    for cells in (headers, *rows):
        aligned = [cell.rjust(width) for cell, width in zip(cells[1:], widths[1:], strict=True)]
        print("  ".join([cells[0].ljust(widths[0]), *aligned]).rstrip(), flush=True)
