"""A whole text read at once by kernels (GPU): what `Strand.attend` gives for it, and what the strands then hold.

While heads without representatives read, those of the others are chosen on a second stream.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor
from torch.nn import functional as F

from rankgate.attention.probe import dense
from rankgate.attention.select import Selection, select_each, unit
from rankgate.attention.strands import PaperStrand, Strand
from rankgate.ops import attention
from rankgate.ops.gpu.windows import Kept
from rankgate.ops.gpu.windows import attend as attend_windows

FAR = 1 << 30  # tokens: a window that is never left, in 32 bits


def attend_prompt(
    strands: list[Strand], q: Tensor, k: Tensor, v: Tensor, states: Tensor | None, known: Selection | None, scale: float
) -> Tensor:
    """What the strands of all heads, still empty, read with all queries of a text: (T, H, e).

    q: (H, T, d). k: (G, T, d). v: (G, T, e). states: (T, width) of the layer, at length 1; None where keys are
    compared. known: their selection.
    """
    if isinstance(strands[0], PaperStrand):
        assert known is not None and states is not None
        return _among_representatives(strands[0], q, k, v, states, known, scale)
    out = q.new_empty(k.shape[1], len(q), v.shape[2])
    plain = [strand for strand in strands if strand.own.tau is None]
    choosing = [strand for strand in strands if strand.own.tau is not None]
    ready = torch.cuda.current_stream(k.device).record_event() if k.is_cuda else None
    if plain:
        _read_windows(plain, q, k, v, scale, out)
    if choosing:
        chosen, owner = _chosen(choosing, k, ready) if known is None else (known.chosen[None], known.owner[None])
        _read_kept(choosing, q, k, v, chosen, owner, scale, out)
        if known is not None and states is not None:
            choosing[0].states = states[known.chosen].to(k.dtype)
    return out


def _start(strand: Strand, tokens: int) -> int:
    """The first token, but for what is kept, that it holds after so many."""
    return max(attention.horizon(tokens, strand.window), min(strand.sinks, tokens))


@functools.lru_cache
def _index(heads: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.tensor(heads, device=device)


def _of(strand: Strand, x: Tensor, tokens: Tensor) -> Tensor:
    """Of its heads (of G × T × …) these tokens."""
    return x[_index(tuple(strand.heads), x.device)[:, None], tokens]


def _heads(strands: list[Strand], counts: list[int], device: torch.device) -> Tensor:
    """What `attend_windows` takes. counts: of each strand, the kept keys of a head."""
    rows, key, bias = [], 0, 0
    for strand, count in zip(strands, counts, strict=True):
        for head in strand.heads:
            rows.append((head, min(strand.window, FAR), key, bias))
            key += count
        bias += count
    return torch.tensor(rows, dtype=torch.int32, device=device)


def _read_windows(strands: list[Strand], q: Tensor, k: Tensor, v: Tensor, scale: float, out: Tensor) -> None:
    """What strands without representatives read, and hold then."""
    tokens, sinks = k.shape[1], strands[0].sinks
    attend_windows(q, k, v, _heads(strands, [0] * len(strands), k.device), sinks, None, scale, attention.STEP, out)
    for strand in strands:
        heads = len(strand.heads)
        strand.pairs = heads * tokens * (tokens + 1) // 2
        strand.read = strand.pairs - heads * _unread(strand.window, sinks, tokens)
        strand.table, strand.seen = _plain_table(sinks, _start(strand, tokens), tokens, k.device), tokens
        strand.keys, strand.values = (_of(strand, x, strand.table[0]) for x in (k, v))


@functools.lru_cache
def _unread(window: int, sinks: int, tokens: int) -> int:
    """How many keys before their windows the queries of one head leave out."""
    low = attention.horizon(torch.arange(tokens), window).clamp_min_(0)
    return int((low - low.clamp_max(sinks)).sum())


@functools.lru_cache(maxsize=64)  # layers share them; what changes a table makes another
def _plain_table(sinks: int, start: int, tokens: int, device: torch.device) -> Tensor:
    t = torch.cat([torch.arange(min(sinks, tokens)), torch.arange(start, tokens)])
    return torch.stack([t, torch.zeros_like(t), t, torch.zeros_like(t)]).to(device)


@functools.cache
def _second_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


def _chosen(strands: list[Strand], k: Tensor, ready: torch.cuda.Event | None) -> tuple[Tensor, Tensor]:
    """Which of the keys of each strand are representatives, and each token's: both (strands, T)."""
    tau = torch.tensor([strand.own.tau for strand in strands], device=k.device)
    if ready is None:
        return select_each(unit(k[[strand.heads[0] for strand in strands]]), tau)
    here, beside = torch.cuda.current_stream(k.device), _second_stream(k.device)
    beside.wait_event(ready)
    with torch.cuda.stream(beside):
        found = _chosen(strands, k, None)
    here.wait_stream(beside)
    return found


