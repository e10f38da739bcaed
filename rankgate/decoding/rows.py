"""How rows of a program come about: what the operations of a captured step have in common when they become such.

A row has addresses in it, so every result gets its place (`places`) before there is a row for it. Operations on
elements gather in a chain until something else needs what is in it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from rankgate.decoding.chains import Chain, codes_of
from rankgate.decoding.places import Places
from rankgate.ops.cpu import elementwise, team
from rankgate.ops.cpu.memory import use_large_pages


class Rows:
    """The programs for the trace `graph`, while it is gone through.

    later: operations that are lowered together with a later one.
    """

    def __init__(self, graph: fx.Graph, later: dict[fx.Node, fx.Node]) -> None:
        self.programs: list[np.ndarray | Callable[[], None]] = []
        self.kept: list[Any] = []  # what programs hold addresses of
        self.rows: list[list[int]] = []
        self.chain: Chain | None = None
        self.values: dict[fx.Node, Any] = {}
        self.floats: dict[fx.Node, Tensor] = {}  # results as contiguous float32
        self.places = Places(graph, later)

    def _shared(self, node: fx.Node, value: Any) -> None:
        """`node` lies in memory of what it was given."""
        self.values[node] = value
        for tensor in torch.utils._pytree.tree_leaves(value):
            if isinstance(tensor, Tensor):
                self.places.share(node, tensor)

    def _placed(self, node: fx.Node) -> Any:
        """The result of `node`, moved to a place of ours."""

        def place(result: Any) -> Any:
            return self.places.take(result, node).copy_(result) if isinstance(result, Tensor) else result

        self.values[node] = placed = torch.utils._pytree.tree_map(place, self.values[node])
        return placed

    def _end_program(self) -> None:
        self._end_chain()
        if self.rows:
            use_large_pages((matrix, chunks * share) for _, _, chunks, matrix, share in self.rows)
            self.programs.append(team.program(self.rows))
            self.rows = []

    def _end_chain(self) -> None:
        if self.chain is not None:
            words, chunks = self.chain.finish()
            self.chain = None
            self._add_rows(team.row(elementwise.chain, words, chunks), words)

    def _add_rows(self, row: list[int], *kept: Any) -> None:
        self.rows.append(row)
        self.kept.extend(kept)

    def _row(self, kernel: Any, words: list[int], chunks: int = 1, *matrix: int) -> None:
        self._end_chain()
        arguments = np.array(words, np.int64)
        self._add_rows(team.row(kernel, arguments, chunks, *matrix), arguments)

    def _elementwise(self, node: fx.Node, value: Any) -> bool:
        """Put `node` on a chain, if it is an operation on every element."""
        found = codes_of(node, value, self.values)
        if found is None:
            return False
        codes, operands = found
        if not codes and self.values[operands[0]].shape != value.shape:  # a copy in another shape
            self._end_chain()
            self._copy(operands[0], value.view(self.values[operands[0]].shape))
            self._end_chain()
        else:
            self._extend(node, value, codes, operands)
        return True

    def _extend(self, node: fx.Node | None, value: Tensor, codes: list[int], operands: list[Any]) -> None:
        """Value = the functions of the operands: nodes or tensors (their values are loaded), or numbers."""
        if self.chain is not None and not self.chain.takes(value, operands, self.values):
            self._end_chain()
        if self.chain is None:
            self.chain = Chain(value.shape)
        self.chain.add(node, value, codes, operands, self.values)

    def _copy(self, source: Any, target: Tensor) -> None:
        """A row for target = source, an operand; shapes are the same."""
        self._extend(None, target, [], [source])

    def _wide(self, node: Any) -> Tensor:
        """The value of `node` as contiguous float32."""
        value: Tensor = self.values[node]
        if value.dtype == torch.float32 and value.is_contiguous():
            self._end_chain()
            return value
        if node not in self.floats:
            self.floats[node] = self._float(value, node)
            self._copy(node, self.floats[node])
            self._end_chain()
        return self.floats[node]

    def _contiguous(self, node: Any) -> Tensor:
        value: Tensor = self.values[node]
        self._end_chain()
        if value.is_contiguous():
            return value
        target = self.places.take(torch.empty(value.shape, device="meta"), node, value.dtype)
        self._copy(node, target)
        self._end_chain()
        return target

    def _accumulator(self, node: fx.Node, value: Tensor) -> Tensor:
        """Where a kernel leaves `value` of `node` in float32: in it, if it is that."""
        return value if value.dtype == torch.float32 and value.is_contiguous() else self._float(value, node)

    def _float(self, value: Tensor, node: fx.Node) -> Tensor:
        """A place for a contiguous float32 copy."""
        return self.places.take(torch.empty(value.shape, device="meta"), node, torch.float32)

    def _scratch(self, size: int, node: fx.Node) -> Tensor:
        """So many bytes until all that read `node` have done so."""
        return self.places.take(torch.empty(size, dtype=torch.uint8, device="meta"), node)

    def _rounded(self, node: fx.Node, value: Tensor, found: Tensor) -> None:
        """Value = found in its own dtype, if `found` is not `value`."""
        if found is not value:
            self._extend(node, value, [], [found])
