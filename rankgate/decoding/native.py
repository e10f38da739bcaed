"""A captured step on a CPU: its operations as rows of programs for a team of threads (`ops.cpu.team`).

Every result of the trace has its place, for good, so what the trace calls a view is one, and costs nothing; those that
are not needed at the same time share it (`places`).
The other operations become rows: products, attention, norms, rows of embeddings, and chains of operations on elements
(`ops.cpu.elementwise`), which go on for as long as their shapes are the same. An operation without a kernel, or of a
dtype without one, stays a call of torch between two programs.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from rankgate.decoding.begun import Begun, Step
from rankgate.decoding.chains import dimensions
from rankgate.decoding.patterns import Found, find
from rankgate.decoding.rows import Rows
from rankgate.ops.cpu import attention, dense, elementwise, many, norms, quantized, team
from rankgate.ops.cpu.attention import KINDS
from rankgate.ops.cpu.memory import use_large_pages
from rankgate.ops.cpu.vector import bits_of

aten = torch.ops.aten
QUANTIZED, CHOSEN = torch.ops.rankgate.quantized_linear.default, torch.ops.rankgate.chosen_linear.default
ATTEND, HELD = torch.ops.rankgate.attend.default, torch.ops.rankgate.attend_held.default
FLOATS = set(KINDS)


class Native(Rows):
    """The trace `module` of (token, position, keys and values of every layer), simplified; `inputs`: an example.

    parts: how many programs and calls of torch alternate.
    """

    def __init__(self, module: fx.GraphModule, inputs: list[Tensor]) -> None:
        self.patterns = find(module.graph)
        self.inner = {inner: last for last, found in self.patterns.items() for inner in found.inner}
        super().__init__(module.graph, self.inner)
        self.token, self.position = inputs[:2]
        self.buffers: list[Tensor] = []
        self.lock = threading.Lock()  # results have one place: one step at a time
        self.step: _Running | None = None
        self.attentions: list[tuple[attention.Attention, list[int]]] = []  # and numbers of their buffers
        self.cache_nodes: dict[fx.Node, int] = {}
        with torch.no_grad():
            for number, (node, value) in enumerate(zip(module.graph.find_nodes(op="placeholder"), inputs, strict=True)):
                self.values[node] = value
                if number > 1:
                    self.cache_nodes[node] = number - 2
            for node in module.graph.nodes:
                if node.op == "get_attr":
                    self.values[node] = getattr(module, node.target)
                elif node.op == "call_function":
                    self._lower(node)
                elif node.op == "output":
                    self.logits: Tensor = self.values[_args(node)[0]]
        self._end_program()
        self.kept += [module, *self.places.blocks]
        self.parts = len(self.programs)
        del self.values, self.floats, self.places, self.patterns, self.inner

    def bind(self, buffers: list[Tensor], threads: int) -> Step:
        """A step on these keys and values."""
        out = torch.empty_like(self.logits)  # which the next step, of whatever sequence, does not write over
        return lambda token, position: self._begin(buffers, threads, token, position, out)

    def _begin(self, buffers: list[Tensor], threads: int, token: Tensor, position: Tensor, out: Tensor) -> Begun:
        with self.lock:
            self._finish()
            if self.buffers is not buffers:
                for attend, numbers in self.attentions:
                    attend.bind(*(buffers[number] for number in numbers))
                use_large_pages((t.data_ptr(), t.nbytes) for t in buffers)
                self.buffers = buffers
            self.token.copy_(token)
            self.position.copy_(position)
            step = self.step = _Running(self.programs, threads, out)
        return Begun(lambda: self._result(step), lambda: self._cancel(step))

    def _result(self, step: _Running) -> Tensor:
        with self.lock:
            if step is self.step:
                self._finish()
            return step.out

    def _cancel(self, step: _Running) -> None:
        with self.lock:
            if step is self.step:
                step.cancel()
                self.step = None

    def _finish(self) -> None:
        """Be through with the step that runs, whosever it is."""
        if self.step is not None:
            self.step.finish()
            self.step.out.copy_(self.logits)
            self.step = None

    def _lower(self, node: fx.Node) -> None:
        target: Any = node.target
        args, kwargs = fx.map_arg((node.args, node.kwargs), self.values.__getitem__)
        if self.chain is None:
            self.places.release(node)
        value = target(*args, **kwargs)
        schema = getattr(target, "_schema", None)
        if target is aten.dropout.default and not args[2]:
            value = args[0]
        if (schema is not None and schema.is_mutable and target not in {ATTEND, HELD}) or _is_view(value, args):
            self._shared(node, value)
            if schema is not None and schema.is_mutable:
                self._call(node, None)
            return
        self.values[node] = value
        found = self.patterns.get(node)
        if node not in self.inner and not (found is not None and self._pattern(node, found)):
            for each in (*(() if found is None else found.inner), node):
                self._emit(each)

    def _emit(self, node: fx.Node) -> None:
        """Rows for one operation."""
        value = self._placed(node)
        lower = LOWER.get(node.target)
        if isinstance(value, Tensor) and not value.numel():
            return
        if not (lower is not None and lower(self, node, value)) and not self._elementwise(node, value):
            self._call(node, value)

    def _pattern(self, node: fx.Node, found: Found) -> bool:
        """One row for several operations."""
        x = self.values[found.operands[0]]
        if found.kind == "norm":
            return self._norm(node, x, found.operands[1])
        return self._rotation(node, x, *found.operands[1:])

    def _rotation(self, node: fx.Node, x: Tensor, cosine: fx.Node, sine: fx.Node, dim: int, half: int) -> bool:
        if x.dtype not in KINDS or x.dim() != 4 or dim not in {-1, 3}:
            return False
        given = [x, *(self.values[n].expand(x.shape) for n in (cosine, sine))]
        if x.shape[-1] != 2 * half or 2 * half > elementwise.TILE or any(t.dtype != x.dtype for t in given):
            return False
        if any(t.stride(-1) != 1 for t in (*given, self.values[node])):
            return False
        tensors = [*given, self._placed(node)]
        steps = [size for t in tensors for size in t.stride()[1:3]]
        sizes = [*x.shape[1:3], half, elementwise.DTYPES.index(x.dtype)]
        for sequence in range(len(x)):
            self._row(norms.rotation, [*sizes, *steps, *(t[sequence].data_ptr() for t in tensors)])
        return True

    def _norm(self, node: fx.Node, x: Tensor, eps: float) -> bool:
        if x.dtype != torch.float32 or not x.is_contiguous():
            return False
        value = self._placed(node)
        self._row(norms.rms_norm, [x.numel() // x.shape[-1], x.shape[-1], bits_of(eps), x.data_ptr(), value.data_ptr()])
        return True

    def _call(self, node: fx.Node, value: Any) -> None:
        """Leave `node` to torch, its result to be copied to `value`."""
        self._end_program()
        target: Any = node.target
        nodes = [n for n in node.all_input_nodes if n in self.cache_nodes]
        values = {n: self.values[n] for n in node.all_input_nodes}
        places = [value] if isinstance(value, Tensor) else list(value or [])

        def call() -> None:
            values.update({n: self.buffers[self.cache_nodes[n]] for n in nodes})
            args, kwargs = fx.map_arg((node.args, node.kwargs), values.__getitem__)
            found = target(*args, **kwargs)
            for place, result in zip(places, [found] if isinstance(found, Tensor) else found, strict=False):
                place.copy_(result)

        self.programs.append(call)

    def _product(self, node: fx.Node, value: Tensor, x: Any, W: Tensor, bias: Any) -> bool:
        """Value = x W + bias; W (n × m) with contiguous rows or columns."""
        n, m = W.shape
        tensors = [value, *(self.values[t] for t in (x, bias) if t is not None)]
        if W.dtype not in KINDS or 1 not in W.stride() or value.dtype not in KINDS:
            return False
        if not value.is_contiguous() or len({t.dtype for t in tensors}) > 1:
            return False
        across = W.stride(1) == 1 and m > 1
        share = team.chunk_rows(m, n * W.element_size(), dense.COLUMNS if across else dense.ROWS)
        stride = W.element_size() * W.stride(0 if across else 1)
        given = [0 if t is None else self._contiguous(t).data_ptr() for t in (x, bias)]
        words = [KINDS[W.dtype], m, n, stride, share, W.data_ptr(), *given, value.data_ptr(), KINDS[value.dtype]]
        words.append(tensors[1].numel() // n)
        chunks = -(-m // share)
        if across:
            self._row(dense.transposed, words, chunks)
        else:
            self._row(dense.linear, words, chunks, W.data_ptr(), share * stride)
        return True

    def _linear(self, node: fx.Node, value: Tensor) -> bool:
        x, W, bias = (*_args(node), None)[:3]
        return self._product(node, value, x, self.values[W].t(), bias)

    def _addmm(self, node: fx.Node, value: Tensor) -> bool:
        bias, x, W = _args(node)
        return not node.kwargs and self.values[bias].dim() == 1 and self._product(node, value, x, self.values[W], bias)

    def _matmul(self, node: fx.Node, value: Tensor) -> bool:
        x, W = _args(node)
        return self.values[W].dim() == 2 and self._product(node, value, x, self.values[W], None)

    def _quantized(self, node: fx.Node, value: Tensor) -> bool:
        x, table, _ = _args(node)
        if self.values[x].dtype not in KINDS:
            return False
        wide, found = self._wide(x), self._accumulator(node, value)
        tokens = wide.numel() // wide.shape[-1]
        if tokens == 1:
            product: Any = quantized.Product(table, memory=lambda size: self._scratch(size, node))
        else:
            product = many.Products(table, tokens)
        product.arguments[[quantized.X, quantized.Y]] = wide.data_ptr(), found.data_ptr()
        for row in product.rows:
            self._add_rows(row, product)
        self._rounded(node, value, found)
        return True

    def _chosen(self, node: fx.Node, value: Tensor) -> bool:
        """A product for each row of x, by a table that another row of the program puts into its arguments."""
        x, tables, chosen, _ = _args(node)
        addresses, numbers = self.values[tables], self.values[chosen]
        if self.values[x].dtype not in KINDS or not numbers.is_contiguous():
            return False
        wide, found, every = self._wide(x), self._accumulator(node, value), addresses.tolist()
        for row in range(len(wide)):
            product = quantized.Product(*every, memory=lambda size: self._scratch(size, node))
            product.arguments[[quantized.X, quantized.Y]] = wide[row].data_ptr(), found[row].data_ptr()
            place = product.arguments[quantized.TABLE :].ctypes.data
            self._row(quantized.choose, [addresses.data_ptr(), numbers[row:].data_ptr(), place])
            for each in product.rows:
                self._add_rows(each, product)
        self._rounded(node, value, found)
        return True

    def _attend(self, node: fx.Node, value: Tensor) -> bool:
        q, k, v, *rest = _args(node)
        count = 4 if node.target is HELD else 2
        cache, (position, *rule) = rest[:count], rest[count:]
        scale, window, cap, sinks = (*rule, 0, 0.0, None)[:4]
        buffers = [self.values[n] for n in cache]
        dtype = buffers[0].dtype
        if dtype not in KINDS or self.values[q].shape[2] > 1 or self.values[position] is not self.position:
            return False
        if any(self.values[n].dtype != dtype for n in (k, v)) or value.dtype not in KINDS:
            return False
        query, found = self._wide(q), self._accumulator(node, value)
        new_key, new_value = (self._contiguous(n) for n in (k, v))
        attend = attention.Attention(
            *(query, new_key, new_value, buffers, self.position),
            scale=scale,
            window=window,
            cap=cap,
            sinks=None if sinks is None else self._contiguous(sinks),
            out=found,
            memory=lambda size: self._scratch(size, node),
        )
        self.attentions.append((attend, [self.cache_nodes[n] for n in cache]))
        for row in attend.rows:
            self._add_rows(row)
        self._rounded(node, value, found)
        return True

    def _embedding(self, node: fx.Node, value: Tensor) -> bool:
        table, indices = (self.values[n] for n in _args(node)[:2])
        if indices.dtype != torch.int64 or not (indices.is_contiguous() and table.is_contiguous()):
            return False
        width = table.shape[1] * table.element_size()
        self._row(
            norms.embedding,
            [indices.numel(), table.shape[0], width, indices.data_ptr(), table.data_ptr(), value.data_ptr()],
        )
        return True

    def _layer_norm(self, node: fx.Node, value: Tensor) -> bool:
        x, shape, weight, bias, eps = (*_args(node), *(None, None, 1e-5)[len(_args(node)) - 2 :])[:5]
        tensors = [self.values[n] for n in (x, weight, bias) if n is not None]
        if (
            len(shape) != 1
            or not value.is_contiguous()
            or any(t.dtype != value.dtype or t.dtype not in KINDS for t in tensors)
        ):
            return False
        addresses = [0 if n is None else self._contiguous(n).data_ptr() for n in (x, weight, bias)]
        sizes = [value.numel() // shape[0], shape[0], elementwise.DTYPES.index(value.dtype), bits_of(eps)]
        self._row(norms.layer_norm, [*sizes, *addresses, value.data_ptr()])
        return True

    def _mean(self, node: fx.Node, value: Tensor) -> bool:
        x, dims = self.values[_args(node)[0]], _args(node)[1]
        if [d % x.dim() for d in dims] != [x.dim() - 1] or node.kwargs or not {x.dtype, value.dtype} <= FLOATS:
            return False
        source, width = self._contiguous(_args(node)[0]), x.shape[-1]
        kinds = [elementwise.DTYPES.index(t.dtype) for t in (source, value)]
        words = [x.numel() // width, width, kinds[0], source.data_ptr(), kinds[1], value.data_ptr()]
        self._row(norms.mean, words)
        return True

    def _repeat(self, node: fx.Node, value: Tensor) -> bool:
        """Each element several times, or the whole of it: a copy of a view in which it stands so often."""
        x, times, *rest = _args(node)
        source = self.values[x]
        if not source.is_contiguous():
            return False
        if node.target is aten.repeat.default:
            whole = source.view([1] * (len(times) - source.dim()) + list(source.shape))
            shape = [size for pair in zip(times, whole.shape, strict=True) for size in pair]
            repeated = whole.view([size for n in whole.shape for size in (1, n)]).expand(shape)
        elif rest and rest[0] is not None:
            dim = rest[0] % source.dim()
            repeated = source.unsqueeze(dim + 1).expand(*source.shape[: dim + 1], times, *source.shape[dim + 1 :])
        else:
            return False
        if dimensions(repeated.shape) > 4 or source.dtype not in elementwise.DTYPES or not value.is_contiguous():
            return False
        self._end_chain()
        self._copy(repeated, value.view(repeated.shape))
        self._end_chain()
        return True

    def _cat(self, node: fx.Node, value: Tensor) -> bool:
        parts, dim = _args(node)[0], _args(node)[1] if len(_args(node)) > 1 else 0
        if any(self.values[p].dtype != value.dtype for p in parts) or value.dtype not in elementwise.DTYPES:
            return False
        if node.target is aten.stack.default:
            targets = value.unbind(dim)
        else:
            targets = value.split([self.values[p].shape[dim] for p in parts], dim)
        if dimensions(value.shape) > 4:
            return False
        for part, target in zip(parts, targets, strict=True):
            if target.numel():
                self._copy(part, target)
                self._end_chain()
        return True


class _Running:
    """A step that has been begun; its logits are to be left in `out`."""

    def __init__(self, programs: list[Any], threads: int, out: Tensor) -> None:
        self.threads, self.out = threads, out
        self.rest = programs[1:] if isinstance(programs[0], np.ndarray) else programs
        self.runs = self.rest is not programs and team.start(programs[0], threads)

    def finish(self) -> None:
        if self.runs:
            team.finish()
        for program in self.rest:
            if isinstance(program, np.ndarray):
                team.run(program, self.threads)
            else:
                program()

    def cancel(self) -> None:
        if self.runs:
            team.finish(early=True)


def _args(node: fx.Node) -> tuple[Any, ...]:
    return node.args


def _is_view(value: Any, args: Any) -> bool:
    """Whether every tensor of a result lies in memory of the arguments."""
    results = [value] if isinstance(value, Tensor) else list(value) if isinstance(value, (tuple, list)) else []
    given: list[Tensor] = []
    torch.utils._pytree.tree_map(lambda a: given.append(a) if isinstance(a, Tensor) else None, args)
    owned = {t.untyped_storage().data_ptr() for t in given}
    return all(isinstance(t, Tensor) and t.untyped_storage().data_ptr() in owned for t in results)


LOWER: dict[Any, Callable[[Native, fx.Node, Any], bool]] = {
    QUANTIZED: Native._quantized,
    CHOSEN: Native._chosen,
    ATTEND: Native._attend,
    HELD: Native._attend,
    aten.linear.default: Native._linear,
    aten.addmm.default: Native._addmm,
    aten.mm.default: Native._matmul,
    aten.matmul.default: Native._matmul,
    aten.embedding.default: Native._embedding,
    aten.layer_norm.default: Native._layer_norm,
    aten.mean.dim: Native._mean,
    aten.cat.default: Native._cat,
    aten.stack.default: Native._cat,
    aten.repeat_interleave.self_int: Native._repeat,
    aten.repeat.default: Native._repeat,
}
