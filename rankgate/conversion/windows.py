"""Windows of token ids, and the check that calibration and evaluation never see the same text."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from rankgate.errors import RankgateError

RUN = 32  # tokens in a hashed run
CHARACTERS = 16  # of a text that are tried for a token: most have fewer, and what is cut last is not used
DISTINCT = 8  # a run with fewer distinct tokens (a ruled line, say) proves nothing


def token_windows(tokenizer: PreTrainedTokenizerBase, text: str, tokens: int, context: int) -> Tensor:
    """The first `tokens` tokens of `text` as consecutive windows of `context` ids: (tokens // context) × context.

    Every window begins with what the tokenizer puts before a text, a beginning-of-sequence token, say, and that counts.
    Characters that spell a special token are text: a model meets `<unk>` in a corpus, it never met its token.
    Raises RankgateError if the text has fewer tokens than asked for, or fewer than one window is asked for.
    """
    prefix = text_prefix(tokenizer)
    if context < (least := max(2, len(prefix) + 1)):
        raise RankgateError(f"a context of {context} tokens predicts nothing; use at least {least}")
    count = tokens // context
    if count < 1:
        raise RankgateError(
            f"{tokens} tokens do not fill one context of {context}; ask for more or shorten the context"
        )
    body = context - len(prefix)
    ids: list[int] = []
    characters = CHARACTERS * tokens
    while len(ids) < count * body:  # of a large text no more than it takes
        part = _beginning(text, characters)
        ids = tokenizer(part, add_special_tokens=False, split_special_tokens=True, verbose=False).input_ids
        if characters >= len(text):
            break
        characters *= 2
    if len(ids) < count * body:
        raise RankgateError(
            f"the text has {len(ids):,} tokens, {count * body:,} were asked for; give more text or ask for fewer"
        )
    windows = torch.tensor(ids[: count * body]).view(count, body)
    return torch.cat([torch.tensor(prefix, dtype=windows.dtype).expand(count, -1), windows], dim=1)


def text_prefix(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The ids that the tokenizer puts before a text."""
    text, whole = (tokenizer("a", add_special_tokens=special).input_ids for special in (False, True))
    return next((whole[:i] for i in range(len(whole)) if whole[i : i + len(text)] == text), [])


def _beginning(text: str, characters: int) -> str:
    """So many characters of `text`, and then up to the end of the line."""
    end = text.find("\n", characters)
    return text if end < 0 else text[:end]


def run_hashes(windows: Tensor, stride: int = RUN) -> Tensor:
    """64-bit hashes (1-D, int64) of the runs of 32 tokens that start every `stride` tokens of consecutive windows.

    What several windows all begin with is left out: it is not of the text (see `text_prefix`).
    """
    shared = int((windows == windows[0]).all(0).long().cumprod(0).sum())
    text = windows[:, shared % windows.shape[1] :].flatten()  # one window: all of it
    if text.numel() < RUN:
        return torch.empty(0, dtype=torch.int64)
    runs = text.unfold(0, RUN, stride)
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
