import math

import pytest
import torch
from conftest import calibrated, tiny_model, tokens
from torch.nn import functional as F

from rankgate.common.copies import twin
from rankgate.conversion.convert import convert_
from rankgate.conversion.evaluation import compare_text, continuations, evaluate, first_difference
from rankgate.errors import RankgateError
from rankgate.methods import ASVDConfig, GSIConfig


def converted(method):
    dense = tiny_model("llama")
    model = twin(dense)
    convert_(model, method, calibrated(dense))
    return dense, model


def test_dense_against_itself_costs_nothing():
    dense = tiny_model("llama")
    result = evaluate(dense, dense, tokens(3, 20))
    assert result.ppl_ratio == 1 and result.top1 == 1 and result.kl_max == 0
    assert result.fire_rate is None and result.reads.speedup == 1
    assert (result.tokens, result.scored, result.context) == (60, 57, 20)


def test_figures_equal_the_definition():
    dense, model = converted(ASVDConfig(rank=6))
    windows = tokens(3, 20)
    result = evaluate(dense, model, windows, batch_size=2)
    with torch.no_grad():
        p, q = (m(input_ids=windows).logits[:, :-1].double() for m in (dense, model))
    target = windows[:, 1:].flatten()
    assert result.loss_dense == pytest.approx(F.cross_entropy(p.flatten(0, 1), target).item(), rel=1e-5)
    assert result.ppl == pytest.approx(math.exp(F.cross_entropy(q.flatten(0, 1), target).item()), rel=1e-5)
    kl = (p.softmax(-1) * (p.log_softmax(-1) - q.log_softmax(-1))).sum(-1)
    assert result.kl_mean == pytest.approx(kl.mean().item(), rel=1e-3)
    assert result.kl_max == pytest.approx(kl.max().item(), rel=1e-3)
    assert result.top1 == pytest.approx((p.argmax(-1) == q.argmax(-1)).double().mean().item())


def test_fire_rates_are_those_of_decoding_token_by_token():
    dense, model = converted(GSIConfig(rank=0.25, eps=0.6))
    windows = tokens(2, 20)
    result = evaluate(dense, model, windows)
    assert len(result.fire_rates) == 8
    fired = dict.fromkeys(result.fire_rates, 0)
    handles = [
        model.get_submodule(name).group.subspace.register_forward_hook(
            lambda _, args, seen, name=name: fired.update({name: fired[name] + int(seen.fire.sum())})
        )
        for name in fired
    ]
    for row in windows:
        cache = None
        for token in row:
            with torch.no_grad():
                cache = model(input_ids=token.view(1, 1), past_key_values=cache, use_cache=True).past_key_values
    for handle in handles:
        handle.remove()
    assert {name: count / 40 for name, count in fired.items()} == pytest.approx(result.fire_rates)
    assert 0 < result.fire_rate < 1


def test_non_finite_logits_raise():
    dense, model = converted(ASVDConfig(rank=6))
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.group.A.fill_(float("nan"))
    with pytest.raises(RankgateError, match="converted model gives non-finite"):
        evaluate(dense, model, tokens(1, 10))


def test_texts_are_compared_by_character(tokenizer):
    assert first_difference("abc", "abc") is None
    assert [first_difference("abc", other) for other in ("abd", "ab", "abcd", "xbc", "")] == [2, 2, 3, 0, 0]
    dense, model = converted(ASVDConfig(rank=2))
    texts = [continuations(each, tokenizer, tokens(3, 8), new_tokens=6) for each in (dense, dense, model)]
    same = compare_text(["a", "b", "c"], texts[0], texts[1])
    assert same.identical == 1 and same.first_difference == [None] * 3
    assert compare_text(same.prompts, texts[0], texts[2]).identical < 1
    assert compare_text(["p", "q"], ["one", "two"], ["one", "ten"]).identical == 0.5
