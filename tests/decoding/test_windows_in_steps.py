"""Layers with windows, soft caps and sinks in captured steps: the same tokens and logits as the model's own."""

import pytest
import torch
import transformers
from conftest import VOCAB, tokens
from test_decode import both, captured
from transformers import AutoModelForCausalLM

from rankgate.attention.registry import is_window
from rankgate.conversion.convert import convert_
from rankgate.methods import Int8Config
from rankgate.ops.attention import attend_reference
from rankgate.ops.cpu.attention import attend

SIZES = {"vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 1}
WINDOW = {"sliding_window": 4}
MODELS = {
    "Mistral": WINDOW,
    "Starcoder2": WINDOW,
    "Qwen2": {**WINDOW, "use_sliding_window": True, "max_window_layers": 2},
    "Gemma3Text": {**WINDOW, "head_dim": 8, "layer_types": ["sliding_attention", "full_attention"] * 2},
    "Gemma2": {**WINDOW, "head_dim": 8, "query_pre_attn_scalar": 8, "attn_logit_softcapping": 2.0},
    "GptOss": {**WINDOW, "head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2},
    "Cohere2": {**WINDOW, "layer_types": ["sliding_attention", "full_attention"] * 2},
}


@pytest.mark.parametrize("converted", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_same_tokens_as_generate(name, converted):
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**SIZES, **HEADS, **MODELS[name])
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for leaf, weight in model.named_parameters():
            if "norm" not in leaf:
                weight.add_(torch.randn(weight.shape) * 0.1)
    if converted:
        convert_(model, Int8Config())
    for length in (1, 9):  # shorter and longer than a window
        expected, got = both(model, tokens(1, length, seed=length), max_new_tokens=16, min_new_tokens=16)
        assert torch.equal(expected, got)
    assert captured(model)


@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize("cap", [0.0, 1.5])
@pytest.mark.parametrize("window", [0, 1, 3, 50])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_by_a_rule(window, cap, learned, dtype):
    torch.manual_seed(1)
    at, capacity, width = 17, 32, 8
    q, k, v = (torch.randn(1, heads, 1, width).to(dtype) for heads in (4, 2, 2))
    keys, values = (torch.randn(1, 2, capacity, width).to(dtype) for _ in range(2))
    position, sinks = torch.tensor([[at]]), torch.randn(4) * 3 if learned else None
    got = attend(q, k, v, keys.clone(), values.clone(), position, 0.3, window, cap, sinks)
    wide = (t.double() for t in (q, k, v, keys, values))
    expected = attend_reference(*wide, position, 0.3, window, cap, sinks)
    steps = torch.finfo(dtype).eps * 4 * float(values.abs().max())
    assert (got.double() - expected).abs().max() < steps
    first = at + 1 - window if 0 < window <= at else 0  # by hand
    keys[:, :, at], values[:, :, at] = k[:, :, 0], v[:, :, 0]
    for head in range(4):
        scores = 0.3 * (keys[0, head // 2, first : at + 1].double() @ q[0, head, 0].double())
        weights = (cap * (scores / cap).tanh() if cap else scores).exp()
        total = weights.sum() + (0 if sinks is None else sinks[head].double().exp())
        by_hand = weights @ values[0, head // 2, first : at + 1].double() / total
        assert (expected[0, 0, head] - by_hand).abs().max() < 1e-6


def test_a_window_is_recognised_by_what_it_lets_through():
    sliding = transformers.masking_utils.sliding_window_causal_mask_function(4)
    assert is_window(sliding, 4) and not is_window(sliding, 5)
    assert not is_window(transformers.masking_utils.causal_mask_function, 4)
    assert not is_window(lambda b, h, q, kv: sliding(b, h, q, kv) | (kv == 0), 4)
