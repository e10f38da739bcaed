"""Attention of new tokens, mostly one, over a preallocated cache.

    out_h = Σ_t softmax_t(s q_h · k_t) v_t,    t = max(0, p − w + 1) … p,    h = 0 … H − 1

for each of B sequences, with positions p of its own. w is the window of the layer, if it has one. Query heads share key
heads in groups of H / G. The operator also stores the new key and value at position p, so that a traced decode step has
one node per layer, whose shapes do not depend on p: p is read from a tensor.

    attend      keys and values are buffers of one layer
    attend_at   they are found through a table of all layers on a GPU (`ops.gpu.attention.table`); no windows

Not covered: other masks, soft caps, sinks.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from rankgate.core import operators


def attend_reference(
    q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, position: Tensor, scale: float, window: int = 0
) -> Tensor:
    """The definition; also the path of dtypes, devices and numbers of tokens without a kernel.

    Args:
        q: (B, H, T, d), with H a multiple of G.
        k: (B, G, T, d).
        v: (B, G, T, e).
        keys: (B, G, capacity, d), contiguous; written in place.
        values: (B, G, capacity, e), contiguous; written in place.
        position: (B, T) int64, ascending, below the capacity. Not checked here: the decode loop owns it.
        scale: s.
        window: w, 0 for none.

    Returns (B, T, H, e).
    """
    if len(q) > 1:
        each = zip(*(t.split(1) for t in (q, k, v, keys, values, position)), strict=True)
        return torch.cat([attend_reference(*tensors, scale, window) for tensors in each])  # type: ignore[call-arg]
    at = position.flatten()
    keys.index_copy_(2, at, k)
    values.index_copy_(2, at, v)
    end = int(at[-1]) + 1
    past = at[:, None] - torch.arange(end, device=at.device)
    seen = (past >= 0) & (past < window) if window else past >= 0
    known = keys[:, :, :end], values[:, :, :end]
    out = F.scaled_dot_product_attention(q, *known, attn_mask=seen, scale=scale, enable_gqa=True)
    return out.transpose(1, 2).contiguous()


operators.define(
    "attend(Tensor q, Tensor k, Tensor v, Tensor(a!) keys, Tensor(b!) values, Tensor position, float scale, "
    "int window) -> Tensor"
)
operators.impl("attend", attend_reference, "CompositeExplicitAutograd")
operators.define("attend_at(Tensor q, Tensor k, Tensor v, Tensor cache, int layer, Tensor position, float s) -> Tensor")
operators.impl("attend_at", lambda q, k, v, *_: q.new_empty((len(q), *q.shape[2:0:-1], v.shape[3])), "Meta")
