"""What the heads of a layer hold, as rows that a captured step reads: `ops.attention.attend_held`.

Of a head with a window these are its kept rows (sinks, and representatives before the window) and a ring of recent
tokens; of any other head a ring that holds all. All heads' lie in one buffer, one after the other. A step writes to the
rings. Between steps, where windows move, a head with representatives lets go of what leaves its window (`hand_over`);
other heads need nothing.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rankgate.attention.select import extend, unit
from rankgate.attention.strands import Strand
from rankgate.ops.attention import ALWAYS, horizon, ring_length

KEPT = 64  # rows that a head with representatives has room for beyond those it has


def as_rows(keys: Tensor, values: Tensor) -> list[Tensor]:
    """Keys and values (1 × G × capacity × width) of heads that hold all, as what `attend_held` reads; shared memory."""
    heads, capacity = keys.shape[1:3]
    rows = [[h * capacity, 0, h * capacity, capacity, ALWAYS, 0] for h in range(heads)]
    bias = torch.zeros(heads * capacity, device=keys.device)
    return [keys.flatten(0, 2), values.flatten(0, 2), bias, torch.tensor(rows, device=keys.device)]


class HeldRows:
    """Rows of one layer, for one sequence.

    keys (R × d), values (R × e), bias (R,), rows (G × 6): see `attend_held`. count: (R,) int64, tokens that a kept row
    stands for besides itself; −1 where it stands for none, a sink that is no representative.
    """

    def __init__(self, strands: list[Strand], capacity: int) -> None:
        """As `strands` hold them, sinks and all, with room for a text of `capacity` tokens."""
        heads = sorted((h, i, strand) for strand in strands for i, h in enumerate(strand.heads))
        self.taus = [strand.own.tau for *_, strand in heads]
        keys, values = strands[0].keys, strands[0].values
        self.keys, self.values = keys.new_empty(0, keys.shape[2]), values.new_empty(0, values.shape[2])
        self.bias, self.count = keys.new_empty(0, dtype=torch.float32), keys.new_empty(0, dtype=torch.int64)
        firsts = [0 if strand.own.window is None else strand.sinks for *_, strand in heads]
        rows = [[0, 0, 0, 0, strand.window, first] for (*_, strand), first in zip(heads, firsts, strict=True)]
        self.rows = torch.tensor(rows, device=keys.device)
        ends = [max(first, horizon(s.seen, s.window)) for (*_, s), first in zip(heads, firsts, strict=True)]
        kept = [strand.table[0] < end for (*_, strand), end in zip(heads, ends, strict=True)]
        self._move([int(k.sum()) + KEPT * (tau is not None) for k, tau in zip(kept, self.taus, strict=True)], capacity)
        for (head, i, strand), old in zip(heads, kept, strict=True):
            start, _, ring, length = self.rows[head, :4].tolist()
            position, chosen, _, count = strand.table
            at = torch.where(old, start - 1 + old.cumsum(0), ring + position % length)
            self.keys[at], self.values[at] = strand.keys[i], strand.values[i]
            self.count[at] = count.where(chosen.bool(), -1)
            self.rows[head, 1] = old.sum()
        self.bias = _bias(self.count)

    @property
    def buffers(self) -> list[Tensor]:
        """As `attend_held` takes them."""
        return [self.keys, self.values, self.bias, self.rows]

    def reads(self, t: int) -> int:
        """Keys that query t reads, of all heads."""
        return sum(kept + t + 1 - max(first, horizon(t, w)) for _, kept, _, _, w, first in self.rows.tolist())

    def reserve(self, capacity: int) -> None:
        """Have room for a text of so many tokens; the buffers are others then."""
        self._move(self._rooms(), capacity)

    def hand_over(self, t: int) -> bool:
        """Let go of what leaves the windows before query t, where these move; whether the buffers are others now."""
        before = self.rows
        for head, tau in enumerate(self.taus):
            if tau is None:
                continue
            window, first = self.rows[head, 4:].tolist()
            if left := range(max(first, horizon(t - 1, window)), max(first, horizon(t, window))):
                self._keep(head, tau, torch.tensor(left, device=self.rows.device))
        return self.rows is not before

    def _keep(self, head: int, tau: float, tokens: Tensor) -> None:
        """Those of the tokens that are representatives become kept rows, the others count for their own."""
        start, kept, ring, *_ = self.rows[head].tolist()
        if start + kept + len(tokens) > ring:
            rooms = self._rooms()
            rooms[head] += max(KEPT, kept)
            self._move(rooms, self.capacity)
            start, kept, ring, *_ = self.rows[head].tolist()
        places = ring + tokens % self.rows[head, 3]
        known = start + (self.count[start : start + kept] >= 0).nonzero()[:, 0]
        chosen, owner = extend(unit(self.keys[places]), tau, unit(self.keys[known]))
        new = start + kept + torch.arange(int(chosen.sum()), device=tokens.device)
        for buffer in (self.keys, self.values):
            buffer[new] = buffer[places[chosen]]
        self.count[new] = 0
        places[chosen] = new
        owner = torch.cat([known, places])[owner[~chosen]]
        self.count.index_add_(0, owner, torch.ones_like(owner))
        self.rows[head, 1] += len(new)
        mine = slice(start, start + kept + len(new))
        self.bias[mine] = _bias(self.count[mine])

    def _rooms(self) -> list[int]:
        return (self.rows[:, 2] - self.rows[:, 0]).tolist()

    def _move(self, rooms: list[int], capacity: int) -> None:
        """Take new buffers, with so many kept rows for each head, and room for a text of `capacity` tokens."""
        old: list[list[int]] = self.rows.tolist()
        rows: list[list[int]] = []
        self.capacity = capacity
        for room, (_, kept, _, _, window, first) in zip(rooms, old, strict=True):
            start = sum(rows[-1][2:4]) if rows else 0
            rows.append([start, kept, start + room, min(ring_length(window), capacity), window, first])
        for name in ("keys", "values", "bias", "count"):
            buffer = getattr(self, name)
            new = buffer.new_zeros(sum(rows[-1][2:4]), *buffer.shape[1:])
            for before, after in zip(old, rows, strict=True):
                for at, length in ((0, 1), (2, 3)):
                    new[after[at] :][: before[length]] = buffer[before[at] :][: before[length]]
            setattr(self, name, new)
        self.rows = torch.tensor(rows, device=self.rows.device)


def _bias(count: Tensor) -> Tensor:
    """What is added to the logit of a kept row."""
    return count.clamp_min(0).log1p()
