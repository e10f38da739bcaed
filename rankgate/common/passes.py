"""Passes over a model that leave it as it was: in evaluation mode, and backward from labels of its own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from rankgate.errors import RankgateError


def backward_from_sampled_labels(model: PreTrainedModel, ids: Tensor, generator: torch.Generator) -> None:
    """Backpropagate the summed loss of ids (1 × tokens) with labels drawn from the model's own predictions.

    Raises RankgateError if a logit is not finite.
    """
    logits = model(input_ids=ids.to(model.device), use_cache=False).logits[0].float()
    if not torch.isfinite(logits).all():
        raise RankgateError("the model gives non-finite logits on calibration text; try a wider dtype")
    labels = torch.multinomial(logits.detach().softmax(-1), 1, generator=generator)[:, 0]
    F.cross_entropy(logits, labels, reduction="sum").backward()


@contextmanager
def gradients_from_embedding(model: PreTrainedModel) -> Iterator[None]:
    """While open, gradients flow through `model` down to the embedding's output, and no parameter collects any."""
    wanted = [parameter for parameter in model.parameters() if parameter.requires_grad]
    handle = model.get_input_embeddings().register_forward_hook(lambda _, args, y: y.requires_grad_())
    try:
        for parameter in wanted:
            parameter.requires_grad_(False)
        yield
    finally:
        handle.remove()
        for parameter in wanted:
            parameter.requires_grad_(True)


@contextmanager
def evaluation_mode(model: PreTrainedModel) -> Iterator[None]:
    """`model.eval()` for the duration."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)
