"""Where texts come from: a file, a Hugging Face dataset, or Python itself.

The default corpus is `pydoc_data.topics`, the language reference that every Python carries. Its topics are dealt into
a calibration part and a held-out part, and paragraphs of the held-out part that also occur in the other are dropped.
"""

from __future__ import annotations

from pathlib import Path

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from rankgate.conversion.windows import token_windows
from rankgate.errors import RankgateError
from rankgate.hub import remote

CALIBRATION = "pydoc:calibration"
HELD_OUT = "pydoc:held-out"


def text_windows(tokenizer: PreTrainedTokenizerBase, source: str, tokens: int, context: int) -> Tensor:
    """`token_windows` of the text of `source`, by which an error begins."""
    try:
        return token_windows(tokenizer, load_text(source), tokens, context)
    except RankgateError as error:
        raise RankgateError(f"{source}: {error}" if source not in str(error) else str(error)) from error


def load_text(source: str) -> str:
    """The text of `source`: a UTF-8 file, `pydoc:calibration`, `pydoc:held-out` or `hf:ORG/NAME[:CONFIG[:SPLIT]]`.

    Raises RankgateError if there is no such text, it is not UTF-8, or it is empty.
    """
    if source in (CALIBRATION, HELD_OUT):
        return _pydoc(held_out=source == HELD_OUT)
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


def _pydoc(held_out: bool) -> str:
    from pydoc_data.topics import topics

    parts: tuple[list[str], list[str]] = ([], [])
    for i, name in enumerate(sorted(topics)):
        parts[i % 2].append(topics[name])
    calibration, rest = ("\n\n".join(part) for part in parts)
    if not held_out:
        return calibration
    known = set(calibration.split("\n\n"))
    return "\n\n".join(paragraph for paragraph in rest.split("\n\n") if paragraph not in known)


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