def _read_kept(
    strands: list[Strand], q: Tensor, k: Tensor, v: Tensor, chosen: Tensor, owner: Tensor, scale: float, out: Tensor
) -> None:
    """What strands with representatives read, and hold then. chosen, owner: (strands, T)."""
    tokens, device, step, sinks = k.shape[1], k.device, attention.STEP, strands[0].sinks
    t, begins = torch.arange(tokens, device=device), torch.arange(0, tokens, step, device=device)
    windows = torch.tensor([[strand.window] for strand in strands], device=device)
    starts = torch.tensor([[_start(strand, tokens)] for strand in strands], device=device)
    low = (begins - windows).clamp_min_(0)
    kept = chosen | (t < sinks)
    before = F.pad(kept.cumsum(1), (1, 0))
    ends = before.gather(1, low)
    read = tokens * (tokens + 1) // 2 + ((ends - low) * (tokens - begins).clamp_max_(step)).sum(1, keepdim=True)
    counts, held, reads = torch.cat([before[:, -1:], before.gather(1, starts), read], 1).T.tolist()
    positions = kept.nonzero()[:, 1].split(counts)
    parts = [[_of(s, x, at) for x in (k, v)] for s, at in zip(strands, positions, strict=True)]
    keys, values = (torch.cat([x.flatten(0, 1) for x in every]) for every in zip(*parts, strict=True))
    first = before[:, -1:].cumsum(0) - before[:, -1:]
    column = (first + before[:, :-1]).gather(1, owner)  # of the bias of a token's representative
    leaves = ((t + windows) // step + 1).clamp_max_(len(begins))  # the step that no longer sees a token
    bias = torch.zeros(len(begins) + 1, sum(counts), device=device)
    bias.view(-1).scatter_add_(0, (leaves * sum(counts) + column).flatten(), (~kept).flatten().float())
    table = _heads(strands, counts, device)
    ends = ends.repeat_interleave(torch.tensor([len(s.heads) for s in strands], device=device), 0).to(torch.int32)
    lists = Kept(keys, values, ends, bias[:-1].cumsum_(0).log1p_())
    attend_windows(q, k, v, table, sinks, lists, scale, step, out)
    gone = torch.zeros_like(owner).scatter_add_(1, owner, (~kept & (t < starts)).long())
    for i, strand in enumerate(strands):
        strand.read, strand.pairs = len(strand.heads) * reads[i], len(strand.heads) * tokens * (tokens + 1) // 2
        at = torch.cat([positions[i][: held[i]], t[_start(strand, tokens) :]])
        strand.keys, strand.values = (_of(strand, x, at) for x in (k, v))
        strand.table = torch.stack([at, chosen[i, at].long(), owner[i, at], gone[i, at]])
        strand.seen = tokens


def _among_representatives(
    strand: PaperStrand, q: Tensor, k: Tensor, v: Tensor, states: Tensor, selection: Selection, scale: float
) -> Tensor:
    (heads, tokens, _), r = k.shape, selection.chosen.nonzero()[:, 0]
    strand.keys, strand.values, strand.states = k[:, r], v[:, r], states[r].to(k.dtype)
    strand.table = torch.stack([r, torch.ones_like(r), r, torch.zeros_like(r)])
    strand.read, strand.seen = heads * len(r) * (len(r) + 1) // 2, tokens
    strand.pairs = heads * tokens * (tokens + 1) // 2
    strand.outputs = dense(q[None, :, r], strand.keys[None], strand.values[None], scale)[0].transpose(0, 1)
    return strand.outputs[torch.searchsorted(r, selection.owner)]
