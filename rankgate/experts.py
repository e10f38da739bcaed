"""A mixture's experts as linears of their own, which are converted like any other.

transformers holds the E experts of a layer as stacks: `gate_up_proj` (E × m × n), `down_proj`. `unstack_` puts
`Experts` in their place, one pair of `nn.Linear` each, on the same memory; names are those of the stack with a number
in between (`mlp.experts.3.down_proj`). What lies between the two products stays the model's own (`_apply_gate`).

    y_t = Σ_{e chosen for t} w_te down_e(gate(gate_up_e(x_t)))

Tokens are sorted by expert, and each linear of one that was chosen is called once. A captured step cannot branch: there
an operator finds the weights for each pair of token and expert, `torch.ops.rankgate.chosen_linear` through a table, so
it reads no more than the experts of its tokens. That takes experts that are quantised, on a GPU all of a layer in the
same way; on a CPU also those of `gsi` and `svd` (`chosen_gated`).

Not covered: experts whose module is not made by transformers' `use_experts_implementation`, or with norms of their own.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import disable_proxy_modes_tracing
from transformers import PreTrainedModel

from rankgate.common.copies import twin
from rankgate.core import GatedGroup, GroupedLinear, LinearGroup, frozen, operators
from rankgate.errors import RankgateError
from rankgate.quantized import QuantizedGroup, table_of

UP, DOWN = ("gate_up_proj", "up_proj"), "down_proj"
ALIGNED = 16  # bytes that a GPU loads at once
_trace = threading.local()


class Experts(nn.ModuleList):
    """The experts of one layer: each a `ModuleDict` of two linears.

    per_token: how many of them a token has; known after the first call.
    """

    def __init__(self, stack: nn.Module) -> None:
        """Take the place of `stack`, which keeps its settings and loses its weights."""
        up = next(name for name in UP if hasattr(stack, name))
        experts = [
            nn.ModuleDict({name: _linear(stack, name, e) for name in (up, DOWN)})
            for e in range(len(stack.get_parameter(DOWN)))
        ]
        super().__init__(experts)
        self.up, self.per_token = up, 0
        for name in [name for name, _ in stack.named_parameters(recurse=False)]:
            delattr(stack, name)
        vars(self)["rule"] = stack  # no child: it has nothing that is stored, moved or initialised

    def forward(self, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        """y (tokens, n) of x (tokens, n), by the experts `chosen` (tokens, k) for each and their `weights`."""
        self.per_token = chosen.shape[1]
        each = chosen.flatten()
        if getattr(_trace, "active", False):
            y = self._both(x.repeat_interleave(self.per_token, 0), functools.partial(self._by_tables, each))
        else:
            order, counts = each.argsort(stable=True), each.bincount(minlength=len(self)).tolist()
            y = self._both(x[order // self.per_token], functools.partial(self._in_parts, counts))[order.argsort()]
        summed: Tensor = (y * weights.flatten()[:, None]).unflatten(0, chosen.shape).sum(1).to(x.dtype)
        return summed

    def _both(self, x: Tensor, linear: Callable[[str, Tensor], Tensor]) -> Tensor:
        """Rows x by both linears of their experts, of which `linear` multiplies with the one of this name."""
        rule: Any = vars(self)["rule"]
        hidden = linear(self.up, x)
        return linear(DOWN, rule._apply_gate(hidden) if rule.has_gate else rule.act_fn(hidden))

    def _in_parts(self, counts: list[int], name: str, x: Tensor) -> Tensor:
        """Rows sorted by expert, of which so many are for each."""
        parts = zip(self, x.split(counts), strict=True)
        return torch.cat([expert[name](part) for expert, part in parts if len(part)])  # type: ignore[index]

    def _by_tables(self, chosen: Tensor, name: str, x: Tensor) -> Tensor:
        """Row s by expert chosen_s (rows,), without a branch.

        Raises RankgateError if a step cannot find its experts so.
        """
        linears = [expert[name] for expert in self]  # type: ignore[index]
        groups = [layer.group for layer in linears if isinstance(layer, GroupedLinear)]
        if len(groups) < len(self):
            raise RankgateError("experts that stay dense in a converted model are not captured; convert them, too")
        y = _multiply(groups, x, chosen)
        if linears[0].bias is None:
            return y
        with disable_proxy_modes_tracing():
            biases = torch.stack([layer.bias for layer in linears])
        return y + biases[chosen]


@contextlib.contextmanager
def found_by_tables() -> Iterator[None]:
    """For as long as this lasts, experts that this thread calls are found without a branch."""
    _trace.active = True
    try:
        yield
    finally:
        _trace.active = False


def unstack_(model: nn.Module, names: Collection[str] | None = None) -> None:
    """Put `Experts` in place of stacks of experts: of all that are known, or of those with these names."""
    for name, module in list(model.named_modules()):
        if is_stack(module) and (names is None or name in names):
            model.set_submodule(name, Experts(module))


def unstacked(model: PreTrainedModel) -> PreTrainedModel:
    """`model`, or a twin with `Experts` in place of stacks if it has such."""
    if not any(map(is_stack, model.modules())):
        return model
    found = twin(model)
    unstack_(found)
    return found


def is_stack(module: nn.Module) -> bool:
    """Whether transformers knows how to compute `module` from stacks of weights, and so do we."""
    settings = all(hasattr(module, name) for name in ("has_gate", "has_bias", "is_transposed", "_apply_gate"))
    held = {name for name, _ in module.named_parameters(recurse=False)}
    return settings and DOWN in held and bool({*UP} & held) and held == {*dict(module.named_parameters())}


def experts_of(model: nn.Module) -> dict[str, Experts]:
    """Those of every layer, by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, Experts)}


