"""A captured step on a GPU: compiled, and recorded in a CUDA graph.

torch.compile fuses the chains of small operations between the matrix products. It is shown what lies between two
attentions, and once for all layers that do the same there: compiling takes as long for 80 layers as for 3. Then one
CUDA graph records everything. It holds for every sequence and every length: what changes from token to token (the
token, its position, where the cache lies) is data, in three small tensors that belong to the graph.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, fx, nn
from torch.fx.passes.split_module import split_module

from rankgate.decoding.begun import Begun, Step

WARM = 2  # runs before the recording, as CUDA graphs ask for; the first one compiles
NAMES = "attend", "attend_at", "attend_held", "attend_held_at"
ATTENTION = {getattr(torch.ops.rankgate, name).default for name in NAMES}


class Recorded:
    """The step `module` (token, position, table of the cache) → logits, recorded with the given inputs."""

    def __init__(self, module: fx.GraphModule, inputs: list[Tensor]) -> None:
        self.token, self.position, self.cache = inputs
        self.bound: Tensor | None = None  # the rows that `cache` holds
        constants = lift_constants(module)
        function = share_layers(module, _compile)
        stream = torch.cuda.Stream(self.token.device)
        stream.wait_stream(torch.cuda.current_stream(self.token.device))
        with torch.cuda.stream(stream):
            for _ in range(WARM):
                function(*inputs, *constants)
        torch.cuda.current_stream(self.token.device).wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, capture_error_mode="thread_local"):  # other threads may prepare a text
            self.logits: Tensor = function(*inputs, *constants)
        self.constants = constants  # the graph holds their addresses

    def bind(self, buffers: list[Tensor], _: int = 1) -> Step:
        """A step on the given keys and values; threads are none of its business."""
        from rankgate.ops.gpu.attention import table

        return functools.partial(self._replay, table(buffers))

    def _replay(self, rows: Tensor, token: Tensor, position: Tensor) -> Begun:
        if self.bound is not rows:
            self.cache.copy_(rows)
            self.bound = rows
        self.token.copy_(token)
        self.position.copy_(position)
        self.graph.replay()
        logits = self.logits.clone()  # the next replay, perhaps of another sequence, writes over it
        return Begun(lambda: logits)


def _compile(part: fx.GraphModule) -> nn.Module:
    # enable_pdl: Inductor's kernels overlap too, see `ops.gpu.overlap`
    whole = torch.compile(part, fullgraph=True, dynamic=False, options={"triton.enable_pdl": True})
    return cast(nn.Module, whole)


def lift_constants(module: fx.GraphModule) -> list[Tensor]:
    """Turn the constants of a trace into inputs behind its own, and return them."""
    graph = module.graph
    nodes = graph.find_nodes(op="get_attr")
    constants = [getattr(module, node.target) for node in nodes]
    last = graph.find_nodes(op="placeholder")[-1]
    for node in nodes:
        with graph.inserting_after(last):
            last = graph.placeholder(f"constant_{node.name}")
        node.replace_all_uses_with(last)
        graph.erase_node(node)
    module.recompile()
    return constants


def share_layers(module: fx.GraphModule, compile_part: Callable[[fx.GraphModule], nn.Module]) -> fx.GraphModule:
    """`module` without constants, its parts between attentions compiled: those of the same structure once."""
    parts: dict[fx.Node, int] = {}
    part = 0
    for node in module.graph.nodes:
        if node.op == "call_function":
            part += node.target in ATTENTION
            parts[node] = part
            part += node.target in ATTENTION
    whole = split_module(module, module, parts.__getitem__, keep_original_order=True)
    compiled: dict[Any, nn.Module] = {}
    for name, child in list(whole.named_children()):
        assert isinstance(child, fx.GraphModule)
        if any(node.target in ATTENTION for node in child.graph.nodes):
            continue
        key = _structure(child.graph)
        if key not in compiled:
            compiled[key] = compile_part(child)
        setattr(whole, name, compiled[key])
    return whole


def _structure(graph: fx.Graph) -> Any:
    """Equal for graphs that do the same, whatever their nodes are called."""
    names = {node: f"%{number}" for number, node in enumerate(graph.nodes)}
    described = []
    for node in graph.nodes:
        arguments = fx.map_arg((node.args, node.kwargs), names.__getitem__)
        described.append((node.op, "" if node.op == "placeholder" else node.target, repr(arguments)))
    return tuple(described)
