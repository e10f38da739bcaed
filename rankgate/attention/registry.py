"""What models ask of attention through transformers' registries, beside reading every token before.

Whoever puts attention of its own in the place of a model's must honour all of it, or refuse the model: a soft cap,
learned sinks, a window or chunks that are silently dropped give other numbers and no error.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from transformers.masking_utils import causal_mask_function

from rankgate.errors import RankgateError

# options that do not change what plain causal attention computes in evaluation mode
KNOWN = {"dropout", "position_ids", "use_cache", "is_causal", "past_key_values", "cache_position", "return_dict"}


def beyond_plain(options: Mapping[str, Any]) -> str:
    """Names of the options of an attention call that plain attention does not have, '' if there are none."""
    return ", ".join(
        name for name, value in options.items() if name not in KNOWN and value is not None and value is not False
    )


def is_plainly_causal(mask_function: Callable[..., Any]) -> bool:
    """Whether a query token sees itself and everything before it: no window, no chunks, nothing else."""
    return mask_function is causal_mask_function


def is_window(mask_function: Callable[..., Any], window: int) -> bool:
    """Whether a query token sees itself and the `window` − 1 before it, by what the function says of many positions."""
    key = torch.arange(3 * window)[None]
    query = torch.tensor([0, 1, window - 1, window, window + 1, 2 * window, 3 * window - 1])[:, None]
    expected = (key <= query) & (key > query - window)
    zero = torch.zeros((), dtype=torch.int64)
    return torch.equal(torch.as_tensor(mask_function(zero, zero, query, key)).expand_as(expected), expected)


def refuse_beyond_plain(options: Mapping[str, Any]) -> None:
    """Raises RankgateError if a model's attention takes more than plain attention does."""
    if beyond := beyond_plain(options):
        raise RankgateError(f"the model's attention takes {beyond}; attention to fewer keys would leave that out")


def plain_mask(*_: Any, mask_function: Callable[..., Any] = causal_mask_function, **__: Any) -> None:
    """A mask interface for attention that decides by itself who sees what. Raises RankgateError: see above."""
    if not is_plainly_causal(mask_function):
        raise RankgateError("the model has windows or chunks of its own; attention to fewer keys would leave them out")