def shares(model: nn.Module) -> dict[nn.Module, float]:
    """By every module of experts, what share of them a token has, as the last call had it."""
    found = experts_of(model).values()
    return {module: e.per_token / len(e) if e.per_token else 1.0 for e in found for module in e.modules()}


def _linear(stack: nn.Module, name: str, expert: int) -> nn.Linear:
    """One matrix of a stack, on its memory where it is stored as a linear layer is."""
    W = stack.get_parameter(name).detach()[expert]
    W = W.T.contiguous() if stack.is_transposed else W
    with torch.device("meta"):
        linear = nn.Linear(W.shape[1], W.shape[0], bias=bool(stack.has_bias))
    linear.weight = frozen(W)
    if stack.has_bias:
        linear.bias = frozen(stack.get_parameter(f"{name}_bias").detach()[expert])
    return linear


def _multiply(groups: list[LinearGroup], x: Tensor, chosen: Tensor) -> Tensor:
    """Row s of x (rows, n) by group chosen_s, as one operation. Raises RankgateError if there is none for them."""
    operators: Any = torch.ops.rankgate
    quantised = [group for group in groups if isinstance(group, QuantizedGroup)]
    gated = [group for group in groups if isinstance(group, GatedGroup)]
    y: Tensor
    if len(quantised) == len(groups) and x.is_cuda:
        with disable_proxy_modes_tracing():
            tables, parts = tables_of(quantised)
        y = operators.chosen_linear.parts(x, tables, chosen, parts)
    elif len(quantised) == len(groups):
        with disable_proxy_modes_tracing():
            tables = torch.tensor([group.table() for group in quantised])
        y = operators.chosen_linear(x, tables, chosen, quantised[0].m)
    elif len(gated) == len(groups) and len({group.subspace.eps for group in gated}) == 1 and not x.is_cuda:
        W = [group.W for group in gated if group.W is not None]
        y = operators.chosen_gated(
            *(x, chosen, [group.subspace.B for group in gated], [group.A for group in gated], W),
            gated[0].subspace.eps,
        )
    else:
        raise RankgateError("experts converted in these ways are not captured on this device; quantise them all")
    return y


def tables_of(groups: Sequence[QuantizedGroup]) -> tuple[Tensor, list[Tensor | None]]:
    """`table_of` each of several groups (groups, words), on their device, and the parts of the one of highest rank.

    Raises RankgateError if they differ in more than their rank: a kernel reads all of them in the same way.
    """
    kinds = {(g.base.bits, g.base.group_size, g.base.zero is None, g.refinement is None) for g in groups}
    every = [group.parts for group in groups]
    if len(kinds) > 1 or any(part is not None and part.data_ptr() % ALIGNED for parts in every for part in parts):
        raise RankgateError("experts of a layer are stored in unlike ways, which no kernel reads; use one for all")
    tables = torch.from_numpy(np.stack([table_of(groups[0].n, parts) for parts in every]))
    highest = max(groups, key=lambda group: 0 if group.low_rank is None else group.low_rank.rank)
    return tables.to(highest.base.codes.device), highest.parts


operators.define("chosen_linear(Tensor x, Tensor tables, Tensor chosen, int m) -> Tensor")
operators.impl("chosen_linear", lambda x, tables, chosen, m: x.new_empty((len(x), m)), "Meta")
operators.define("chosen_linear.parts(Tensor x, Tensor tables, Tensor chosen, Tensor?[] parts) -> Tensor")
operators.impl("chosen_linear.parts", lambda x, tables, chosen, parts: x.new_empty((len(x), len(parts[0]))), "Meta")
