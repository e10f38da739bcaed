"""Copies of models that share what is large."""

import copy

from transformers import PreTrainedModel


def twin(model: PreTrainedModel) -> PreTrainedModel:
    """A copy of `model` whose modules are its own and whose tensors are shared: dense and converted side by side."""
    tensors = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})
