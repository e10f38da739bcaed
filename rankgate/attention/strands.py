"""The keys of one sequence that some heads still hold: reading them, adding to them, letting go of them.

A window moves STEP tokens at a time (`ops.attention`): query t sees the tokens of its own step before it, and `window`
more. So what a head holds only changes from step to step, and kernels read whole blocks.

The queries of a step come, read what is held, and then the represented tokens that no later query may see are dropped
for good. So a prompt is read step by step, and decoding is a part of one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional as F

from rankgate.attention.select import Selection, extend, select, unit
from rankgate.ops.attention import ALWAYS, horizon, step_end

TOGETHER = 16  # steps that are read by one call


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
    read: int = 0
    pairs: int = 0

    @property
    def window(self) -> int:
        return ALWAYS if self.own.window is None else self.own.window

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
        begin, end, out = self.seen, self.seen + q.shape[1], []
        self.read, self.pairs = 0, len(k) * sum(range(begin + 1, end + 1))
        self.table = self.table.to(q.device)
        if self.own.tau is None or self.own.window is None:
            return self._attend_near(q, k, v, scale)
        x = unit(k[0]) if states is None else states
        if selection is None and not begin:
            selection = select(x, self.own.tau)
        for t in torch.arange(begin, end, device=q.device).split(self._steps(end)):
            part = slice(self.seen - begin, self.seen - begin + len(t))
            if selection is not None:
                chosen, owner = selection.chosen[part], selection.owner[part]
            else:
                chosen, owner = self._extend(x[part], t, self.own.tau)
            rows = torch.stack([t, chosen.long(), owner, torch.zeros_like(t)])
            out.append(self._step(q[:, part], k[:, part], v[:, part], None if states is None else x[part], rows, scale))
        return torch.cat(out, 1)

    def _steps(self, end: int) -> list[int]:
        """How many of the next tokens up to `end` are of the same step, one after the other."""
        ends = [*range(step_end(self.seen), end, step_end(0)), end]
        return [b - a for a, b in pairwise([self.seen, *ends])]

    def _attend_near(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        """Without representatives, what is held are sinks and tokens in a row.

        The first queries see all of it. After them those of a step see a slice, as long for every step: many steps are
        one call, since threads that meet after each would wait for each other.
        """
        begin, end, step, out = self.seen, self.seen + q.shape[1], step_end(0), []
        t = torch.arange(begin, end, device=q.device)
        self._add(k, v, None, torch.stack([t, torch.zeros_like(t), t, torch.zeros_like(t)]))
        gone = end - self.keys.shape[1]  # tokens
        self.seen = min(step_end(self.sinks + gone + self.window), end)
        if self.seen > begin:
            keys, values = (x[None, :, : self.seen - gone] for x in (self.keys, self.values))
            out.append(self._attention(q[None, :, : self.seen - begin], keys, values, None, scale)[0])
        while self.seen < end:
            count = min(step, end - self.seen)  # of each step
            steps = min((end - self.seen) // count, TOGETHER)
            first, at = horizon(self.seen, self.window) - gone, self.seen - begin
            self.seen += steps * count
            keys, values = (self._slices(x[:, first : self.seen - gone], x, count) for x in (self.keys, self.values))
            part = q[:, at : self.seen - begin].unflatten(1, (steps, count)).transpose(0, 1)
            out.append(self._attention(part, keys, values, None, scale).transpose(0, 1).flatten(1, 2))
        self._drop(begin)
        return torch.cat(out, 1)

    def _slices(self, near: Tensor, held: Tensor, count: int) -> Tensor:
        """Sinks and window of each step (steps × heads × L × width), of so many tokens."""
        windows = near.unfold(1, self.window + count, count).permute(1, 0, 3, 2)
        return torch.cat([held[:, : self.sinks].expand(len(windows), -1, -1, -1), windows], 2)

    def _extend(self, x: Tensor, t: Tensor, tau: float) -> tuple[Tensor, Tensor]:
        """Which of the new tokens t are representatives, and the positions of theirs, given those before."""
        position, chosen = self.table[0], self.table[1].bool()
        before = unit(self.keys[0, chosen]) if self.states is None else self.states.to(x.dtype)
        picked, owner = extend(x, tau, before)
        return picked, torch.cat([position[chosen], t])[owner]

    def _step(self, q: Tensor, k: Tensor, v: Tensor, x: Tensor | None, rows: Tensor, scale: float) -> Tensor:
        begin = self.seen
        self._add(k, v, x, rows)
        self.seen += q.shape[1]
        y = self._read(q, scale)
        self._drop(begin)
        return y

    def _add(self, k: Tensor, v: Tensor, x: Tensor | None, rows: Tensor) -> None:
        self.keys = torch.cat([self.keys, k], 1) if self.keys.numel() else k
        self.values = torch.cat([self.values, v], 1) if self.values.numel() else v
        self.table = torch.cat([self.table, rows], 1)
        if x is not None:
            new = x[rows[1].bool()].to(k.dtype)
            self.states = new if self.states is None else torch.cat([self.states, new])

    def _read(self, q: Tensor, scale: float) -> Tensor:
        """Queries of one step: nothing is held that they may not see, but for the new tokens after them."""
        bias = torch.log1p(self.table[3]).to(q.dtype)
        return self._attention(q[None], self.keys[None], self.values[None], bias, scale)[0]

    def _attention(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float) -> Tensor:
        """Queries q (steps × heads × n × width) read k, v (steps × key heads × L × width); the last n are their own.

        bias: (L,), added to the logits.
        """
        count, length = q.shape[2], k.shape[2]
        self.read += k.shape[0] * k.shape[1] * sum(range(length - count + 1, length + 1))
        whole = bias is None and count == length
        mask = None if bias is None else bias.expand(count, length)
        if count > 1 and not whole:
            seen = torch.ones(count, length, dtype=torch.bool, device=q.device).tril(length - count)
            mask = seen if mask is None else mask.masked_fill(~seen, -torch.inf)
        return F.scaled_dot_product_attention(
            *(q, k, v), attn_mask=mask, is_causal=whole, scale=scale, enable_gqa=q.shape[1] > k.shape[1]
        )

    def _drop(self, begin: int) -> None:
        """Let go of represented tokens that no later query may see; since token `begin`."""
        first = horizon(self.seen, self.window)
        if first <= max(0, horizon(begin, self.window)):
            return
        position, chosen, owner, count = self.table
        keep = (chosen == 1) | (position >= first) | (position < self.sinks)
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
        self.seen += q.shape[1]
        y = self._read(q[:, chosen], scale).transpose(0, 1)
        self.outputs = torch.cat([self.outputs, y]) if self.outputs.numel() else y
        return self.outputs[torch.searchsorted(self.table[0], rows[2])].transpose(0, 1)


def strands_of(heads: Sequence[Heads], sinks: int) -> list[Strand]:
    """Strands of all key heads of a layer: heads that read alike together, but representatives are each head's own."""
    alike: dict[Heads | int, list[int]] = {}
    for i, own in enumerate(heads):
        alike.setdefault(own if own.tau is None else i, []).append(i)
    return [Strand(group, heads[group[0]], sinks) for group in alike.values()]
