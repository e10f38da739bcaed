"""What models ask of attention through transformers' registries, beside reading every token before.

Whoever puts attention of its own in the place of a model's must honour all of it, or refuse the model: a soft cap,
learned sinks, a window or chunks that are silently dropped give other numbers and no error.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

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


def refuse_beyond_plain(options: Mapping[str, Any]) -> None:
    """Raises RankgateError if a model's attention takes more than plain attention does."""
    if beyond := beyond_plain(options):
        raise RankgateError(f"the model's attention takes {beyond}; attention to fewer keys would leave that out")


def plain_mask(*_: Any, mask_function: Callable[..., Any] = causal_mask_function, **__: Any) -> None:
    """A mask interface for attention that decides by itself who sees what. Raises RankgateError: see above."""
    if not is_plainly_causal(mask_function):
        raise RankgateError("the model has windows or chunks of its own; attention to fewer keys would leave them out")
