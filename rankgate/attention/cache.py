"""Caches in the form that transformers asks for: layers that count their tokens, and what token selection left."""

from __future__ import annotations

from typing import Any, cast

from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from rankgate.attention.strands import Strand
from rankgate.errors import RankgateError


class CountedLayer(CacheLayerMixin):
    """A layer of a cache without bound, of which `length` tokens are filled."""

    is_sliding = False
    length: int

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.length + query_length, 0

    def get_seq_length(self) -> int:
        return self.length

    def get_max_length(self) -> int:
        return -1

    get_max_cache_shape = get_max_length  # the name of some versions


class SelectiveLayer(CountedLayer):
    """A layer of a `SelectiveCache`: strands by sequence. `update` only counts; attention adds to the strands."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.length = 0
        self.strands: list[list[Strand]] = []

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        self.length += key_states.shape[-2]
        return key_states, value_states

    def reset(self) -> None:
        self.length, self.strands = 0, []

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.strands = [[strand.copy() for strand in self.strands[b]] for b in beam_idx.tolist()]

    def crop(self, max_length: int) -> None:
        raise RankgateError("this cache has dropped tokens and cannot be cut back; generate without assistance")


class SelectiveCache(Cache):
    """What token selection left of the past. `nbytes`: what it holds."""

    def __init__(self, layers: int) -> None:
        super().__init__(layers=[SelectiveLayer() for _ in range(layers)])

    def strands(self, rows: int) -> list[list[list[Strand]]]:
        """By layer and sequence, of which there are `rows`."""
        for layer in self._layers():
            layer.strands = layer.strands or [[] for _ in range(rows)]
            if len(layer.strands) != rows:
                raise RankgateError(f"the cache is of {len(layer.strands)} sequences, the input of {rows}")
        return [layer.strands for layer in self._layers()]

    @property
    def nbytes(self) -> int:
        return sum(strand.nbytes for layer in self._layers() for row in layer.strands for strand in row)

    def _layers(self) -> list[SelectiveLayer]:
        return cast(list[SelectiveLayer], self.layers)
