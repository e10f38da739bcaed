"""What takes long is made once: after an interruption, finished parts are read from disk."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from rankgate.common.files import atomic_path
from rankgate.errors import RankgateError

Make = Callable[[], dict[str, Tensor]]
Kept = Callable[[str, Make], dict[str, Tensor]]  # the tensors of a part by its name, made if they are not there

KEY = "key.txt"


class NoRoom(RankgateError):
    """A part could not be written; those that are there are good."""


def anew(_: str, make: Make) -> dict[str, Tensor]:
    """Keep nothing."""
    return make()


@contextmanager
def kept_in(directory: Path, key: str) -> Iterator[tuple[Kept, int]]:
    """While open, parts lie in `directory`, each whole, and their tensors are mapped from there. Also: how many do.

    key: says what all parts follow from; those of another key are deleted. The directory goes away at the end, and
    when input is bad (RankgateError); anything else that ends it leaves it for the next time.
    Raises RankgateError if something else lies at `directory`.
    """
    known = directory / KEY
    if directory.exists() and not known.is_file():
        raise RankgateError(f"{directory} is in the way of unfinished work; move it")
    if known.is_file() and known.read_text(encoding="utf-8") != key:
        shutil.rmtree(directory)
    if not known.is_file():
        with atomic_path(directory) as temporary:
            temporary.mkdir()
            (temporary / KEY).write_text(key, encoding="utf-8")

    def part(name: str, make: Make) -> dict[str, Tensor]:
        path = directory / f"{name}.safetensors"
        with suppress(SafetensorError, FileNotFoundError):  # a file that lost its end is made again
            return load_file(path)
        made = {leaf: tensor.contiguous() for leaf, tensor in make().items()}
        try:
            with atomic_path(path) as temporary:
                save_file(made, temporary)
        except (OSError, SafetensorError) as error:
            raise NoRoom(f"cannot write {path}: {error}; make room and run the same again") from error
        return load_file(path)

    try:
        yield part, len([*directory.glob("*.safetensors")])
    except NoRoom:
        raise
    except RankgateError:
        shutil.rmtree(directory)
        raise
    shutil.rmtree(directory)
