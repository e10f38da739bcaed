"""A captured step on a GPU: compiled, and recorded in a CUDA graph.

torch.compile fuses the chains of small operations between the matrix products; the graph launches all that is left at
once. The graph holds for every sequence and every length: what changes from token to token (the token, its position,
where the cache lies) is data, in three small tensors that belong to the graph.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor, fx

from rankgate.ops import attention_gpu

WARM = 2  # runs before the recording, as CUDA graphs ask for; the first one compiles


class Recorded:
    """The step `module` (token, position, table of the cache) → logits, recorded with the given inputs."""

    def __init__(self, module: fx.GraphModule, inputs: list[Tensor]) -> None:
        self.token, self.position, self.cache = inputs
        self.bound: Tensor | None = None  # the rows that `cache` holds
        function = torch.compile(module, fullgraph=True, dynamic=False)
        stream = torch.cuda.Stream(self.token.device)
        stream.wait_stream(torch.cuda.current_stream(self.token.device))
        with torch.cuda.stream(stream):
            for _ in range(WARM):
                function(*inputs)
        torch.cuda.current_stream(self.token.device).wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.logits: Tensor = function(*inputs)

    def bind(self, buffers: list[Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
        """A step on the given keys and values."""
        return functools.partial(self._replay, attention_gpu.table(buffers))

    def _replay(self, rows: Tensor, token: Tensor, position: Tensor) -> Tensor:
        if self.bound is not rows:
            self.cache.copy_(rows)
            self.bound = rows
        self.token.copy_(token)
        self.position.copy_(position)
        self.graph.replay()
        return self.logits.clone()  # the next replay, perhaps of another sequence, writes over it
