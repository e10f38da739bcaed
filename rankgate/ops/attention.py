"""Attention of new tokens, mostly one, over a preallocated cache.

    out_h = Σ_t exp(a_t) v_t / (Σ_t exp(a_t) + exp(z_h)),    a_t = c tanh(s q_h · k_t / c),    t = max(0, p − w + 1) … p

for each of B sequences, with positions p of its own, and heads h = 0 … H − 1. A layer may have a window w, a soft cap c
of its scores (Gemma 2) and a learned sink z_h (gpt-oss), or be without: then a_t = s q_h · k_t, or exp(z_h) is 0. Query
heads share key heads in groups of H / G. The operator also stores the new key and value at position p, so that a traced
decode step has one node per layer, whose shapes do not depend on p: p is read from a tensor.

    attend          keys and values are buffers of one layer
    attend_at       they are found through a table of all layers on a GPU (`ops.gpu.attention.table`)
    attend_held     of each key head only what it still holds (`attention.strands`): kept rows, a ring of recent ones
    attend_held_at  the same, found through such a table

A window of `attend_held` moves STEP tokens at a time: query t sees the tokens of its own step before it, and w more.

Not covered: other masks.
"""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F

from rankgate.core import operators

STEP = 128  # tokens after which windows move
ALWAYS = 1 << 40  # tokens: a window that is never left
Place = TypeVar("Place", int, Tensor)


def horizon(t: Place, window: int) -> Place:
    """The first token that a query at position t sees in its window: `window` tokens before its own step."""
    return t // STEP * STEP - window


def step_end(t: int) -> int:
    """The first token after the step of token t."""
    return t // STEP * STEP + STEP


def ring_length(window: int) -> int:
    """Rows of a ring for such a window."""
    return -(-window // STEP) * STEP + STEP


def attend_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    keys: Tensor,
    values: Tensor,
    position: Tensor,
    scale: float,
    window: int = 0,
    cap: float = 0.0,
    sinks: Tensor | None = None,
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
        cap: c, 0 for none.
        sinks: z, (H,) float32.

    Returns (B, T, H, e).
    """
    if len(q) > 1:
        each = zip(*(t.split(1) for t in (q, k, v, keys, values, position)), strict=True)
        return torch.cat([attend_reference(*tensors, scale, window, cap, sinks) for tensors in each])  # type: ignore[call-arg]
    at = position.flatten()
    keys.index_copy_(2, at, k)
    values.index_copy_(2, at, v)
    end = int(at[-1]) + 1
    past = at[:, None] - torch.arange(end, device=at.device)
    seen = (past >= 0) & (past < window) if window else past >= 0
    known = keys[:, :, :end], values[:, :, :end]
    if not cap and sinks is None:
        out = F.scaled_dot_product_attention(q, *known, attn_mask=seen, scale=scale, enable_gqa=True)
    else:
        key, value = (t.repeat_interleave(q.shape[1] // k.shape[1], 1) for t in known)
        scores = (q @ key.transpose(2, 3)).float() * scale
        if cap:
            scores = cap * torch.tanh(scores / cap)
        scores = scores.masked_fill(~seen, -torch.inf)
        if sinks is not None:
            scores = torch.cat([scores, sinks[:, None, None].expand(*scores.shape[1:3], 1)[None]], 3)
        out = scores.softmax(3)[..., :end].to(value.dtype) @ value
    return out.transpose(1, 2).contiguous()


def attend_held_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    keys: Tensor,
    values: Tensor,
    bias: Tensor,
    rows: Tensor,
    position: Tensor,
    scale: float,
) -> Tensor:
    """Tokens of one sequence, one after the other, over what each key head holds; the definition.

    Args:
        q: (1, H, T, d), with H a multiple of G.
        k: (1, G, T, d).
        v: (1, G, T, e).
        keys: (R, d), of all key heads; written in place.
        values: (R, e), likewise.
        bias: (R,) float32, added to the logits of kept rows.
        rows: (G, 6) int64: start and number of kept rows; start and length of the ring, in which token t is row
            t mod length; window; first token that is ever in the ring.
        position: (1, T) int64, not below that first token.
        scale: s.

    Returns (1, T, H, e).
    """
    if q.shape[2] > 1:
        each = zip(*(x.split(1, 2) for x in (q, k, v)), position.split(1, 1), strict=True)
        held = keys, values, bias, rows
        return torch.cat([attend_held_reference(*new, *held, at, scale) for *new, at in each], 1)  # type: ignore[call-arg]
    t, together = int(position), q.shape[1] // k.shape[1]
    out = []
    for g, (start, kept, ring, length, window, first) in enumerate(rows.tolist()):
        keys[ring + t % length], values[ring + t % length] = k[0, g, 0], v[0, g, 0]
        recent = torch.arange(max(first, horizon(t, window)), t + 1, device=rows.device)
        read = torch.cat([torch.arange(start, start + kept, device=rows.device), ring + recent % length])
        scores = (q[0, g * together : (g + 1) * together, 0] @ keys[read].T).float() * scale
        scores[:, :kept] += bias[start : start + kept]
        out.append(scores.softmax(1).to(values.dtype) @ values[read])
    return torch.cat(out)[None, None]


operators.define(
    "attend(Tensor q, Tensor k, Tensor v, Tensor(a!) keys, Tensor(b!) values, Tensor position, float scale, "
    "int window, float cap, Tensor? sinks) -> Tensor"
)
operators.impl("attend", attend_reference, "CompositeExplicitAutograd")
operators.define(
    "attend_at(Tensor q, Tensor k, Tensor v, Tensor cache, int layer, Tensor position, float scale, int window, "
    "float cap, Tensor? sinks) -> Tensor"
)
operators.define(
    "attend_held(Tensor q, Tensor k, Tensor v, Tensor(a!) keys, Tensor(b!) values, Tensor bias, Tensor rows, "
    "Tensor position, float scale) -> Tensor"
)
operators.impl("attend_held", attend_held_reference, "CompositeExplicitAutograd")
operators.define(
    "attend_held_at(Tensor q, Tensor k, Tensor v, Tensor cache, int layer, Tensor position, float scale) -> Tensor"
)
for name in ("attend_at", "attend_held_at"):
    operators.impl(name, lambda q, k, v, *_: q.new_empty((len(q), *q.shape[2:0:-1], v.shape[3])), "Meta")
