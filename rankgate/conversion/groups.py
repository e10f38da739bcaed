"""Which linears a model has, which of them read the same input, and which other weights are read for every token.

Nothing here knows a model by name. The linears are found by type, and the input groups by running the model once on
a few token ids and looking at which modules are handed the very same tensor.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from rankgate.errors import RankgateError
from rankgate.experts import DOWN, Experts, experts_of
from rankgate.methods.given import Linear

NOT_CALLED = "never called as a layer"
ROUTER = "chooses or weighs experts; stays dense"
HEAD = "the output embedding; lm_head rounds it"
STACK = "several matrices in one parameter, which the model multiplies by in a way of its own"
NOT_LINEAR = "not a linear layer"


def read_linear(name: str, module: nn.Module) -> Linear:
    """View an `nn.Linear`, or the transposed `Conv1D` of GPT-2, as a `Linear`. No copy for `nn.Linear`.

    Raises RankgateError if a weight is not finite.
    """
    weight, bias = module.weight, module.bias
    assert isinstance(weight, Tensor) and (bias is None or isinstance(bias, Tensor))
    W = weight.detach()
    if not torch.isfinite(W).all():
        raise RankgateError(f"{name} has weights that are not finite; the model is damaged")
    return Linear(name, W.T.contiguous() if isinstance(module, Conv1D) else W, bias)


def shape(module: nn.Module) -> tuple[int, int]:
    """(m, n) of an `nn.Linear` or `Conv1D`."""
    assert isinstance(module.weight, Tensor)
    rows, columns = module.weight.shape
    return (columns, rows) if isinstance(module, Conv1D) else (rows, columns)


def linears(model: PreTrainedModel) -> dict[str, nn.Module]:
    """Every `nn.Linear` and `Conv1D` by name that can be converted by a method: see `dense_weights` for what cannot.

    A subclass of `nn.Linear` counts where its own forward is the plain matrix product (Falcon's), and is left out where
    it is not.
    """
    left_out = {model.get_output_embeddings(), *_routers(model)}
    plain: dict[type[nn.Module], bool] = {nn.Linear: True}  # by class

    def is_linear(module: nn.Module) -> bool:
        if isinstance(module, nn.Linear) and type(module) not in plain:
            plain[type(module)] = _multiplies(module)
        return isinstance(module, Conv1D) or plain.get(type(module), False)

    return {name: module for name, module in model.named_modules() if module not in left_out and is_linear(module)}


def dense_weights(model: PreTrainedModel) -> dict[str, tuple[int, int, str]]:
    """What else is read for every token: m, n and why it stays dense, by name of the parameter or linear.

    That is the output embedding, what chooses experts, and every other parameter of two or more dimensions (m: all but
    the last). Embeddings, of which a token reads one row, and vectors are not among them.
    """
    head, routers = model.get_output_embeddings(), _routers(model)
    converted = {*linears(model).values()}
    found = {}
    for name, module in model.named_modules():
        if (module is head or module in routers) and isinstance(getattr(module, "weight", None), Tensor):
            found[name] = *shape(module), HEAD if module is head else ROUTER
        elif not isinstance(module, nn.Embedding) and module not in converted:
            for leaf, weight in module.named_parameters(name, recurse=False):
                if weight.dim() > 1:
                    n = weight.shape[-1]
                    found[leaf] = weight.numel() // n, n, STACK if _stack(module) else NOT_LINEAR
    return found


def _stack(module: nn.Module) -> int:
    """How many matrices a module holds in one parameter (experts); 0 if in none."""
    if isinstance(module, Experts):
        return len(module)
    if isinstance(module, nn.modules.conv._ConvNd):
        return 0
    return max((len(p) for p in module.parameters(recurse=False) if p.dim() == 3 and len(p) > 1), default=0)


def _routers(model: PreTrainedModel) -> set[nn.Module]:
    """Linears beside experts that have an output for each of them, or one for all: what decides on them.

    Those inside a module count where it has no others: a router of its own, not attention that lies beside experts.
    """
    found: set[nn.Module] = set()
    for block in model.modules():
        sizes = {1, *(_stack(child) for child in block.children())} - {0}
        for child in block.children() if len(sizes) > 1 and not isinstance(block, Experts) else ():
            if isinstance(child, Experts):
                continue
            inside = [module for module in child.modules() if isinstance(module, nn.Linear)]
            if all(module.out_features in sizes for module in inside):
                found.update(inside)
    return found


def _multiplies(module: nn.Linear) -> bool:
    """Whether calling `module` gives W x + bias."""
    x = torch.randn(3, module.in_features, generator=torch.Generator().manual_seed(0)).to(module.weight)
    try:
        with torch.no_grad():
            y = module(x)
            return isinstance(y, Tensor) and torch.allclose(y, F.linear(x, module.weight, module.bias), equal_nan=True)
    except Exception:  # whatever a forward of its own wants to be called with
        return False


def input_groups(model: PreTrainedModel) -> list[tuple[str, ...]]:
    """Names of the linears of `model`, grouped by the tensor they receive, in the order of execution.

    Runs the model once on a few token ids. A linear that is never called (its weight is used in another way) is in no
    group. Every linear of experts is a group by itself, whether a token reached it or not.
    """
    inputs: list[Tensor] = []  # kept alive, so that no two of them can share an id
    groups: dict[int, list[str]] = {}
    called: set[str] = set()

    def observe(name: str, x: Tensor) -> None:
        if name not in called:
            called.add(name)
            inputs.append(x)
            groups.setdefault(id(x), []).append(name)

    def observe_all(name: str, experts: Experts) -> None:
        for leaf in (experts.up, DOWN):
            for number in range(len(experts)):
                observe(f"{name}.{number}.{leaf}", torch.empty(0))

    mixtures, known = experts_of(model), linears(model)
    inside = {module for mixture in mixtures.values() for module in mixture.modules()}
    handles = [
        module.register_forward_pre_hook(lambda _, args, name=name: observe(name, args[0]))
        for name, module in known.items()
        if module not in inside
    ]
    handles += [
        module.register_forward_pre_hook(lambda module, _, name=name: observe_all(name, module))
        for name, module in mixtures.items()
    ]
    try:
        with torch.no_grad():
            model.base_model(input_ids=torch.arange(1, 5, device=model.device)[None])
    finally:
        for handle in handles:
            handle.remove()
    return [tuple(members) for members in groups.values()]
