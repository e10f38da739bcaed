"""Memory of the kernels: scratch, and large pages under what is read with every token.

Linux gives out memory in pages of 4 KiB, and where these lie is looked up anew for each: reading a matrix stops for it
every 64 cache lines, and longer in a virtual machine. Pages of 2 MiB are to be had where the system allows them
("always" or "madvise" in /sys/kernel/mm/transparent_hugepage/enabled); torch asks for none.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterable
from functools import cache
from typing import Any

import torch
from torch import Tensor

PAGE = 2 << 20
HUGEPAGE, COLLAPSE = 14, 25  # of madvise(2): later, and at once, since Linux 6.1


def scratch(size: int) -> Tensor:
    """So many bytes (uint8)."""
    return torch.empty(size, dtype=torch.uint8)


def use_large_pages(ranges: Iterable[tuple[int, int]]) -> None:
    """Have large pages under memory, given as addresses and bytes, as far as the system can. Contents stay."""
    advise = _madvise()
    if advise is None:
        return
    for page in sorted({page for start, size in ranges for page in range(start // PAGE, -(-(start + size) // PAGE))}):
        if advise(page * PAGE, PAGE, HUGEPAGE) == 0:
            advise(page * PAGE, PAGE, COLLAPSE)


@cache
def _madvise() -> Any:
    if not sys.platform.startswith("linux"):
        return None
    advise = ctypes.CDLL(None).madvise
    advise.argtypes, advise.restype = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int], ctypes.c_int
    return advise
