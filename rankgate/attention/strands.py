"""The keys of one sequence that some heads still hold: reading them, adding to them, letting go of them.

A window moves STEP tokens at a time (`ops.attention`): query t sees the tokens of its own step before it, and `window`
more. So what a head holds only changes from step to step, and kernels read whole blocks.

A block of queries comes, reads what it may, and then the represented tokens that no later query may see are dropped for
good. So a prompt is read in blocks, and decoding is a block of one token.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from rankgate.attention.select import Selection, extend, unit
from rankgate.ops.attention import ALWAYS, horizon

BLOCK = 256  # queries that read together


@dataclass(frozen=True)
class Heads:
    """What heads read: `window` tokens before a query's step (None: all), representatives at `tau` (None: none)."""

    window: int | None
    tau: float | None


@dataclass
class Strand:
    """Keys (heads × L × width) and values of the tokens of one sequence that some heads still hold, in order.

    heads: their numbers. position, chosen, owner: (L,) of a token, whether it is a representative, and the position of
    its own. count: (L,) of dropped tokens that a token stands for. states: (r × d) of the representatives, None where
    keys are compared.
    """

    heads: list[int]
    own: Heads
    sinks: int
    seen: int = 0
    keys: Tensor = field(default_factory=lambda: torch.empty(0))
    values: Tensor = field(default_factory=lambda: torch.empty(0))
    states: Tensor | None = None
    table: Tensor = field(default_factory=lambda: torch.empty(4, 0, dtype=torch.int64))
    read: Tensor = field(default_factory=lambda: torch.zeros((), dtype=torch.int64))
    pairs: int = 0

    @property
    def window(self) -> int:
        return ALWAYS if self.own.window is None else self.own.window

    def horizon(self, t: Tensor) -> Tensor:
        """The first token that queries at positions t see in their windows."""
        return horizon(t, self.window)

    def queries(self, per_key: int) -> list[int]:
        """The query heads that read it, `per_key` for each of its key heads."""
        return [h * per_key + i for h in self.heads for i in range(per_key)]

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return sum(t.nbytes for t in (self.keys, self.values, self.states, self.table) if t is not None)

    def copy(self) -> Strand:
        """Another with the same content; what changes in one does not in the other."""
        return replace(self, table=self.table.clone())

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, states: Tensor | None, selection: Selection | None, scale: float
    ) -> Tensor:
        """Read with queries q (heads × n × width) of n new tokens, after adding theirs; the result (heads × n × width).

        states: (n × d), unit. selection: among them, if that is known already.
        """
        out = []
        self.read, self.pairs = torch.zeros((), dtype=torch.int64, device=q.device), 0
        self.table = self.table.to(q.device)
        for start in range(0, q.shape[1], BLOCK):
            part = slice(start, start + BLOCK)
            x = unit(k[0, part]) if states is None else states[part]
            count = x.shape[0]
            if selection is not None:
                chosen, owner = selection.chosen[part], selection.owner[part]
            else:
                chosen, owner = self._extend(x)
            t = torch.arange(self.seen, self.seen + count, device=q.device)
            self.seen += count
            self.pairs += k.shape[0] * int((t + 1).sum())
            rows = torch.stack([t, chosen.long(), owner, torch.zeros_like(t)])
            out.append(self._step(q[:, part], k[:, part], v[:, part], None if states is None else x, rows, scale))
        return torch.cat(out, 1)

    def _extend(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Which of the new tokens are representatives, and the positions of theirs, given those before."""
        position, chosen = self.table[0], self.table[1].bool()
        new = torch.arange(self.seen, self.seen + len(x), device=x.device)
        if self.own.tau is None:
            return torch.zeros_like(new, dtype=torch.bool), new
        if self.states is not None:
            before = self.states.to(x.dtype)
        else:
            before = unit(self.keys[0, chosen]) if self.seen else x[:0]
        picked, owner = extend(x, self.own.tau, before)
        return picked, torch.cat([position[chosen], new])[owner]

    def _step(self, q: Tensor, k: Tensor, v: Tensor, x: Tensor | None, rows: Tensor, scale: float) -> Tensor:
        self._add(k, v, x, rows)
        y = self._read(q, rows[0], scale)
        self._drop(rows[0, -1])
        return y

    def _add(self, k: Tensor, v: Tensor, x: Tensor | None, rows: Tensor) -> None:
        self.keys = torch.cat([self.keys, k], 1) if self.keys.numel() else k
        self.values = torch.cat([self.values, v], 1) if self.values.numel() else v
        self.table = torch.cat([self.table, rows], 1)
        if x is not None:
            new = x[rows[1].bool()].to(k.dtype)
            self.states = new if self.states is None else torch.cat([self.states, new])

    def _read(self, q: Tensor, t: Tensor, scale: float) -> Tensor:
        position, chosen, owner, count = self.table
        heads = self.keys.shape[0]
        if len(t) == 1:  # nothing is held that the next token may not see
            self.read += heads * len(position)
            mask = None if self.own.tau is None else torch.log1p(count)[None].to(q.dtype)
            return attention(q, self.keys, self.values, mask, scale)
        before = position < self.horizon(t)[:, None]
        near = (position <= t[:, None]) & (~before | (position < self.sinks) | chosen.bool())
        self.read += near.sum() * heads
        mask = torch.zeros(near.shape, dtype=q.dtype, device=q.device)
        if self.own.tau is not None:
            waiting = ((chosen == 0) & (position >= self.sinks)).nonzero()[:, 0]  # still here, but not for all queries
            mine = (owner[waiting, None] == position).to(torch.float32)
            unseen = before[:, waiting].to(torch.float32)
            mask += torch.log1p(count + unseen @ mine).to(q.dtype)
        return attention(q, self.keys, self.values, mask.masked_fill_(~near, -torch.inf), scale)

    def _drop(self, last: Tensor) -> None:
        """Let go of represented tokens that no query after `last` may see."""
        position, chosen, owner, count = self.table
        keep = (chosen == 1) | (position >= self.horizon(last + 1)) | (position < self.sinks)
        if keep.all():
            return
        if self.own.tau is not None:
            count.index_add_(0, torch.searchsorted(position, owner[~keep]), torch.ones_like(owner[~keep]))
        self.table = self.table[:, keep]
        self.keys, self.values = self.keys[:, keep], self.values[:, keep]


@dataclass
class PaperStrand(Strand):
    """Of representatives only, with their outputs (L × heads × width), which the others take over."""

    outputs: Tensor = field(default_factory=lambda: torch.empty(0))

    @property
    def nbytes(self) -> int:
        return super().nbytes + self.outputs.nbytes

    def _step(self, q: Tensor, k: Tensor, v: Tensor, x: Tensor | None, rows: Tensor, scale: float) -> Tensor:
        chosen = rows[1].bool()
        self._add(k[:, chosen], v[:, chosen], None if x is None else x[chosen], rows[:, chosen])
        y = self._read(q[:, chosen], rows[0, chosen], scale).transpose(0, 1)
        self.outputs = torch.cat([self.outputs, y]) if self.outputs.numel() else y
        return self.outputs[torch.searchsorted(self.table[0], rows[2])].transpose(0, 1)


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """(heads × n × width) from q (the same), k and v (key heads × L × width) and an added mask (n × L)."""
    y = F.scaled_dot_product_attention(
        q[None], k[None], v[None], attn_mask=mask, scale=scale, enable_gqa=len(q) > len(k)
    )
    return y[0]
