"""Looking into a model's attention while it stays dense."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from rankgate.attention.registry import plain_mask, refuse_beyond_plain

NAME = "rankgate_probe"  # in transformers' registry, while a model is probed
Probe = Callable[[int, Tensor, Tensor, Tensor, float], Tensor]


@contextmanager
def probing(model: PreTrainedModel, probe: Probe) -> Iterator[None]:
    """Attention of a layer is `probe(layer, q, k, v, scale)` in the meantime; all (batch × heads × tokens × width).

    Raises RankgateError, from within the model, if its attention is not plainly causal.
    """

    def attend(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        scaling: float | None = None,
        **options: Any,
    ) -> Any:
        refuse_beyond_plain(options)
        scale = scaling or query.shape[-1] ** -0.5
        return probe(int(cast(Any, module).layer_idx), query, key, value, scale).transpose(1, 2).contiguous(), None

    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, plain_mask)
    before = model.config._attn_implementation
    model.set_attn_implementation(NAME)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def dense(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Causal attention to every token: (batch × heads × tokens × width)."""
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=q.shape[1] > k.shape[1])
