"""What a step gives back when it is begun."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor


class Begun(NamedTuple):
    """A step that is on its way: `result` waits for its logits (all tokens, vocabulary), `cancel` gives it up."""

    result: Callable[[], Tensor]
    cancel: Callable[[], None] = lambda: None


Step = Callable[[Tensor, Tensor], Begun]  # from tokens and positions, (sequences, tokens) int64
