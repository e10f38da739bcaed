"""Which tokens stand for the others: representatives by a Gram threshold, and their inheritance from layer to layer.

The states of a layer's tokens are scaled to length 1, so that their Gram matrix holds cosines. A token is represented
when its cosine with an earlier one is above 1 − τ²; the others are representatives. Two rules say with which:

    earlier   with any earlier token (Activation Decorrelation Attention)
    greedy    with an earlier representative: each represented token then has one that is near

A represented token is assigned to the earlier representative it is most like. With τ = 0 every token is one.

The cascade does not start anew at the next layer. It inherits the representatives and repairs them: those that an
earlier one represents are removed, and tokens that none represents any more are added. It compares the r
representatives with each other, the other T − r tokens with them, and the a new ones with each other: O(T r) cosines
where a selection takes O(T²).

All of it is causal, and done in blocks of rows against the columns before them: memory is O(BLOCK T). `dots` counts the
cosines that were computed. A block needs no loop over its tokens: greedy choice is the lexicographically first maximal
independent set, which is found in a few rounds (Blelloch et al., 2012).

Not covered: how similar outputs are; cosines of inputs are a stand-in for that.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from rankgate.ops.gpu import has_triton

Rule = Literal["earlier", "greedy"]
BLOCK = 128  # tokens compared together; a block is compared with itself in both directions


@dataclass(frozen=True)
class Selection:
    """Representatives of T tokens. `dots`: cosines computed for it; `added` and `removed`: by the cascade.

    chosen: (T,) bool. owner: (T,) the representative of every token, itself where it is one.
    """

    chosen: Tensor
    owner: Tensor
    dots: int
    added: int = 0
    removed: int = 0

    @property
    def share(self) -> float:
        """r / T."""
        return self.chosen.float().mean().item()

    def same_as(self, other: Selection) -> float:
        """Jaccard overlap of two sets of representatives."""
        return ((self.chosen & other.chosen).sum() / (self.chosen | other.chosen).sum().clamp_min(1)).item()


def unit(states: Tensor, centred: bool = False) -> Tensor:
    """States (…, d) at length 1, in their dtype; `centred` takes the mean over d first: cosines are correlations."""
    wide = states.float()
    if centred:
        wide = wide - wide.mean(-1, keepdim=True)
    return F.normalize(wide, dim=-1).to(states.dtype)


def by_kernels(x: Tensor) -> bool:
    """Whether kernels take x."""
    return has_triton(x.device) and x.dtype != torch.float64


def select(x: Tensor, tau: float, rule: Rule = "greedy") -> Selection:
    """The representatives among unit states x (T × d)."""
    chosen, dots = (_greedy if rule == "greedy" else _earlier)(x, tau)
    return owned(x, chosen, dots)


def select_each(x: Tensor, tau: Tensor) -> tuple[Tensor, Tensor]:
    """Of each of several texts of unit states x (texts × T × d), at a τ of its own (texts), on a GPU.

    Which tokens are greedy representatives, and the representative of every token; both (texts × T).
    """
    from rankgate.ops.gpu.select import greedy, nearest

    chosen, found = greedy(x, 1 - tau.square())
    every = torch.arange(x.shape[1], device=x.device)
    owner = nearest(x, every, found, chosen.cumsum(1))[1]
    return chosen, torch.where(chosen, every, owner)


def cascade(x: Tensor, tau: float, before: Selection, rule: Rule = "greedy") -> Selection:
    """The representatives among unit states x (T × d) of a layer, repaired from those of a layer before."""
    inherited, others = before.chosen.nonzero()[:, 0], (~before.chosen).nonzero()[:, 0]
    kept, dots = _greedy(x[inherited], tau)
    chosen = torch.zeros_like(before.chosen)
    chosen[inherited[kept]] = True
    likeness, _, more = _nearest(x, others, chosen.nonzero()[:, 0])
    lost = others[likeness <= 1 - tau**2]
    dots += more
    if rule == "greedy":
        new, more = _greedy(x[lost], tau)
        lost, dots = lost[new], dots + more
    chosen[lost] = True
    removed = len(inherited) - int(kept.sum())
    return replace(owned(x, chosen, dots), added=len(lost), removed=removed)


def inherit(before: Selection) -> Selection:
    """The same representatives, unchecked."""
    return Selection(before.chosen, before.owner, 0)


def extend(x: Tensor, tau: float, before: Tensor) -> tuple[Tensor, Tensor]:
    """Which of the unit states x (n × d) of later tokens are representatives (n), given those `before` (r × d).

    Also the representative of each (n): an index into those before and x, one after the other.
    """
    new = torch.arange(len(x), device=x.device) + len(before)
    before, x = before.float(), x.float()
    both = torch.cat([before, x])
    chosen = _independent(_near(x, x, tau).tril_(-1), ~_near(x, before, tau).any(1))
    known = torch.arange(len(before), device=x.device)
    owner = new.clone()
    owner[~chosen] = _nearest(both, new[~chosen], torch.cat([known, new[chosen]]))[1]
    return chosen, owner


def causal_dots(tokens: int) -> int:
    """Cosines of every token with every earlier one."""
    return tokens * (tokens - 1) // 2


def owned(x: Tensor, chosen: Tensor, dots: int) -> Selection:
    """A selection of the `chosen` (the first token must be one), each other token with the one it is most like.

    dots: of the choice; it has computed these cosines already, so they are not counted again.
    """
    tokens, representatives = (~chosen).nonzero()[:, 0], chosen.nonzero()[:, 0]
    owner = torch.arange(len(x), device=x.device)
    owner[tokens] = _nearest(x, tokens, representatives)[1]
    return Selection(chosen, owner, dots)


def _nearest(x: Tensor, rows: Tensor, columns: Tensor) -> tuple[Tensor, Tensor, int]:
    """Of every row its largest cosine with an earlier column (−1 if there is none), that column, and cosines computed.

    rows, columns: ascending positions in x.
    """
    if by_kernels(x):
        return _nearest_by_kernel(x, rows, columns)
    x = x.float()
    likeness, owner, dots = [x.new_empty(0)], [rows.new_empty(0)], 0
    for start in range(0, len(rows), BLOCK):
        part = rows[start : start + BLOCK]
        before = columns[: int(torch.searchsorted(columns, part[-1]))]
        if not len(before):
            likeness.append(x.new_full((len(part),), -1.0))
            owner.append(part)
            continue
        cosines = (x[part] @ x[before].T).clamp_max_(1).masked_fill_(before >= part[:, None], -1)
        best, place = cosines.max(1)
        likeness.append(best)
        owner.append(torch.where(best > -1, before[place], part))
        dots += cosines.numel()
    return torch.cat(likeness), torch.cat(owner), dots


def _nearest_by_kernel(x: Tensor, rows: Tensor, columns: Tensor) -> tuple[Tensor, Tensor, int]:
    from rankgate.ops.gpu.select import nearest

    before = torch.searchsorted(columns, rows)
    if not len(rows) or not len(columns):
        return x.new_full((len(rows),), -1, dtype=torch.float32), rows, 0
    likeness, owner = nearest(x[None], rows, columns.to(torch.int32)[None], before[None])
    return likeness[0], torch.where(likeness[0] > -1, owner[0].long(), rows), int(before.sum())


def _earlier(x: Tensor, tau: float) -> tuple[Tensor, int]:
    every = torch.arange(len(x), device=x.device)
    likeness, _, dots = _nearest(x, every, every)
    return likeness <= 1 - tau**2, dots


def _greedy(x: Tensor, tau: float) -> tuple[Tensor, int]:
    if by_kernels(x):
        from rankgate.ops.gpu.select import greedy

        chosen = greedy(x[None], x.new_tensor([1 - tau**2], dtype=torch.float32))[0][0]
        return chosen, _dots(chosen)
    x, chosen = x.float(), torch.zeros(len(x), dtype=torch.bool, device=x.device)
    for start in range(0, len(x), BLOCK):
        block, before = x[start : start + BLOCK], x[:start][chosen[:start]]
        free = ~_near(block, before, tau).any(1)
        chosen[start : start + BLOCK] = _independent(_near(block, block, tau).tril_(-1), free)
    return chosen, _dots(chosen)


def _dots(chosen: Tensor) -> int:
    """Cosines of a greedy choice: of every block with the representatives before it, and with itself."""
    blocks = F.pad(chosen, (0, -len(chosen) % BLOCK)).view(-1, BLOCK).sum(1)
    sizes = (len(chosen) - BLOCK * torch.arange(len(blocks), device=chosen.device)).clamp_max(BLOCK)
    return int((sizes * (blocks.cumsum(0) - blocks + sizes)).sum())


def _near(x: Tensor, y: Tensor, tau: float) -> Tensor:
    """Which cosines are above 1 − τ²; none if τ is 0, whatever rounding says."""
    return (x @ y.T).clamp_max_(1) > 1 - tau**2


def _independent(near: Tensor, free: Tensor) -> Tensor:
    """The first maximal independent set among the `free` rows: in order, each that is near to no earlier member.

    near: (b × b) bool, strictly lower triangular.
    """
    chosen = torch.zeros_like(free)
    while free.any():
        first = free & ~(near & free).any(1)  # nothing undecided before them is near
        chosen |= first
        free &= ~first & ~(near & first).any(1)
    return chosen
