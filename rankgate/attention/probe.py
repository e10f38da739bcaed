"""Looking into a model's attention while it stays dense."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

NAME = "rankgate_probe"  # in transformers' registry, while a model is probed
Probe = Callable[[int, Tensor, Tensor, Tensor, float], Tensor]


@contextmanager
def probing(model: PreTrainedModel, probe: Probe) -> Iterator[None]:
    """Attention of a layer is `probe(layer, q, k, v, scale)` in the meantime; all (batch × heads × tokens × width)."""

    def attend(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *_: Any, **options: Any) -> Any:
        scale = options.get("scaling") or query.shape[-1] ** -0.5
        return probe(int(cast(Any, module).layer_idx), query, key, value, scale).transpose(1, 2).contiguous(), None

    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, lambda *_, **__: None)
    before = model.config._attn_implementation
    model.set_attn_implementation(NAME)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def dense(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Causal attention to every token: (batch × heads × tokens × width)."""
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=q.shape[1] > k.shape[1])
