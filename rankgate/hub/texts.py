"""Where texts come from: a file, a Hugging Face dataset, or what comes with Rankgate and Python, of several kinds.

    written   openings that SmolLM2-135M-Instruct went on with (`benchmarks/write.py`): stories, dialogues, lists
    code      modules of Python's library
    pydoc     Python's language reference, `pydoc_data.topics`
    mixed     of all these, a piece of each in turn: the default

The documents of a kind are dealt into a calibration part and a held-out part, and paragraphs of the held-out part that
also occur in the other are dropped.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Iterator
from itertools import zip_longest
from pathlib import Path

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from rankgate.conversion.windows import token_windows
from rankgate.errors import RankgateError
from rankgate.hub import remote

PARTS = ("calibration", "held-out")
CALIBRATION, HELD_OUT = (f"mixed:{part}" for part in PARTS)
PIECE = 1500  # characters, and up to the end of the line
MODULES = (
    *("bdb", "calendar", "cmd", "contextlib", "csv", "fractions", "gettext", "heapq", "plistlib", "pprint", "queue"),
    *("random", "selectors", "shelve", "shlex", "socketserver", "textwrap", "timeit", "trace", "weakref"),
)


def text_windows(tokenizer: PreTrainedTokenizerBase, source: str, tokens: int, context: int) -> Tensor:
    """`token_windows` of the text of `source`, by which an error begins."""
    try:
        return token_windows(tokenizer, load_text(source), tokens, context)
    except RankgateError as error:
        raise RankgateError(f"{source}: {error}" if source not in str(error) else str(error)) from error


def load_text(source: str) -> str:
    """The text of `source`: a UTF-8 file, KIND:calibration, KIND:held-out or `hf:ORG/NAME[:CONFIG[:SPLIT]]`.

    Raises RankgateError if there is no such text, it is not UTF-8, or it is empty.
    """
    kind, _, part = source.partition(":")
    if kind in {*KINDS, "mixed"} and part in PARTS:
        return _mixed(part) if kind == "mixed" else "\n\n".join(_documents(kind, part))
    if source.startswith("hf:"):
        return _dataset(source)
    try:
        text = Path(source).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise RankgateError(f"{source} is not UTF-8 text (byte {error.start}); convert it first") from error
    except FileNotFoundError as error:
        raise RankgateError(f"no text file at {source} (a Hugging Face dataset is written hf:ORG/NAME)") from error
    except OSError as error:
        raise RankgateError(f"cannot read {source}: {error.strerror}") from error
    if not text.strip():
        raise RankgateError(f"{source} is empty; pass a file with text in it")
    return text


def _written() -> list[str]:
    return Path(__file__).with_name("written.txt").read_text(encoding="utf-8").split("\f")


def _code() -> list[str]:
    return [inspect.getsource(importlib.import_module(name)) for name in MODULES]


def _pydoc() -> list[str]:
    from pydoc_data.topics import topics

    return [topics[name] for name in sorted(topics)]


KINDS = {"written": _written, "code": _code, "pydoc": _pydoc}


def _documents(kind: str, part: str) -> list[str]:
    documents = KINDS[kind]()
    calibration, rest = documents[::2], documents[1::2]
    if part == "calibration":
        return calibration
    known = {text.strip() for document in calibration for text in document.split("\n\n")}
    return ["\n\n".join(text for text in document.split("\n\n") if text.strip() not in known) for document in rest]


def _mixed(part: str) -> str:
    kinds = (_in_turn([list(_pieces(document)) for document in _documents(kind, part)]) for kind in KINDS)
    return "\n\n".join(_in_turn(list(kinds)))


def _in_turn(lists: list[list[str]]) -> list[str]:
    """The first of each, the second of each that has one, and so on."""
    return [piece for turn in zip_longest(*lists, fillvalue="") for piece in turn if piece]


def _pieces(text: str) -> Iterator[str]:
    start = 0
    while start < len(text):
        end = text.find("\n", start + PIECE) + 1 or len(text)
        yield text[start:end]
        start = end


def _dataset(source: str) -> str:
    try:
        import datasets
    except ImportError as error:
        raise RankgateError("Hugging Face datasets need the extra: pip install 'rankgate[datasets]'") from error
    name, config, split = [*source.removeprefix("hf:").split(":"), "", ""][:3]
    remote.require(name, "dataset")
    try:
        rows = datasets.load_dataset(name, config or None, split=split or "test")
    except Exception as error:  # the library raises many kinds, from many layers
        raise RankgateError(f"cannot load {source}: {' '.join(str(error).split())[:200]}") from error
    column = next((key for key, feature in rows.features.items() if getattr(feature, "dtype", "") == "string"), None)
    if column is None:
        raise RankgateError(f"{source} has no text column")
    return "\n\n".join(rows[column])
