"""Captured steps of a model whose heads read fewer keys: the prompt is read into strands, which then become rows.

Where windows move, what leaves those with representatives is handed over before the step. One sequence only, of which
nothing is taken back.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from rankgate.attention.attend import TokenSelection
from rankgate.attention.cache import SelectiveCache
from rankgate.attention.held import HeldRows
from rankgate.decoding.begun import Begun
from rankgate.decoding.capture import Capture
from rankgate.decoding.steps import Steps, room
from rankgate.ops import attention


class HeldSteps(Steps):
    """Steps with what `selection` did to `model`."""

    def __init__(
        self, selection: TokenSelection, model: PreTrainedModel, input_ids: Tensor, kwargs: dict[str, Any]
    ) -> None:
        super().__init__(model, input_ids, kwargs)
        self.selection = selection
        self.held: list[HeldRows] = []  # by layer, once there is a capture
        self.filled = self.filling[0]
        self.reads = 0  # keys, by the next step

    def _cache(self, layers: int) -> Cache:
        self.layers = []
        self.past = SelectiveCache(layers)
        return self.past

    def _read(self, ids: Tensor, count: int, positions: Tensor) -> Tensor:
        if self.length - self.filled < self.selection.config.sinks:  # which have to be there, as kept rows
            self.length += 1
            return self._forward(ids)
        return super()._read(ids, count, positions)

    def _rewound(self, start: int) -> None:
        """Nothing can be; but before a capture is tried, rows are made without the token that it is tried on."""
        if start - self.filled >= self.selection.config.sinks and (1, 1) not in self.captures:
            self._reserved(self.length)

    def _copies(self, length: int) -> list[Tensor]:
        return self._reserved(length)

    def _checked(self, ids: Tensor, positions: Tensor, expected: Tensor) -> Capture | None:
        capture = super()._checked(ids, positions, expected)
        if capture is None:
            self.held = []
        return capture

    def _replay(self, ids: Tensor, count: int, positions: Tensor, capture: Capture) -> Begun:
        t = self.length - self.filled - 1
        if self.held and t % attention.STEP == 0:
            moved = [layer.hand_over(t) for layer in self.held]
            if any(moved):
                self.steps.clear()
        begun = super()._replay(ids, count, positions, capture)
        heads = sum(len(layer.taus) for layer in self.held)
        if not self.reads or t % attention.STEP == 0:
            self.reads = sum(layer.reads(t) for layer in self.held)
            for (strands,) in self.past.strands(1):
                strands.clear()
        reads = self.reads
        self.reads += heads

        def result() -> Tensor:
            self.selection.count(reads, heads * (t + 1))
            return begun.result()

        return Begun(result, begun.cancel)

    def _reserved(self, length: int) -> list[Tensor]:
        if length > self.capacity:
            self.capacity = room(length)
            self.steps.clear()
            for layer in self.held:
                layer.reserve(self.capacity)
        if not self.held:
            self.held = [HeldRows(row, self.capacity) for (row,) in self.past.strands(1)]
        return [buffer for layer in self.held for buffer in layer.buffers]
