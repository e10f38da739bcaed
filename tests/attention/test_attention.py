"""Token selection: its rules by their definitions, attention to few keys by its exact limits."""

from __future__ import annotations

import math

import pytest
import torch
import transformers
from conftest import LLAMA, calibrated, tiny_model, tokens
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from rankgate.attention import select as module
from rankgate.attention import strands
from rankgate.attention.attend import AttentionConfig, select_tokens_
from rankgate.attention.cache import SelectiveCache
from rankgate.attention.heads import try_heads
from rankgate.attention.select import Selection, cascade, causal_dots, extend, inherit, select, unit
from rankgate.attention.strands import Heads
from rankgate.conversion.convert import convert_
from rankgate.errors import RankgateError
from rankgate.methods import LRQConfig
from rankgate.ops import attention as windows

MODELS = ("llama", "qwen2", "gpt2", "opt")
PAPER, WINDOWED = AttentionConfig("paper", 0.9), AttentionConfig("windowed", 0.9, window=5, sinks=2)


@pytest.fixture(autouse=True)
def windows_move_often(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(windows, "STEP", 4)


def states(count: int = 70, width: int = 6, seed: int = 0) -> Tensor:
    return unit(torch.randn(count, width, generator=torch.Generator().manual_seed(seed)))


def by_definition(x: Tensor, tau: float, rule: str) -> list[bool]:
    """One token after the other."""
    chosen: list[bool] = []
    for t in range(len(x)):
        others = [s for s in range(t) if rule == "earlier" or chosen[s]]
        chosen.append(all(float(x[t] @ x[s]) <= 1 - tau**2 for s in others))
    return chosen


@pytest.mark.parametrize("block", [1, 8, 512])
@pytest.mark.parametrize("rule", ["earlier", "greedy"])
def test_rules_are_their_definitions(rule, block: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "BLOCK", block)
    x = states()
    for tau in (0.0, 0.3, 0.6, 0.8):
        found = select(x, tau, rule)
        assert found.chosen.tolist() == by_definition(x, tau, rule)
        representatives = found.chosen.nonzero()[:, 0]
        for t in (~found.chosen).nonzero()[:, 0].tolist():
            earlier = representatives[representatives < t]
            assert found.owner[t] == earlier[(x[earlier] @ x[t]).argmax()]
        assert torch.equal(found.owner[representatives], representatives)


@pytest.mark.parametrize("rule", ["earlier", "greedy"])
def test_limits_of_tau(rule):
    x = torch.cat([states(), states()])  # every one of them twice
    assert select(x, 0.0, rule).chosen.all()
    assert select(x.abs(), 1.0, rule).chosen.sum() == 1


def test_a_cascade_over_the_same_states_changes_nothing():
    first = select(states(), 0.6)
    second = cascade(states(), 0.6, first)
    assert torch.equal(first.chosen, second.chosen)
    assert torch.equal(first.owner, second.owner)
    assert (second.added, second.removed, second.same_as(first)) == (0, 0, 1.0)
    assert second.dots < first.dots


def test_a_cascade_leaves_every_token_represented_and_no_representative_near_an_earlier_one_that_was_inherited():
    before, x = select(states(seed=1), 0.7), states(seed=2)
    after = cascade(x, 0.7, before)
    others = (~after.chosen).nonzero()[:, 0]
    assert ((x[others] * x[after.owner[others]]).sum(1) > 1 - 0.7**2).all()
    kept = (after.chosen & before.chosen).nonzero()[:, 0]
    assert ((x[kept] @ x[kept].T).tril(-1) <= 1 - 0.7**2).all()
    assert after.added > 0
    assert after.removed > 0
    assert after.chosen.sum() == before.chosen.sum() + after.added - after.removed


def test_cosines_are_counted(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "BLOCK", 1)
    assert select(states(9), 0.5, "earlier").dots == causal_dots(9) == 36
    assert select(states(9).abs(), 1.0).dots == 8 + 9  # with the one representative, and each with itself
    assert inherit(select(states(9), 0.5)).dots == 0


def test_later_tokens_are_compared_with_the_representatives_before_them():
    x = states()
    whole = select(x, 0.6)
    before = whole.chosen[:40].nonzero()[:, 0]
    chosen, owner = extend(x[40:], 0.6, x[before])
    assert torch.equal(chosen, whole.chosen[40:])
    assert torch.equal(torch.cat([before, torch.arange(40, 70)])[owner], whole.owner[40:])


@pytest.mark.parametrize("architecture", MODELS)
@pytest.mark.parametrize(
    "config",
    [
        AttentionConfig("windowed", 0.0, window=1, sinks=0),
        AttentionConfig("windowed", 1.0, window=40),
        AttentionConfig("paper", 0.0),
        AttentionConfig("windowed", 0.0, window=3, cascade=True),
        AttentionConfig(heads=tuple((Heads(None, None),) * 4 for _ in "ab")),
    ],
    ids=str,
)
def test_nothing_left_out_is_dense_attention(architecture: str, config: AttentionConfig):
    model, ids, mask = tiny_model(architecture), tokens(2, 40), torch.ones(2, 40, dtype=torch.long)
    if config.heads is not None and architecture in ("llama", "qwen2"):
        config = AttentionConfig(heads=tuple(row[:2] for row in config.heads))
    mask[0, :7] = 0
    with torch.no_grad():
        dense = model(ids, attention_mask=mask).logits
        with select_tokens_(model, config) as selection:
            few = model(ids, attention_mask=mask).logits
        again = model(ids, attention_mask=mask).logits
    torch.testing.assert_close(few[mask.bool()], dense[mask.bool()], rtol=1e-4, atol=1e-4)
    assert torch.equal(again, dense)
    assert selection.share == 1


def windowed_by_definition(q: Tensor, k: Tensor, v: Tensor, chosen: Tensor, owner: Tensor, window: int, sinks: int):
    """One query after the other, of one head."""
    out = []
    for t in range(len(q)):
        near = [s for s in range(t + 1) if s >= t // 4 * 4 - window or s < sinks or chosen[s]]
        own = [1 + sum(int(owner[u]) == s and u not in near for u in range(t + 1)) if chosen[s] else 1 for s in near]
        logits = k[near] @ q[t] / math.sqrt(q.shape[1]) + torch.tensor(own).log()
        out.append(logits.softmax(0) @ v[near])
    return torch.stack(out)


@pytest.mark.parametrize("pieces", [(30,), (1,) * 30, (3, 1, 17, 9)])
@pytest.mark.parametrize("tau", [0.7, None])
def test_windowed_attention_is_its_definition(tau: float | None, pieces: tuple[int, ...]):
    q, k, v = (torch.randn(1, 30, 8, generator=torch.Generator().manual_seed(i)) for i in range(3))
    none = Selection(torch.zeros(30, dtype=torch.bool), torch.arange(30), 0)
    found = none if tau is None else select(unit(k[0]), tau)
    expected = windowed_by_definition(q[0], k[0], v[0], found.chosen, found.owner, 4, 2)
    strand, known = (strands.Strand([0], Heads(4, tau), 2) for _ in range(2))
    split = zip(*(x.split(list(pieces), 1) for x in (q, k, v)), strict=True)
    torch.testing.assert_close(torch.cat([strand.attend(*new, None, None, 8**-0.5)[0] for new in split]), expected)
    assert strand.keys.shape[1] == strand.table.shape[1] < 30
    torch.testing.assert_close(known.attend(q, k, v, unit(k[0]), found, 8**-0.5)[0], expected)


@pytest.mark.parametrize("own", [Heads(4, None), Heads(None, None)])
def test_heads_that_read_alike_read_together(own: Heads):
    q, k, v = (torch.randn(heads, 30, 8, generator=torch.Generator().manual_seed(heads)) for heads in (6, 3, 3))
    together = strands.Strand([0, 2], own, 2)
    for begin, end in ((0, 13), (13, 14), (14, 30)):
        new = q[together.queries(2), begin:end], k[together.heads, begin:end], v[together.heads, begin:end]
        got = together.attend(*new, None, None, 0.3)
        for i, head in enumerate(together.heads):
            alone = strands.Strand([head], own, 2)
            y = alone.attend(q[alone.queries(2), :end], k[[head], :end], v[[head], :end], None, None, 0.3)
            torch.testing.assert_close(got[2 * i : 2 * i + 2], y[:, begin:end])


def test_the_paper_rule_is_its_definition():
    q, k, v, x = (torch.randn(1, 30, 8, generator=torch.Generator().manual_seed(i)) for i in range(4))
    found = select(unit(x[0]), 0.8)
    r = found.chosen.nonzero()[:, 0]
    logits = (q[0, r] @ k[0, r].T / 8**0.5).masked_fill(torch.ones(len(r), len(r)).triu(1).bool(), -torch.inf)
    outputs = torch.zeros(30, 8)
    outputs[r] = logits.softmax(1) @ v[0, r]
    strand = strands.PaperStrand([0], Heads(1, 0.8), 0)
    y = strand.attend(q, k, v, unit(x[0]), found, 8**-0.5)
    torch.testing.assert_close(y[0], outputs[found.owner])
    assert strand.keys.shape[1] == len(r) < 30


def predictions(model: PreTrainedModel, ids: Tensor, pieces: tuple[int, ...]) -> tuple[Tensor, SelectiveCache]:
    cache, out = None, []
    for piece in ids.split(list(pieces), 1):
        result = model(piece, past_key_values=cache, use_cache=True)
        cache = result.past_key_values
        out.append(result.logits)
    assert isinstance(cache, SelectiveCache)
    return torch.cat(out, 1), cache


@pytest.mark.parametrize("architecture", MODELS)
@pytest.mark.parametrize("config", [PAPER, WINDOWED], ids=["paper", "windowed"])
def test_a_text_in_pieces_is_the_text_as_a_whole(architecture: str, config: AttentionConfig):
    model, ids = tiny_model(architecture), tokens(1, 40)
    with torch.no_grad(), select_tokens_(model, config):
        whole = model(ids, use_cache=False).logits
        once, few = predictions(model, ids, (40,))
        pieces, cache = predictions(model, ids, (20, 1, 1, 1, 10, 1, 6))
    torch.testing.assert_close(once, whole)
    torch.testing.assert_close(pieces, whole, rtol=1e-4, atol=1e-4)
    assert cache.get_seq_length() == few.get_seq_length() == 40
    assert cache.nbytes == few.nbytes
    assert all(len(strand.table[0]) < 40 for layer in cache.layers for strand in layer.strands[0])


@pytest.mark.parametrize("config", [PAPER, WINDOWED], ids=["paper", "windowed"])
def test_padding_and_neighbours_change_nothing(config: AttentionConfig):
    model, ids = tiny_model("llama"), tokens(2, 30)
    mask = torch.ones(2, 30, dtype=torch.long)
    mask[0, :9] = 0
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 1, "eos_token_id": None}
    with torch.no_grad(), select_tokens_(model, config):
        together = model.generate(ids, attention_mask=mask, **options)
        for row, start in enumerate((9, 0)):
            alone = model.generate(ids[row : row + 1, start:], **options)
            assert torch.equal(together[row, start:], alone[0])


def test_beams():
    model, ids = tiny_model("llama"), tokens(1, 30)
    options = {"max_new_tokens": 8, "num_beams": 3, "do_sample": False, "pad_token_id": 1}
    expected = model.generate(ids, **options)
    with select_tokens_(model, AttentionConfig("windowed", 0.0, window=3)):
        assert torch.equal(model.generate(ids, **options), expected)
    with select_tokens_(model, WINDOWED):
        assert model.generate(ids, **options).shape == expected.shape


def test_a_converted_model_attends_to_selected_tokens_as_well():
    model, ids = tiny_model("llama"), tokens(1, 40)
    convert_(model, LRQConfig(rank=8, rounds=1), calibrated(model, sensitivity=True))
    with torch.no_grad():
        converted = model(ids).logits
        with select_tokens_(model, AttentionConfig("windowed", 0.0)):  # x is rounded to 14 bits
            torch.testing.assert_close(model(ids).logits, converted, rtol=1e-3, atol=1e-3)
        with select_tokens_(model, WINDOWED):
            assert not torch.allclose(model(ids).logits, converted, rtol=1e-2, atol=1e-2)


def test_inheritance_skips_layers():
    model, ids = tiny_model("llama"), tokens(1, 40)
    with torch.no_grad(), select_tokens_(model, AttentionConfig(tau=0.6, cascade=True, stride=2)) as selection:
        model(ids)
        first, second = (layer[0] for layer in selection.selections)
    assert isinstance(first, Selection)
    assert second.dots == 0
    assert torch.equal(first.chosen, second.chosen)


def test_what_cannot_be_done_is_refused():
    model = tiny_model("llama")
    for options in ({"rule": "neither"}, {"tau": 2.0}, {"window": 0}, {"stride": 0}, {"cascade": True, "heads": ()}):
        with pytest.raises(RankgateError):
            AttentionConfig(**options)  # type: ignore[arg-type]
    with pytest.raises(RankgateError, match="registry"):
        select_tokens_(tiny_model("gptj"), WINDOWED)
    with pytest.raises(RankgateError, match="registry"):
        select_tokens_(tiny_model("mamba"), WINDOWED)
    with pytest.raises(RankgateError, match="layers"):
        select_tokens_(model, AttentionConfig(heads=()))
    past = model(tokens(1, 5), use_cache=True).past_key_values
    with select_tokens_(model, WINDOWED):
        with pytest.raises(RankgateError, match="already"):
            select_tokens_(model, WINDOWED)
        with pytest.raises(RankgateError, match="past"):
            model(tokens(1, 1), past_key_values=past)
        with pytest.raises(RankgateError, match="mask"):
            model(tokens(1, 5), attention_mask=torch.zeros(1, 1, 5, 5))
        cache = model(tokens(2, 5), use_cache=True).past_key_values
        with pytest.raises(RankgateError, match="sequences"):
            model(tokens(1, 1), past_key_values=cache)
        with pytest.raises(RankgateError, match="cut back"):
            cache.crop(2)


def test_heads_are_chosen_by_what_they_cost():
    model, windows = tiny_model("llama"), tokens(2, 100)
    costs = try_heads(model, windows)
    assert costs.plan(1.0).loss == pytest.approx(0, abs=1e-9)
    plans = [costs.plan(share) for share in (0.96, 0.92)]
    assert 0 < plans[0].loss < plans[1].loss
    plain = costs.plan(0.92, representatives=False)
    assert all(own.tau is None for row in plain.heads for own in row)
    assert plans[1].loss <= plain.loss
    assert all(plan.share <= share for plan, share in zip(plans, (0.96, 0.92), strict=True))
    with torch.no_grad(), select_tokens_(model, AttentionConfig(heads=plans[1].heads)) as selection:
        for window in windows:
            model(window[None])
    assert selection.share == pytest.approx(plans[1].share, abs=1e-6)
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    with pytest.raises(RankgateError, match="share"):
        costs.plan(0.0)
    with pytest.raises(RankgateError, match="more"):
        costs.plan(0.01)


@pytest.mark.parametrize("what", ["Mistral", "Gemma2", "GptOss"])
def test_attention_that_is_more_than_causal_is_refused(what):
    """Windows, soft caps, learned sinks would be left out."""
    more = {
        "Mistral": {"sliding_window": 8},
        "Gemma2": {"head_dim": 8, "layer_types": ["full_attention"] * 2, "attn_logit_softcapping": 1.0},
        "GptOss": {"head_dim": 8, "num_local_experts": 2, "num_experts_per_tok": 1},
    }[what]
    config = getattr(transformers, f"{what}Config")(**LLAMA, **more)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with select_tokens_(model, AttentionConfig()), pytest.raises(RankgateError, match="would leave"):
        model(tokens(1, 12))
    with pytest.raises(RankgateError, match="would leave"):
        try_heads(model, tokens(1, 96))
