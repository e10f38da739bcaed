"""Where the results of a step lie: memory is used again once nobody reads what is in it, so that it stays in caches.

A step reads its weights from front to back and with them drives all else out of the caches: a result that had memory of
its own would come from and go to main memory for every token.
"""

from __future__ import annotations

import torch
from torch import Tensor, fx

from rankgate.ops.cpu.vector import LINE

SPARE = 8  # a block may be so many times as large as what lies in it


class Places:
    """Blocks of memory for the results of `graph`, given out while its nodes are lowered in order.

    later: nodes that are lowered together with a later one.
    """

    def __init__(self, graph: fx.Graph, later: dict[fx.Node, fx.Node]) -> None:
        self.later = later
        self.numbers = {node: number for number, node in enumerate(graph.nodes)}
        self.blocks: list[Tensor] = []  # all there are
        self.free: list[Tensor] = []  # the one that was in use last at the end
        self.busy: dict[int, tuple[Tensor, int]] = {}  # by address: a block, and who reads it last

    def release(self, node: fx.Node) -> None:
        """Let blocks be used again that nobody reads from `node` on."""
        number = self.numbers[node]
        for address, (block, last) in list(self.busy.items()):
            if last < number:
                self.free.append(block)
                del self.busy[address]

    def take(self, like: Tensor, node: fx.Node, dtype: torch.dtype | None = None) -> Tensor:
        """Memory for a tensor of the shape and strides of `like`, until all that read `node` have done so."""
        dtype = dtype or like.dtype
        extent = sum((size - 1) * step for size, step in zip(like.shape, like.stride(), strict=True)) + 1
        size = -(-max(extent, 1) * dtype.itemsize // LINE) * LINE
        fits = (i for i, block in reversed(list(enumerate(self.free))) if size <= block.numel() <= SPARE * size)
        chosen = next(fits, None)
        if chosen is None:
            block = _aligned(size)
            self.blocks.append(block)
        else:
            block = self.free.pop(chosen)
        self.busy[block.data_ptr()] = block, self._last(node)
        return block[: extent * dtype.itemsize].view(dtype).as_strided(like.shape, like.stride())

    def share(self, node: fx.Node, view: Tensor) -> None:
        """`node` lies in memory that was given out."""
        start = view.untyped_storage().data_ptr()
        for address, (block, last) in self.busy.items():
            if block.untyped_storage().data_ptr() == start:
                self.busy[address] = block, max(last, self._last(node))

    def _last(self, node: fx.Node) -> int:
        return max(self.numbers[self.later.get(n, n)] for n in (node, *node.users))


def _aligned(size: int) -> Tensor:
    raw = torch.zeros(size + LINE, dtype=torch.uint8)
    return raw[-raw.data_ptr() % LINE :][:size]
