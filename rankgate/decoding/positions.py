"""Rotary embeddings whose frequencies depend on how long a text is: dynamic NTK and LongRoPE.

Up to a length they are those that every text begins with. Steps are captured for texts that stay within it.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import math
from collections.abc import Iterator
from typing import Any

from torch import nn
from transformers import PreTrainedModel

KINDS = {"dynamic", "longrope"}
FIRST = "original_max_position_embeddings"


def _scaling(model: nn.Module) -> list[Any]:
    """The modules that are meant."""

    def kinds(module: nn.Module) -> set[Any]:
        kind: Any = getattr(module, "rope_type", None)
        return {*kind.values()} if isinstance(kind, dict) else {kind}

    return [module for module in model.modules() if kinds(module) & KINDS]


def scaled_from(model: PreTrainedModel) -> float:
    """How many tokens a text may have before its positions are scaled anew; infinity where they never are."""
    lengths = [math.inf]
    for module in _scaling(model):
        settings = module.config.rope_parameters
        each = [settings, *(value for value in settings.values() if isinstance(value, dict))]
        lengths += [s[FIRST] for s in each if s.get(FIRST)] or [module.original_max_seq_len]
    return min(lengths)


@contextlib.contextmanager
def unscaled(model: nn.Module) -> Iterator[None]:
    """For as long as this lasts, no module looks at how long the text is."""
    modules = _scaling(model)
    try:
        for module in modules:
            vars(module)["forward"] = functools.partial(inspect.unwrap(type(module).forward), module)
        yield
    finally:
        for module in modules:
            del vars(module)["forward"]


def forget_longest_(model: PreTrainedModel) -> None:
    """Let rotary embeddings that scale with the longest text so far (dynamic NTK) begin anew.

    They keep that length from one call of the model to the next, so that an answer would depend on those before it.
    """
    for module in model.modules():
        for name in [name for name in vars(module) if name.endswith("max_seq_len_cached")]:
            prefix = name.removesuffix("max_seq_len_cached")
            first = getattr(module, "original_max_seq_len", None)
            if first is not None and getattr(module, name) != first:
                frequencies: Any = getattr(module, f"{prefix}original_inv_freq")
                setattr(module, name, first)
                setattr(module, f"{prefix}inv_freq", frequencies.to(model.device))
