"""Attention of new tokens, mostly one, over a preallocated cache.

    out_h = Σ_t softmax_t(s q_h · k_t) v_t,    t = 0 … p,    h = 0 … H − 1

Query heads share key heads in groups of H / G. The operator also stores the new key and value at position p, so that a
traced decode step has one node per layer, whose shapes do not depend on p: p is read from a tensor.

    attend      keys and values are buffers of one layer
    attend_at   they are found through a table of all layers on a GPU (`ops.gpu.attention.table`)

Not covered: masks, windows, soft caps, sinks.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from rankgate.core import operators


def attend_reference(
    q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, position: Tensor, scale: float
) -> Tensor:
    """The definition; also the path of dtypes, devices and numbers of tokens without a kernel.

    Args:
        q: (1, H, T, d), with H a multiple of G.
        k: (1, G, T, d).
        v: (1, G, T, e).
        keys: (1, G, capacity, d), contiguous; written in place.
        values: (1, G, capacity, e), contiguous; written in place.
        position: (1, T) int64, ascending, below the capacity. Not checked here: the decode loop owns it.
        scale: s.

    Returns (1, T, H, e).
    """
    at = position.flatten()
    keys.index_copy_(2, at, k)
    values.index_copy_(2, at, v)
    end = int(at[-1]) + 1
    seen = torch.arange(end, device=at.device) <= at[:, None]
    known = keys[:, :, :end], values[:, :, :end]
    out = F.scaled_dot_product_attention(q, *known, attn_mask=seen, scale=scale, enable_gqa=True)
    return out.transpose(1, 2).contiguous()


operators.define(
    "attend(Tensor q, Tensor k, Tensor v, Tensor(a!) keys, Tensor(b!) values, Tensor position, float scale) -> Tensor"
)
operators.impl("attend", attend_reference, "CompositeExplicitAutograd")
operators.define("attend_at(Tensor q, Tensor k, Tensor v, Tensor cache, int layer, Tensor position, float s) -> Tensor")
operators.impl("attend_at", lambda q, k, v, *_: q.new_empty((1, *q.shape[2:0:-1], v.shape[3])), "Meta")
