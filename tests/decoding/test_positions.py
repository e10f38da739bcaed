"""Positions that are scaled anew when a text gets long: captured up to there, and left to the model beyond."""

import functools
import math

import pytest
import torch
import transformers
from conftest import LLAMA, tiny_model, tokens
from test_batch import together, write
from test_decode import both, captured
from transformers import AutoModelForCausalLM

from rankgate.decoding.batch import Batch
from rankgate.decoding.positions import scaled_from

pytestmark = pytest.mark.filterwarnings("ignore:.*without the fast path")
LONG = {"rope_type": "longrope", "rope_theta": 1e4, "long_factor": [4.0] * 4, "short_factor": [1.0] * 4}
MODELS = {
    "Llama": {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}},
    "Phi3": {"rope_parameters": {**LONG, "original_max_position_embeddings": 64}},
}
LIMIT = 64


def model_of(name):
    torch.manual_seed(0)
    own = {
        "max_position_embeddings": LIMIT if name == "Llama" else 4 * LIMIT,
        "original_max_position_embeddings": LIMIT,
    }
    config = getattr(transformers, f"{name}Config")(**{**LLAMA, **own, **MODELS[name]})
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for leaf, weight in model.named_parameters():
            if "norm" not in leaf:
                weight.add_(torch.randn(weight.shape) * 0.1)
    return model


@pytest.mark.parametrize("name", MODELS)
def test_a_text_within_the_first_length_is_captured(name):
    model = model_of(name)
    assert scaled_from(model) == LIMIT
    for length, new in ((LIMIT - 20, 20), (3, 30), (LIMIT - 5, 30), (9, 12)):
        with pytest.warns(UserWarning, match="scaled anew") if length + new > LIMIT else torch.no_grad():
            expected, got = both(model, tokens(1, length), max_new_tokens=new, min_new_tokens=new)
        assert torch.equal(expected, got)
    assert captured(model)


@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_other_positions_are_never_scaled(name):
    assert scaled_from(tiny_model(name)) == math.inf


def test_types_by_layer_in_a_batch():
    """Gemma 3 has positions of another kind in each kind of layer."""
    layers = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 4, "head_dim": 8}
    model = AutoModelForCausalLM.from_config(transformers.Gemma3TextConfig(**{**LLAMA, **layers})).eval()
    calls = [functools.partial(write, model, tokens(1, n, seed=n), 12) for n in (3, 11)]
    alone = [call() for call in calls]
    for got, expected in zip(together(Batch(2), calls), alone, strict=True):
        assert torch.equal(got, expected)
    assert captured(model)


def test_a_model_that_prepares_its_arguments_in_another_way_is_refused():
    model = model_of("Llama")

    class Other(type(model)):
        def prepare_inputs_for_generation(self, *args, **kwargs):
            prepared = super().prepare_inputs_for_generation(*args, **kwargs)
            return {**prepared, "position_ids": torch.zeros_like(prepared["input_ids"])}

    model.__class__ = Other
    with pytest.warns(UserWarning, match="its own preparation"):
        both(model, tokens(1, 9))
