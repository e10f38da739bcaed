"""Which linears a model has, and which of them read the same input.

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
from rankgate.methods.given import Linear

NOT_CALLED = "never called as a layer"


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
    """Every `nn.Linear` and `Conv1D` by name, without the output embedding (`lm_head`).

    A subclass of `nn.Linear` counts where its own forward is the plain matrix product (Falcon's), and is left out where
    it is not.
    """
    head = model.get_output_embeddings()
    plain: dict[type[nn.Module], bool] = {nn.Linear: True}  # by class

    def is_linear(module: nn.Module) -> bool:
        if isinstance(module, nn.Linear) and type(module) not in plain:
            plain[type(module)] = _multiplies(module)
        return isinstance(module, Conv1D) or plain.get(type(module), False)

    return {name: module for name, module in model.named_modules() if module is not head and is_linear(module)}


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

    Runs the model once on a few token ids. A linear that is never called (its weight is used in another way, or it is
    an expert that no token reached) is in no group.
    """
    inputs: list[Tensor] = []  # kept alive, so that no two of them can share an id
    groups: dict[int, list[str]] = {}
    called: set[str] = set()

    def observe(name: str, x: Tensor) -> None:
        if name not in called:
            called.add(name)
            inputs.append(x)
            groups.setdefault(id(x), []).append(name)

    handles = [
        module.register_forward_pre_hook(lambda _, args, name=name: observe(name, args[0]))
        for name, module in linears(model).items()
    ]
    try:
        with torch.no_grad():
            model.base_model(input_ids=torch.arange(1, 5, device=model.device)[None])
    finally:
        for handle in handles:
            handle.remove()
    return [tuple(members) for members in groups.values()]
