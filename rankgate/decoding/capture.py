"""One decode step of a model, over one token or several, as a flat list of tensor operations.

At batch 1 a small model spends more time in the Python of its modules than in its weights. But every token after the
prompt does the same: the same operations, in the same order, on tensors of the same shapes. So the model's own
`forward` is traced for one token, and what remains of it is a straight-line function

    logits = step(token, position, *keys and values, *constants)

of the parameters (by reference: changes in place are seen), of a preallocated cache, and of nothing else. Attention and
the cache write become one operation per layer (`ops.attention`), reached through transformers' attention registry: of
all keys and values, or where heads read fewer, of what they hold (`attention.held`). On
the CPU the list becomes programs for a team of threads (`native`); on a GPU it becomes a CUDA graph (`recorded`).

What Python decided during the trace is frozen. So the trace is refused (`Uncapturable`) where a decision could differ
for another token: a branch on a tensor's value; a result whose shape depends on values; a mask, window or argument of
attention that the kernel does not know; two traces at different positions that differ.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, fx, nn
from torch.fx.experimental.proxy_tensor import disable_proxy_modes_tracing, make_fx
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.cache_utils import Cache

from rankgate.attention.cache import CountedLayer
from rankgate.attention.held import as_rows
from rankgate.attention.registry import beyond_plain, is_plainly_causal, is_window
from rankgate.decoding.begun import Step
from rankgate.decoding.positions import unscaled
from rankgate.experts import found_by_tables

NAME = "rankgate_decode"  # of the attention implementation that is active during a trace
POSITIONS = 2, 5  # where the two traces begin


OWN_ATTENTION = "a layer's attention does not use transformers' attention interface"


class Uncapturable(Exception):
    """Why a model's step cannot be traced."""


class Rule(NamedTuple):
    """How a layer attends: see `ops.attention`."""

    scale: float
    window: int = 0
    cap: float = 0.0
    sinks: Tensor | None = None


