"""Text in, windows of token ids out, and the check that calibration and evaluation never see the same text.

The default corpus is `pydoc_data.topics`, the language reference that every Python carries. Its topics are dealt into
a calibration part and a held-out part, and paragraphs of the held-out part that also occur in the other are dropped.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from rankgate import hub
from rankgate.errors import RankgateError

CALIBRATION = "pydoc:calibration"
HELD_OUT = "pydoc:held-out"
RUN = 32  # tokens in a hashed run
DISTINCT = 8  # a run with fewer distinct tokens (a ruled line, say) proves nothing


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
    hub.require(name, "dataset")
    try:
        rows = datasets.load_dataset(name, config or None, split=split or "test")
    except Exception as error:  # the library raises many kinds, from many layers
        raise RankgateError(f"cannot load {source}: {' '.join(str(error).split())[:200]}") from error
    column = next((key for key, feature in rows.features.items() if getattr(feature, "dtype", "") == "string"), None)
    if column is None:
        raise RankgateError(f"{source} has no text column")
    return "\n\n".join(rows[column])


def token_windows(tokenizer: PreTrainedTokenizerBase, text: str, tokens: int, context: int) -> Tensor:
    """The first `tokens` tokens of `text` as consecutive windows of `context` ids: (tokens // context) × context.

    Where the tokenizer puts a beginning-of-sequence token before text, every window begins with one (and it counts).
    Raises RankgateError if the text has fewer tokens than asked for, or fewer than one window is asked for.
    """
    if context < 2:
        raise RankgateError(f"a context of {context} tokens predicts nothing; use at least 2")
    count = tokens // context
    if count < 1:
        raise RankgateError(
            f"{tokens} tokens do not fill one context of {context}; ask for more or shorten the context"
        )
    bos = tokenizer.bos_token_id
    prefix = [bos] if bos is not None and bos in tokenizer("").input_ids else []
    body = context - len(prefix)
    ids = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
    if len(ids) < count * body:
        raise RankgateError(
            f"the text has {len(ids):,} tokens, {count * body:,} were asked for; give more text or ask for fewer"
        )
    windows = torch.tensor(ids[: count * body]).view(count, body)
    return torch.cat([torch.tensor(prefix, dtype=windows.dtype).expand(count, -1), windows], dim=1)


def run_hashes(windows: Tensor, stride: int = RUN) -> Tensor:
    """64-bit hashes (1-D, int64) of the runs of 32 tokens that start every `stride` tokens of consecutive windows."""
    if windows.numel() < RUN:
        return torch.empty(0, dtype=torch.int64)
    runs = windows.flatten().unfold(0, RUN, stride)
    ordered = runs.sort(dim=1).values
    distinct = (ordered[:, 1:] != ordered[:, :-1]).sum(1) + 1
    powers = [pow(6364136223846793005, i + 1, 2**64) for i in range(RUN)]
    weights = torch.tensor([p - 2**64 if p >= 2**63 else p for p in powers])
    return ((runs + 1) * weights).sum(1)[distinct >= DISTINCT]


def overlap(windows: Tensor, hashes: Tensor) -> bool:
    """Whether `windows` share text with the windows whose `run_hashes` these are.

    A shared run of 63 tokens is always found, one of less than 32 never.
    """
    return bool(torch.isin(run_hashes(windows, stride=1), hashes).any())
