"""Which operations of a trace are functions of every element, and a chain of them for `ops.cpu.elementwise`."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from rankgate.ops.cpu import elementwise as e
from rankgate.ops.cpu.vector import bits_of

aten = torch.ops.aten
UNARY = {
    aten.neg.default: e.NEG,
    aten.abs.default: e.ABS,
    aten.sqrt.default: e.SQRT,
    aten.rsqrt.default: e.RSQRT,
    aten.reciprocal.default: e.RECIPROCAL,
    aten.exp.default: e.EXP,
    aten.log.default: e.LOG,
    aten.tanh.default: e.TANH,
    aten.sigmoid.default: e.SIGMOID,
    aten.silu.default: e.SILU,
    aten.relu.default: e.RELU,
    aten.cos.default: e.COS,
    aten.sin.default: e.SIN,
}
BINARY = {
    aten.add.Tensor: e.ADD,
    aten.add.Scalar: e.ADD,
    aten.sub.Tensor: e.SUB,
    aten.sub.Scalar: e.SUB,
    aten.rsub.Scalar: e.RSUB,
    aten.mul.Tensor: e.MUL,
    aten.mul.Scalar: e.MUL,
    aten.div.Tensor: e.DIV,
    aten.div.Scalar: e.DIV,
    aten.maximum.default: e.MAXIMUM,
    aten.minimum.default: e.MINIMUM,
    aten.gt.Tensor: e.GT,
    aten.lt.Tensor: e.LT,
    aten.gt.Scalar: e.GT,
    aten.lt.Scalar: e.LT,
}
COPIES = {
    aten.to.dtype,
    aten.to.device,
    aten.to.dtype_layout,
    aten.clone.default,
    aten.contiguous.default,
    aten.reshape.default,
    aten._to_copy.default,
}
POWERS = {2.0: e.SQUARE, 3.0: e.CUBE, 0.5: e.SQRT, -0.5: e.RSQRT, -1.0: e.RECIPROCAL}
ROUND = {torch.bfloat16: e.BFLOAT16, torch.float16: e.FLOAT16}
FLOATS = {torch.float32, torch.bfloat16, torch.float16}
WHOLE = {torch.int64, torch.int32}
SLOW = {e.COS, e.SIN, e.GELU, e.LOG, e.SOFTPLUS, e.POW}  # some 20 ns each
CURVED = {e.EXP, e.TANH, e.SIGMOID, e.SILU, e.GELU_TANH}
WORTH = 12_000  # elements of the simplest instructions that make a chunk, some µs


def codes_of(node: fx.Node, value: Any, values: dict[fx.Node, Any]) -> tuple[list[int], list[Any]] | None:
    """The instructions for `node`, between its loads and its store, and what they are given; None if it has none."""
    target: Any = node.target
    args: tuple[Any, ...] = node.args
    operands = list(args[:1])
    codes: list[int] | None = None
    if target in UNARY:
        codes = [UNARY[target]]
    elif target in BINARY and not node.kwargs and len(args) == 2:
        codes, operands = [BINARY[target]], list(args)
    elif target is aten.pow.Tensor_Scalar:
        power = float(args[1])
        codes = [POWERS.get(power, e.POW)]
        operands = list(args) if codes == [e.POW] else operands
    elif target is aten.gelu.default:
        codes = [e.GELU_TANH if node.kwargs.get("approximate") == "tanh" else e.GELU]
    elif target in COPIES:
        codes = []
    if codes is None or not isinstance(value, Tensor) or dimensions(value.shape) > 4:
        return None
    dtypes = {values[o].dtype for o in operands if isinstance(o, fx.Node)}
    allowed = not codes or set(codes) <= {e.ADD, e.SUB, e.GT, e.LT}
    if value.dtype in FLOATS:
        fits = dtypes <= FLOATS | WHOLE | {torch.bool}
    else:  # whole numbers up to 2²⁴
        fits = allowed and value.dtype in WHOLE | {torch.bool} and dtypes <= WHOLE | {torch.bool} | FLOATS
        fits = fits and (dtypes <= WHOLE | {torch.bool} or bool(codes))
    return (codes, operands) if fits else None


def dimensions(shape: torch.Size) -> int:
    """Those with more than one element; a chain has four at most."""
    return sum(size > 1 for size in shape)


class Chain:
    """Instructions for tensors of one shape; an operand is a node, a tensor or a number."""

    def __init__(self, shape: torch.Size) -> None:
        self.shape = shape
        self.code: list[tuple[int, int, int, int, float, Tensor | None]] = []
        self.slots: dict[Any, int] = {}  # of what has been loaded or computed
        self.results: list[tuple[fx.Node | None, Tensor, int]] = []
        self.count = 0

    def takes(self, value: Tensor, operands: list[Any], values: dict[fx.Node, Any]) -> bool:
        """Whether the next operation may be added: of the same shape, reading nothing that is yet to be written."""
        if value.shape != self.shape or self.count + 4 > e.SLOTS:
            return False
        written = {result.untyped_storage().data_ptr() for _, result, _ in self.results}
        for operand in operands:
            tensor = values[operand] if isinstance(operand, fx.Node) else operand
            known = isinstance(operand, fx.Node) and operand in self.slots
            if isinstance(tensor, Tensor) and not known and tensor.untyped_storage().data_ptr() in written:
                return False
        return True

    def add(
        self, node: fx.Node | None, value: Tensor, codes: list[int], operands: list[Any], values: dict[fx.Node, Any]
    ) -> None:
        given = [self._slot(operand, values) for operand in operands]
        out = given[0]
        for code in codes:
            out = self._new()
            self.code.append((code, out, given[0], given[-1], 0.0, None))
        first = values[operands[0]] if isinstance(operands[0], fx.Node) else operands[0]
        if value.dtype in ROUND and (codes or first.dtype != value.dtype):
            rounded = self._new()
            self.code.append((ROUND[value.dtype], rounded, out, 0, 0.0, None))
            out = rounded
        if node is not None:
            self.slots[node] = out
        self.results.append((node, value, out))

    def _new(self) -> int:
        self.count += 1
        return self.count - 1

    def _slot(self, operand: Any, values: dict[fx.Node, Any]) -> int:
        if isinstance(operand, fx.Node) and operand in self.slots:
            return self.slots[operand]
        slot = self._new()
        if isinstance(operand, (int, float)):
            self.code.append((e.FILL, slot, 0, 0, float(operand), None))
            return slot
        tensor: Tensor = values[operand] if isinstance(operand, fx.Node) else operand
        self.code.append((e.LOAD, slot, 0, 0, 0.0, tensor.expand(self.shape)))
        if isinstance(operand, fx.Node):
            self.slots[operand] = slot
        return slot

    def finish(self) -> tuple[np.ndarray, int]:
        """The arguments of `elementwise.chain`, and its chunks."""
        own = {node for node, _, _ in self.results if node is not None}
        for node, value, slot in self.results:
            if node is None or any(user not in own for user in node.users):
                self.code.append((e.STORE, 0, slot, 0, 0.0, value))
        shape, strides = _merged(self.shape, [t.stride() for *_, t in self.code if t is not None])
        *outer, inner = [1] * (4 - len(shape)) + shape
        places = iter(strides)
        words: list[int] = []
        weight = 0
        for code, out, a, b, number, tensor in self.code:
            words += [code, out, a, b, bits_of(number)]
            weight += 32 if code in SLOW else 6 if code in CURVED else 1
            if tensor is None:
                words += [0] * 6
            else:
                steps = [0] * (4 - len(shape)) + next(places)
                words += [tensor.data_ptr(), e.DTYPES.index(tensor.dtype), steps[3], *steps[:3]]
        tiles = int(np.prod(outer)) * -(-inner // e.TILE)
        share = max(1, WORTH // (weight * min(inner, e.TILE)), -(-tiles // 4096))
        return np.array([len(self.code), *outer, inner, share, *words], np.int64), -(-tiles // share)


def _merged(shape: torch.Size, strides: list[tuple[int, ...]]) -> tuple[list[int], list[list[int]]]:
    """Shape and strides with as few dimensions as describe the same elements in the same order."""
    sizes: list[int] = []
    steps: list[list[int]] = [[] for _ in strides]
    for d, size in enumerate(shape):
        if size == 1:
            continue
        if sizes and all(s[-1] == stride[d] * size for s, stride in zip(steps, strides, strict=True)):
            sizes[-1] *= size
            for s, stride in zip(steps, strides, strict=True):
                s[-1] = stride[d]
        else:
            sizes.append(size)
            for s, stride in zip(steps, strides, strict=True):
                s.append(stride[d])
    return (sizes, steps) if sizes else ([1], [[1] for _ in strides])
