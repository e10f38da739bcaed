"""What several operations of a trace are together: norms by the root mean square, and rotary embeddings.

As rows of a program of their own they would be most of all rows, and each comes from memory anew for every token.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

aten = torch.ops.aten


@dataclass(frozen=True)
class Found:
    """The operations `inner`, in order and without views, and one more are `kind` of `operands`.

    Nobody else reads the results of the inner ones.
    """

    kind: str
    operands: tuple[Any, ...]
    inner: tuple[fx.Node, ...]


def find(graph: fx.Graph) -> dict[fx.Node, Found]:
    """By the last operation of each."""
    found: dict[fx.Node, Found] = {}
    for node in graph.nodes:
        for match in (_norm, _rotation):
            result = match(node)
            if result is not None and all(_only_within(n, {*result.inner, node}) for n in result.inner):
                found[node] = result
    return found


def _only_within(node: fx.Node, group: set[fx.Node]) -> bool:
    return all(user in group for user in node.users)


def _is(node: Any, *targets: Any) -> bool:
    return isinstance(node, fx.Node) and node.target in targets and not node.kwargs


def _pair(node: Any, first: Callable[[Any], bool]) -> tuple[Any, Any] | None:
    """The two operands of a commutative operation, the one that is `first` in front."""
    a, b = node.args[:2]
    return (a, b) if first(a) else (b, a) if first(b) else None


def _norm(node: fx.Node) -> Found | None:
    """x · rsqrt(mean(x²) + ε)."""
    pair = _pair(node, lambda n: _is(n, aten.rsqrt.default)) if _is(node, aten.mul.Tensor) else None
    if pair is None:
        return None
    root, x = pair
    plus = root.args[0]
    if not _is(plus, aten.add.Tensor, aten.add.Scalar) or not isinstance(plus.args[1], float):
        return None
    mean = plus.args[0]
    if not _is(mean, aten.mean.dim) or [list(mean.args[1]), *mean.args[2:]] != [[-1], True]:
        return None
    square = mean.args[0]
    if not _is(square, aten.pow.Tensor_Scalar) or square.args[0] is not x or square.args[1] != 2:
        return None
    return Found("norm", (x, plus.args[1]), (square, mean, plus, root))


def _rotation(node: fx.Node) -> Found | None:
    """x · cos + rotated · sin, where `rotated` is −(second half of x), then the first half."""
    if not _is(node, aten.add.Tensor) or not all(_is(n, aten.mul.Tensor) for n in node.args):
        return None
    pair = _pair(node, lambda n: any(_is(m, aten.cat.default) for m in n.args))
    rotated = None if pair is None else _pair(pair[0], lambda n: _is(n, aten.cat.default))
    if pair is None or rotated is None:
        return None
    (turned, straight), (cat, sine) = pair, rotated
    parts = cat.args[0]
    if cat.args[1:] != (-1,) or len(parts) != 2 or not _is(parts[0], aten.neg.default):
        return None
    upper, lower = parts[0].args[0], parts[1]
    if not (_is(upper, aten.slice.Tensor) and _is(lower, aten.slice.Tensor)) or upper.args[0] is not lower.args[0]:
        return None
    x, dim, half = lower.args[0], lower.args[1], lower.args[3]
    if x not in straight.args or lower.args[2] != 0 or upper.args[1:3] != (dim, half):
        return None
    cosine = straight.args[1] if straight.args[0] is x else straight.args[0]
    return Found("rotation", (x, cosine, sine, dim, half), (parts[0], cat, turned, straight))
