"""How the functions of `ops.cpu` are compiled: by Numba, kept on disk where that is possible.

`jit` makes a function that Python and other compiled functions call; it holds no lock of Python's. `Kernel` makes one
that native code calls through its address, as a row of a program does (`team`). Both are compiled at first use, which
takes seconds, and read from Numba's cache after that. Where no cache can be written (an installation and a home that
are read-only, a disk that is full) they are compiled in every process, with one warning.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import numba
import numpy as np
from numba import types
from numba.core.ccallback import CFunc

# sums in any order, but a value that is not finite stays one
FAST = frozenset({"reassoc", "contract", "nsz", "arcp", "afn"})
_warned: list[str] = []


def _warn(reason: object) -> None:
    if not _warned:
        _warned.append(str(reason))
        warnings.warn(
            f"kernels are compiled anew in every process, some seconds: Numba's cache is not writable ({reason}); "
            "set NUMBA_CACHE_DIR to a directory that is",
            stacklevel=3,
        )


class _Forgiving:
    """A cache of Numba's that cannot be read or written is no reason to fail."""

    def __init__(self, cache: Any) -> None:
        self.cache = cache

    def load_overload(self, *arguments: Any) -> Any:
        try:
            return self.cache.load_overload(*arguments)
        except OSError as error:
            _warn(error)
            return None

    def save_overload(self, *arguments: Any) -> None:
        try:
            self.cache.save_overload(*arguments)
        except OSError as error:
            _warn(error)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.cache, name)


def _cached(compiled: Any) -> None:
    """Let what Numba compiles be kept on disk, until a file of this package changes: functions here call each other."""
    try:
        compiled.enable_caching()
    except (RuntimeError, OSError) as error:
        _warn(error)
    else:
        compiled._cache._cache_file._source_stamp = _stamp()
        compiled._cache = _Forgiving(compiled._cache)


@cache
def _stamp() -> tuple[float, int]:
    """Of all files beside this one, as Numba has it of one: the latest change, and the size."""
    found = [path.stat() for path in Path(__file__).parent.glob("*.py")]
    return max(f.st_mtime for f in found), sum(f.st_size for f in found)


def jit(function: Callable[..., Any] | None = None, /, **options: Any) -> Any:
    """`numba.njit`, as all functions of this package are compiled: `@jit` or `@jit(inline="always")`."""
    if function is None:
        return lambda f: jit(f, **options)
    options = {"fastmath": set(FAST), **options}
    compiled = numba.njit(nogil=True, error_model="numpy", **options)(function)
    _cached(compiled)
    return compiled


@jit
def address_of(array: Any) -> Any:
    """Where an array begins. Numba frees it after its last use, which this is, unless `keep` follows."""
    return np.int64(array.ctypes.data)


@jit
def keep(array: Any) -> None:
    """Nothing: an array whose address is in use must not be freed before this."""


class Kernel:
    """A function of the address of its arguments, 64-bit words, and the number of a chunk of its work.

    Other compiled functions call it by its address. Nothing can be raised in it.
    """

    def __init__(self, function: Callable[[int, int], None]) -> None:
        self.function = function
        self.lock = threading.Lock()  # what is compiled twice is freed once, and programs hold its address
        self.__doc__ = function.__doc__

    @cached_property
    def _compiled(self) -> Any:
        options = {"nopython": True, "error_model": "numpy", "fastmath": set(FAST)}
        compiled = CFunc(self.function, ((types.int64, types.int64), types.void), {}, options)
        _cached(compiled)
        compiled.compile()
        return compiled

    @cached_property
    def address(self) -> int:
        """Where its machine code begins."""
        with self.lock:
            return int(self._compiled.address)