class _TracedLayer(CountedLayer):
    """Stands for one layer of the cache during a trace: hands out the whole buffers and remembers the new entry.

    attention: takes the query, the new entry's key and value, and the rule; see `ops.attention`.
    """

    def __init__(self, keys: Tensor, values: Tensor, length: int, attention: Callable[..., Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.keys: Tensor = keys
        self.values: Tensor = values
        self.length, self.attention = length, attention
        self.is_initialized = True
        self.entry: tuple[Tensor, Tensor] | None = None
        self.attended = False
        keys._rankgate_layer = self  # type: ignore[attr-defined]

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing: the buffers exist."""

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        if self.entry is not None:
            raise Uncapturable("a layer of the cache is written twice in one step")
        self.entry = key_states, value_states
        return self.keys, self.values

    def attend(self, query: Tensor, rule: Rule) -> Tensor:
        """Store the new entries, attend to what each sees before it (sequences, tokens, heads, width); one node."""
        if self.entry is None or self.attended:
            raise Uncapturable("a layer's attention does not follow its cache update")
        self.attended = True
        return self.attention(query, *self.entry, rule)


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface, for what is traced."""
    window = 0 if attention_mask is None else getattr(attention_mask, "_rankgate_window", -1)
    named, cap, sinks = (kwargs.pop(name, None) for name in ("sliding_window", "softcap", "s_aux"))
    beyond = beyond_plain(kwargs)
    if window < 0 or beyond or (named or 0) != window:
        raise Uncapturable(f"its attention takes {beyond or 'a mask'}")
    scale = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
    rule = Rule(scale, window, float(cap or 0), None if sinks is None else sinks.float())
    return _attend(query, key, value, rule), None


def _attend(query: Tensor, key: Tensor, value: Tensor, rule: Rule) -> Tensor:
    layer: _TracedLayer | None = getattr(key, "_rankgate_layer", None)
    if layer is None or value is not layer.values:
        raise Uncapturable("its attention does not read the cache as it was written")
    return layer.attend(query, rule)


def _older_attention(
    self: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None = None
) -> tuple[Tensor, None]:
    """The method `_attn` of models older than that interface (GPT-J, CodeGen); `scale_attn` is 1 / scale."""
    if attention_mask is not None:
        raise Uncapturable("its attention takes a mask")
    return _attend(query, key, value, Rule(1 / float(cast(Any, self).scale_attn))).transpose(1, 2), None


def _mask(*_: Any, mask_function: Callable[..., Any], local_size: int | None = None, **__: Any) -> Tensor | None:
    """transformers' mask interface: a query token sees itself and everything before, or that within a window.

    A padding mask can only be one that the model made for itself, all ones: the decode loop gives none.
    """
    if is_plainly_causal(mask_function):
        return None
    with disable_proxy_modes_tracing():  # what is asked here is no part of a step
        if local_size is None or not is_window(mask_function, local_size):
            raise Uncapturable("its attention mask is neither plainly causal nor a window")
        mask = torch.empty(0)
    mask._rankgate_window = local_size  # type: ignore[attr-defined]
    return mask


AttentionInterface.register(NAME, _attention)
AttentionMaskInterface.register(NAME, _mask)


@contextlib.contextmanager
def _own_attention(model: nn.Module) -> Iterator[None]:
    """For as long as this lasts, the model uses our attention, and does not look for padding among its input ids.

    Dense experts on a GPU are found by indexing, which a CUDA graph can hold.
    """
    models = [m for m in model.modules() if isinstance(m, PreTrainedModel)]
    names = "_attn_implementation_internal", "_experts_implementation_internal"
    configs = {id(m.config): (m.config, [getattr(m.config, name) for name in names]) for m in models}
    older = [m for m in model.modules() if hasattr(m, "_attn") and hasattr(m, "scale_attn")]
    try:
        for module in older:
            vars(module)["_attn"] = functools.partial(_older_attention, module)
        for config, _ in configs.values():
            config._attn_implementation_internal = NAME
            if any(m.device.type == "cuda" for m in models):
                config._experts_implementation_internal = "batched_mm"
        for m in models:
            vars(m)["warn_if_padding_and_no_attention_mask"] = lambda *_: None
        yield
    finally:
        for config, before in configs.values():
            for name, value in zip(names, before, strict=True):
                setattr(config, name, value)
        for m in models:
            del vars(m)["warn_if_padding_and_no_attention_mask"]
        for module in older:
            del vars(module)["_attn"]


def _trace(
    model: PreTrainedModel,
    options: dict[str, Any],
    inputs: list[Tensor],
    buffers: list[Tensor],
    memory: list[Tensor],
    at: int,
) -> Any:
    """The model's forward for tokens from position `at` on; for inputs, buffers and memory see `_example`."""

    def step(token: Tensor, position: Tensor, *cache: Tensor) -> Tensor:
        def attention(layer: int, q: Tensor, k: Tensor, v: Tensor, rule: Rule) -> Tensor:
            held, found = len(memory) > len(buffers), token.device.type == "cuda"
            if held and found:  # of layers that `select_tokens_` has found plain
                out: Tensor = torch.ops.rankgate.attend_held_at(q, k, v, cache[0], layer, position, rule.scale)
            elif held:
                own = cache[4 * layer : 4 * layer + 4]
                out = torch.ops.rankgate.attend_held(q, k, v, *own, position, rule.scale)
            elif found:
                out = torch.ops.rankgate.attend_at(q, k, v, cache[0], layer, position, *rule)
            else:
                out = torch.ops.rankgate.attend(q, k, v, *cache[2 * layer : 2 * layer + 2], position, *rule)
            return out

        pairs = zip(buffers[::2], buffers[1::2], strict=True)
        layers = [_TracedLayer(*pair, at, functools.partial(attention, layer)) for layer, pair in enumerate(pairs)]
        place = {"position_ids": position} if options.get("position_ids") is not None else {}
        try:
            out = model(**{**options, **place, "input_ids": token, "past_key_values": Cache(layers=list(layers))})
        except Uncapturable:
            raise
        except Exception as error:
            if any(layer.entry is not None and not layer.attended for layer in layers):
                raise Uncapturable(OWN_ATTENTION) from error
            raise
        if not all(layer.attended for layer in layers):
            raise Uncapturable(OWN_ATTENTION)
        logits: Tensor = out.logits.flatten(0, 1)
        return logits

    with _own_attention(model), found_by_tables(), unscaled(model):
        return make_fx(step, pre_dispatch=True)(*inputs)


def _example(
    model: PreTrainedModel, shapes: list[torch.Size], tokens: int, at: int
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Inputs of a step, and the buffers of its scratch cache.

    Inputs: tokens, their positions, and the cache: all its buffers, or on a GPU the one table that tells where they
    are. Where heads hold a part of the keys, the cache is what they hold, in the memory of the buffers, and returned
    as well.
    """
    device, room, held = model.device, max(POSITIONS) + tokens, len(shapes[0]) == 2
    if held:
        layers = zip(shapes[::4], shapes[1::4], shapes[3::4], strict=True)
        shapes = [torch.Size((1, rows[0], room, shape[1])) for *pair, rows in layers for shape in pair]
    sequences = shapes[0][0]
    buffers = [torch.zeros((b, g, room, width), dtype=model.dtype, device=device) for b, g, _, width in shapes]
    memory = cache = buffers
    if held:
        memory = cache = [t for pair in zip(buffers[::2], buffers[1::2], strict=True) for t in as_rows(*pair)]
    if device.type == "cuda":
        from rankgate.ops.gpu.attention import table

        cache = [table(memory)]
    positions = torch.arange(at, at + tokens, device=device).repeat(sequences, 1)
    return [torch.zeros_like(positions), positions, *cache], buffers, memory


class Capture:
    """The traced step of one model.

    Args:
        model: on one device, in evaluation mode.
        options: keyword arguments of `model.forward` for so many tokens, as generate() would pass them.
        shapes: of every layer's keys and values, alternating: (sequences, heads, any, width); or of what the heads of
            every layer hold, see `HeldRows.buffers`.
        tokens: that a step reads at once of each sequence.

    Raises `Uncapturable`, or whatever the trace raises.
    """

    def __init__(
        self, model: PreTrainedModel, options: dict[str, Any], shapes: list[torch.Size], tokens: int = 1
    ) -> None:
        examples = [_example(model, shapes, tokens, at) for at in POSITIONS]
        first, second = (_trace(model, options, *example, at) for example, at in zip(examples, POSITIONS, strict=True))
        if not _same(first, second):
            raise Uncapturable("what it computes in Python depends on the position")
        inputs = examples[0][0]
        _simplify(first, inputs)
        self.bind: Callable[[list[Tensor], int], Step]
        if model.device.type == "cuda":
            from rankgate.decoding.recorded import Recorded

            self.bind = Recorded(first, inputs).bind
        else:
            from rankgate.decoding.native import Native

            self.bind = Native(first, inputs).bind

    def __call__(self, token: Tensor, position: Tensor, buffers: list[Tensor], threads: int = 1) -> Tensor:
        """Logits (all tokens, vocabulary) of tokens at their positions (sequences, tokens); buffers as in `shapes`."""
        return self.bind(buffers, threads)(token, position).result()


def _same(a: fx.GraphModule, b: fx.GraphModule) -> bool:
    """Whether two traces are the same computation on the same constants."""
    for module in (a, b):
        module.graph.eliminate_dead_code()
    names: dict[fx.Node, fx.Node] = {}
    if len(a.graph.nodes) != len(b.graph.nodes):
        return False
    for x, y in zip(a.graph.nodes, b.graph.nodes, strict=True):
        names[y] = x
        if x.op == "get_attr" and y.op == "get_attr":
            left, right = getattr(a, x.target), getattr(b, y.target)
            if left is not right and not torch.equal(left, right):
                return False
        elif x.op != "placeholder" and (x.op, x.target) != (y.op, y.target):
            return False
        if (x.args, x.kwargs) != fx.map_arg((y.args, y.kwargs), lambda n: names[n]):
            return False
    return True


def _simplify(module: fx.GraphModule, inputs: list[Tensor]) -> None:
    """Drop what is computed twice or returns its input; refuse shapes that depend on values."""
    graph = module.graph
    values: dict[fx.Node, Any] = dict(zip(graph.find_nodes(op="placeholder"), inputs, strict=True))
    written = any(node.is_impure() and getattr(node.target, "namespace", "") == "aten" for node in graph.nodes)
    seen: dict[Any, fx.Node] = {}
    for node in list(graph.nodes):
        if node.target is torch._C._set_grad_enabled:
            graph.erase_node(node)
        elif node.op in {"placeholder", "output"}:
            continue
        elif node.op == "get_attr":
            values[node] = getattr(module, node.target)
            _replace(node, seen.setdefault(id(values[node]), node))
        else:
            args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: values[n])
            if _depends_on_values(node.target, args):
                raise Uncapturable(f"the shape of {node.target} depends on values")
            values[node] = node.target(*args, **kwargs)
            if node.is_impure():
                continue
            same = next((n for n in node.all_input_nodes if _identical(values[node], values[n])), None)
            if same is None and not written:
                same = seen.setdefault((node.target, repr((node.args, node.kwargs))), node)
            _replace(node, same or node)
    graph.eliminate_dead_code()
    module.recompile()


def _replace(node: fx.Node, other: fx.Node) -> None:
    if other is not node:
        node.replace_all_uses_with(other)
        node.graph.erase_node(node)


def _depends_on_values(target: Any, args: tuple[Any, ...]) -> bool:
    """Whether the shape of a result does: not that of indexing with integers."""
    if target is torch.ops.aten.index.Tensor:
        return any(i is not None and i.dtype == torch.bool for i in args[1])
    return torch.Tag.dynamic_output_shape in getattr(target, "tags", ())


def _identical(a: Any, b: Any) -> bool:
    """The same elements of the same memory."""
    return (
        isinstance(a, Tensor)
        and isinstance(b, Tensor)
        and (a.data_ptr(), a.dtype, a.shape, a.stride()) == (b.data_ptr(), b.dtype, b.shape, b.stride())
    )
