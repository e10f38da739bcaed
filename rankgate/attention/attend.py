"""Attention to fewer keys: to representatives (see `select`), and exactly to what is recent.

    paper      Queries, keys and values of representatives only; a represented token takes the output of the one that
               stands for it. (Activation Decorrelation Attention)
    windowed   Every query, on the last tokens (`window` of them before its own step, see `strands`), the first
               `sinks`, and the representatives before them. The logit of a representative gets + log(1 + c), where c
               tokens that the query does not see are its own.

`select_tokens_` switches a model to one of them through transformers' attention registry. Representatives are those of
the states at a layer's input, for all its heads, or with `heads` those of each head's own keys, with a window and a
tolerance for each head (see `heads`).

What is held of the past is in `strands`; `cache` makes a transformers `Cache` of it.

With τ = 0, or a window that is never left, this is dense attention.

Not covered: models that do not attend through the registry (GPT-J), or whose attention is more than plainly causal
(soft caps, sinks, windows, chunks: see `registry`), both refused; and a cache that is
cut back (`crop`): what was dropped cannot come again.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from rankgate.attention.cache import SelectiveCache
from rankgate.attention.registry import plain_mask, refuse_beyond_plain
from rankgate.attention.select import Rule, Selection, by_kernels, cascade, inherit, select, unit
from rankgate.attention.strands import Heads, PaperStrand, Strand, strands_of
from rankgate.errors import RankgateError

NAME = "rankgate_tokens"  # in transformers' registry
# by module of a layer, and by the model
_active: weakref.WeakKeyDictionary[nn.Module, TokenSelection] = weakref.WeakKeyDictionary()


@dataclass(frozen=True)
class AttentionConfig:
    """Settings of `select_tokens_`.

    rule: see above. tau: tolerance τ in [0, 1]. window, sinks: tokens that `windowed` reads exactly, at either end.
    select: the rule of `select`. centred: correlations instead of cosines. cascade: representatives are inherited from
    layer to layer, and repaired every `stride` layers. heads: by layer and key head, instead of tau and window.
    """

    rule: Literal["paper", "windowed"] = "windowed"
    tau: float = 0.3
    window: int = 128
    sinks: int = 4
    select: Rule = "greedy"
    centred: bool = False
    cascade: bool = False
    stride: int = 1
    heads: tuple[tuple[Heads, ...], ...] | None = None

    def __post_init__(self) -> None:
        if self.rule not in ("paper", "windowed"):
            raise RankgateError(f"{self.rule!r} is no attention rule; use paper or windowed")
        if not 0 <= self.tau <= 1:
            raise RankgateError(f"tau {self.tau} is out of range; give a tolerance in [0, 1]")
        if self.window < 1 or self.sinks < 0 or self.stride < 1:
            raise RankgateError("window and stride must be at least 1, sinks at least 0")
        if self.heads is not None and (self.rule == "paper" or self.cascade):
            raise RankgateError("heads have representatives of their own: use rule windowed, without the cascade")


def select_tokens_(model: PreTrainedModel, config: AttentionConfig) -> TokenSelection:
    """Make `model`, dense or converted, attend by `config` until the result is removed.

    Raises RankgateError if the model has no attention that can be replaced, or does so already.
    """
    return TokenSelection(model, config)


class TokenSelection:
    """What `select_tokens_` did to a model, and what came of it; a context manager that undoes it.

    selections: of the last call without a past, by layer and sequence; empty with `heads`. read, pairs: keys read, and
    what dense attention would have read, since the beginning.
    """

    def __init__(self, model: PreTrainedModel, config: AttentionConfig) -> None:
        self.model, self.config = model, config
        caller, self.layers = decoder(model)
        if config.heads is not None and len(config.heads) != len(self.layers):
            raise RankgateError(f"heads are given for {len(config.heads)} layers, the model has {len(self.layers)}")
        if any(module in _active for module in model.modules()):
            raise RankgateError("the model attends to selected tokens already; remove that first")
        self.selections: list[list[Selection]] = []
        self.read, self.pairs = 0, 0
        self._strands: list[list[list[Strand]]] = []  # by layer and sequence
        self._before = model.config._attn_implementation
        model.set_attn_implementation(NAME)
        self._handles = [caller.register_forward_pre_hook(self._begin, with_kwargs=True)]
        _active[model] = self
        for i, layer in enumerate(self.layers):
            _active.update(dict.fromkeys(layer.modules(), self))
            self._handles.append(layer.register_forward_pre_hook(self._states_of(i), with_kwargs=True))

    def remove(self) -> None:
        """Give the model its own attention back."""
        for handle in self._handles:
            handle.remove()
        for module in (self.model, *self.layers.modules()):
            _active.pop(module, None)
        self.model.set_attn_implementation(self._before)

    def __enter__(self) -> TokenSelection:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    @property
    def share(self) -> float:
        """Keys read over those of dense attention."""
        return self.read / max(1, self.pairs)

    @property
    def hooks(self) -> set[int]:
        """Numbers of its own hooks on the model's modules."""
        return {handle.id for handle in self._handles}

    def count(self, read: int, pairs: int) -> None:
        """Add keys read, and what dense attention would have read."""
        self.read += read
        self.pairs += pairs

    def _begin(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
        """Before the first layer: which tokens are there, and what is the past."""
        if self.model.config._attn_implementation != NAME:  # while a step is traced
            return None
        given = next((kwargs[k] for k in ("input_ids", "inputs_embeds") if kwargs.get(k) is not None), None)
        tokens: Tensor = args[0] if given is None else given
        mask, cache = kwargs.get("attention_mask"), kwargs.get("past_key_values")
        if mask is not None and mask.ndim != 2:
            raise RankgateError("attention to selected tokens takes a mask of tokens (batch × length), no other")
        rows, count = tokens.shape[:2]
        if cache is not None and not isinstance(cache, SelectiveCache):
            if cache.get_seq_length():
                raise RankgateError("the past was read with another attention; begin the sequence anew")
            cache = None
        if cache is None and kwargs.get("use_cache", self.model.config.use_cache):
            cache = SelectiveCache(len(self.layers))
        held = SelectiveCache(len(self.layers)) if cache is None else cache  # without a cache: of this call only
        self._strands = held.strands(rows)
        self._present = torch.ones(rows, count, dtype=torch.bool) if mask is None else mask[:, -count:].bool()
        self.selections = []
        return args, {**kwargs, "past_key_values": cache}

    def _states_of(self, layer: int) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if self.config.heads is None:
                self._states = unit(layer_input(args, kwargs).detach(), self.config.centred)
                if not self._strands[layer][0]:
                    self.selections.append([self._select(layer, b, x) for b, x in enumerate(self._states)])

        return hook

    def _select(self, layer: int, row: int, states: Tensor) -> Selection:
        config, x = self.config, states[self._present[row].to(states.device)]
        if layer == 0 or not config.cascade:
            return select(x, config.tau, config.select)
        before = self.selections[-1][row]
        return cascade(x, config.tau, before, config.select) if layer % config.stride == 0 else inherit(before)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        """(batch, tokens, heads, width of v) from q (batch, heads, tokens, width), and k, v of perhaps fewer heads."""
        out = q.new_zeros(len(q), q.shape[2], q.shape[1], v.shape[-1])
        for b in range(len(q)):
            mask = self._present[b].to(q.device)
            whole = bool(mask.all())
            row = [x[b] if whole else x[b][:, mask] for x in (q, k, v)]
            y = self._attend_row(layer, b, row, None if self.config.heads else self._states[b, mask], scale)
            out[b] = y if whole else out[b].index_put((mask,), y)
        return out

    def _attend_row(self, layer: int, b: int, row: list[Tensor], states: Tensor | None, scale: float) -> Tensor:
        """(tokens, heads, width of v) of one sequence, without what fills it up."""
        q, k, v = row
        strands, selection = self._strands[layer][b], None
        begins = not strands
        if begins:
            strands.extend(self._new_strands(layer, len(k)))
            selection = self.selections[layer][b] if self.selections else None
        if begins and by_kernels(q) and not torch.is_grad_enabled() and q.shape[1] > 1 and _narrow(k, v):
            from rankgate.attention.prompt import attend_prompt

            out = attend_prompt(strands, q, k, v, states, selection, scale)
        else:
            out = q.new_empty(q.shape[1], len(q), v.shape[-1])
            for strand in strands:
                queries = strand.queries(len(q) // len(k))
                parts = q[queries], k[strand.heads], v[strand.heads]
                out[:, queries] = strand.attend(*parts, states, selection, scale).transpose(0, 1)
        self.count(sum(strand.read for strand in strands), sum(strand.pairs for strand in strands))
        return out

    def _new_strands(self, layer: int, heads: int) -> Iterator[Strand]:
        config = self.config
        if config.heads is None:
            every = list(range(heads))
            exact = Heads(config.window, config.tau)
            yield PaperStrand(every, exact, 0) if config.rule == "paper" else Strand(every, exact, config.sinks)
            return
        if len(config.heads[layer]) != heads:
            raise RankgateError(f"heads are given for {len(config.heads[layer])} key heads, layer {layer} has {heads}")
        yield from strands_of(config.heads[layer], config.sinks)


def _narrow(k: Tensor, v: Tensor) -> bool:
    """Whether kernels for prompts take such rows."""
    from rankgate.ops.gpu.windows import WIDEST

    return max(k.shape[2], v.shape[2]) * k.element_size() <= WIDEST


def selection_of(model: nn.Module) -> TokenSelection | None:
    """What `select_tokens_` did to `model`, if it did."""
    return _active.get(model)


def decoder(model: PreTrainedModel) -> tuple[nn.Module, nn.ModuleList]:
    """The module that calls the layers of `model`, and these. Raises RankgateError if attention cannot be replaced."""
    if getattr(model, "_supports_attention_backend", False):
        for module in model.modules():
            for child in module.children():
                if isinstance(child, nn.ModuleList) and len(child) == model.config.num_hidden_layers:
                    return module, child
    raise RankgateError(f"{type(model).__name__} does not attend through transformers' registry; its keys are fixed")


def layer_input(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """The states (batch × tokens × width) that a decoder layer is called with."""
    states: Tensor = args[0] if args else kwargs["hidden_states"]
    return states


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    refuse_beyond_plain(options)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return _active[module].attend(int(cast(Any, module).layer_idx), query, key, value, scale), None


AttentionInterface.register(NAME, _attend)
AttentionMaskInterface.register(NAME, plain_mask)
