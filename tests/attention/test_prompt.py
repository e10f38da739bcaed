"""A whole text at once: kernels (in Triton's interpreter without a GPU) against strands; choice by its definition."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from rankgate.attention.prompt import attend_prompt
from rankgate.attention.select import Selection, _nearest, _nearest_by_kernel, select, select_each, unit
from rankgate.attention.strands import Heads, PaperStrand, Strand
from rankgate.ops import attention as module

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def alike(texts: int, tokens: int, width: int, seed: int = 0) -> Tensor:
    """Tokens that are each near to some others."""
    generator = torch.Generator().manual_seed(seed)
    kinds = torch.randn(texts, tokens // 4, width, generator=generator)
    which = torch.randint(0, tokens // 4, (tokens,), generator=generator)
    return (kinds[:, which] + 0.15 * torch.randn(texts, tokens, width, generator=generator)).to(DEVICE)


@pytest.mark.parametrize("tokens", [1, 130, 600])
def test_choice_by_kernels_is_its_definition(tokens: int, monkeypatch: pytest.MonkeyPatch):
    from rankgate.ops.gpu import select as kernels

    monkeypatch.setattr(kernels, "NARROW_CHUNK", 256)  # several chunks
    x, taus = unit(alike(3, max(tokens, 4), 24)[:, :tokens]), (0.0, 0.4, 1.0)
    chosen, owner = select_each(x, torch.tensor(taus, device=DEVICE))
    for own, tau, some, owners in zip(x.cpu(), taus, chosen.cpu(), owner.cpu(), strict=True):
        expected = select(own, tau)
        assert torch.equal(some, expected.chosen)
        assert torch.equal(owners, expected.owner)


def test_the_nearest_earlier_column():
    x = unit(alike(1, 300, 24))[0]
    rows, columns = torch.arange(7, 290, 2, device=DEVICE), torch.arange(0, 299, 5, device=DEVICE)
    likeness, column, dots = _nearest_by_kernel(x, rows, columns)
    best, place, _ = _nearest(x.cpu(), rows.cpu(), columns.cpu())
    torch.testing.assert_close(likeness.cpu(), best, atol=2e-3 if DEVICE == "cuda" else 5e-5, rtol=0)  # tf32
    assert torch.equal(column.cpu(), place)
    assert dots == sum(int((columns < row).sum()) for row in rows)
    nothing = _nearest_by_kernel(x, rows, columns[:0])
    assert (nothing[0] == -1).all()
    assert torch.equal(nothing[1], rows)


def held(strand: Strand) -> list[Tensor]:
    more = [strand.outputs] if isinstance(strand, PaperStrand) else []
    return [strand.keys, strand.values, strand.table, *([] if strand.states is None else [strand.states]), *more]


def same(ours: list[Strand], expected: list[Strand]) -> None:
    """They hold the same, and have counted the same."""
    for a, b in zip(ours, expected, strict=True):
        assert (int(a.read), a.pairs, a.seen) == (int(b.read), b.pairs, b.seen)
        for x, y in zip(held(a), held(b), strict=True):
            torch.testing.assert_close(x, y, rtol=1e-2 if DEVICE == "cuda" else 1e-5, atol=1e-5)


@pytest.mark.parametrize("tokens", [1, 50, 256, 300])
@pytest.mark.parametrize("share, width", [(1, 16), (2, 20)])
def test_windows_and_keys_of_each_head(share: int, width: int, tokens: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "STEP", 64)
    k = alike(5, max(tokens, 8), width)[:, :tokens]
    q, v = torch.randn(5 * share, tokens, width, device=DEVICE), torch.randn(5, tokens, 16, device=DEVICE)
    own = [Heads(None, None), Heads(64, None), Heads(70, 0.5), Heads(70, None), Heads(128, 0.4)]
    ours, expected = ([Strand([h], heads, 4) for h, heads in enumerate(own)] for _ in range(2))
    y = attend_prompt(ours, q, k, v, None, None, 0.3)
    chosen, owner = select_each(unit(k[[2, 4]]), torch.tensor([0.5, 0.4], device=DEVICE))  # on a GPU not in float32
    known = {2: Selection(chosen[0], owner[0], 0), 4: Selection(chosen[1], owner[1], 0)}
    for h, strand in enumerate(expected):
        z = strand.attend(q[strand.queries(share)], k[strand.heads], v[strand.heads], None, known.get(h), 0.3)
        tolerance = 1e-2 if DEVICE == "cuda" else 1e-5  # tf32
        torch.testing.assert_close(y[:, strand.queries(share)].transpose(0, 1), z, rtol=tolerance, atol=tolerance)
    same(ours, expected)


@pytest.mark.parametrize("kind", [Strand, PaperStrand])
def test_representatives_of_states(kind: type[Strand], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "STEP", 64)
    tokens, states = 200, unit(alike(1, 200, 32))[0]
    q, k, v = (torch.randn(heads, tokens, 16, device=DEVICE) for heads in (4, 2, 2))
    found = select(states, 0.5)
    ours, expected = (kind([0, 1], Heads(64, 0.5), 0 if kind is PaperStrand else 4) for _ in range(2))
    y = attend_prompt([ours], q, k, v, states, found, 0.3)
    z = expected.attend(q, k, v, states, found, 0.3)
    tolerance = 1e-2 if DEVICE == "cuda" else 1e-5
    torch.testing.assert_close(y.transpose(0, 1), z, rtol=tolerance, atol=tolerance)
    same([ours], [expected])
