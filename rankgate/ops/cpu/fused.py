"""Chains of tiny operations on one token, each as one call on the CPU.

At batch 1 an operation on a few hundred numbers costs its dispatch, not its arithmetic. Two chains make up most of a
decode step outside its matrix products; each is defined here by the torch operations that it stands for (the pattern
that is looked for in a trace, and the oracle) and by a loop:

    RMS norm           w x / √(mean x² + ε)
    rotary embedding   x cos + [−x₂, x₁] sin,    x = [x₁, x₂]

A trace that spells them differently, or in another dtype than float32, keeps its own operations.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from numba import carray
from torch import Tensor, fx

from rankgate.ops.cpu.compile import jit
from rankgate.ops.cpu.vector import float_pointer

aten = torch.ops.aten
END = 2**63 - 1


def norm_definition(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The chain of an RMS norm along the last dimension."""
    scale = aten.rsqrt.default(aten.add.Tensor(aten.mean.dim(aten.pow.Tensor_Scalar(x, 2), [-1], True), eps))
    y: Tensor = aten.mul.Tensor(weight, aten.mul.Tensor(x, scale))
    return y


def rotary_definition(x: Tensor, cos: Tensor, sin: Tensor, half: int) -> Tensor:
    """The chain of a rotary embedding of x (1, heads, 1, 2 · half); cos, sin: (1, 1, 1, 2 · half)."""
    first, second = aten.slice.Tensor(x, 3, 0, half), aten.slice.Tensor(x, 3, half, END)
    turned = aten.cat.default([aten.neg.default(second), first], -1)
    y: Tensor = aten.add.Tensor(aten.mul.Tensor(x, cos), aten.mul.Tensor(turned, sin))
    return y


@jit
def _norm(x: int, weight: int, out: int, rows: int, width: int, eps: float) -> None:
    source, target = carray(float_pointer(x), (rows, width)), carray(float_pointer(out), (rows, width))
    factors = carray(float_pointer(weight), width)
    for r in range(rows):
        total = np.float32(0)
        for i in range(width):
            total += source[r, i] * source[r, i]
        scale = np.float32(1 / math.sqrt(total / width + eps))
        for i in range(width):
            target[r, i] = factors[i] * (source[r, i] * scale)


@jit
def _rotary(x: int, cos: int, sin: int, out: int, rows: int, half: int) -> None:
    source, target = carray(float_pointer(x), (rows, 2 * half)), carray(float_pointer(out), (rows, 2 * half))
    c, s = carray(float_pointer(cos), 2 * half), carray(float_pointer(sin), 2 * half)
    for r in range(rows):
        for i in range(half):
            target[r, i] = source[r, i] * c[i] - source[r, i + half] * s[i]
            target[r, i + half] = source[r, i + half] * c[i + half] + source[r, i] * s[i + half]


def norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`norm_definition` in one call."""
    x = x.contiguous()
    out = torch.empty_like(x)
    width = x.shape[-1]
    _norm(x.data_ptr(), weight.data_ptr(), out.data_ptr(), x.numel() // width, width, eps)
    return out


def rotary(x: Tensor, cos: Tensor, sin: Tensor, half: int) -> Tensor:
    """`rotary_definition` in one call."""
    x = x.contiguous()
    out = torch.empty_like(x)
    _rotary(x.data_ptr(), cos.data_ptr(), sin.data_ptr(), out.data_ptr(), x.numel() // (2 * half), half)
    return out


def _fits_norm(x: Tensor, weight: Tensor, eps: object) -> bool:
    return _plain(x, weight) and weight.shape == x.shape[-1:]


def _fits_rotary(x: Tensor, cos: Tensor, sin: Tensor, half: int) -> bool:
    width = x.shape[-1]
    return _plain(x, cos, sin) and width == 2 * half and cos.numel() == sin.numel() == width


def _plain(first: Tensor, *others: Tensor) -> bool:
    """Float32 on the CPU, and all but the first contiguous."""
    tensors = first, *others
    return all(t.dtype == torch.float32 and t.device.type == "cpu" for t in tensors) and all(
        t.is_contiguous() for t in others
    )


CHAINS: tuple[tuple[Any, Any, Any], ...] = (
    (norm_definition, norm, _fits_norm),
    (rotary_definition, rotary, _fits_rotary),
)


def fuse(module: fx.GraphModule, values: dict[fx.Node, Any]) -> None:
    """Replace the chains in a trace; `values`: an example of every node's result, to which shapes and dtypes belong."""
    for definition, kernel, fits in CHAINS:
        matcher = fx.passes.utils.matcher_utils.SubgraphMatcher(_graph_of(definition), ignore_literals=False)
        for match in matcher.match(module.graph):
            arguments = [match.nodes_map[p] for p in matcher.pattern.find_nodes(op="placeholder")]
            if not fits(*(values[a] if isinstance(a, fx.Node) else a for a in arguments)):
                continue
            last = match.returning_nodes[0]
            with module.graph.inserting_before(last):
                node = module.graph.call_function(kernel, tuple(arguments))
            values[node] = values[last]
            last.replace_all_uses_with(node)
        module.graph.eliminate_dead_code()


def _graph_of(definition: Any) -> fx.Graph:
    return fx.symbolic_trace(definition).graph
