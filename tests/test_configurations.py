"""Many architectures, of random sizes, through everything that can happen to a converted model.

Whatever is done to it gives the same logits, or is refused in one line: never other numbers, never another exception.
"""

import copy
import pickle
import random
import warnings

import accelerate
import pytest
import torch
import transformers
from conftest import tokens
from transformers import AutoModelForCausalLM

from rankgate import RankgateConfig, RankgateError, calibrate, convert_
from rankgate.conversion.convert import converted_layers
from rankgate.methods import METHODS

METHOD_SETTINGS = {"int8": {}, "lrq": {"rank": 8, "rounds": 1, "refine": 0.1}}
ROUNDING = 0.3  # of the logits, that a method may move them by; a layer that is wrong moves them further


def sizes(name):
    """Random sizes that suit an architecture, under the names of Llama and of GPT-2; always the same for a name."""
    pick = random.Random(name).choice
    heads, width = pick([2, 4]), pick([8, 12, 16])
    return {
        **{"vocab_size": pick([97, 128, 250]), "pad_token_id": 1, "bos_token_id": 2, "eos_token_id": 3},
        **{"num_attention_heads": heads, "num_key_value_heads": pick([1, 2]), "hidden_size": heads * width},
        **{"intermediate_size": pick([40, 96, 130]), "num_hidden_layers": 2, "max_position_embeddings": 64},
        "tie_word_embeddings": pick([True, False]),
    }


def older(name):
    """The same under the names of GPT-2."""
    common = sizes(name)
    kept = {key: common[key] for key in ("vocab_size", "pad_token_id", "bos_token_id", "eos_token_id")}
    heads = common["num_attention_heads"]
    return {**kept, "n_embd": common["hidden_size"], "n_layer": 2, "n_head": heads, "rotary_dim": 4}


PLAIN = (
    *(
        "Llama",
        "Qwen2",
        "Gemma",
        "Cohere",
        "Granite",
        "Olmo",
        "Olmo2",
        "StableLm",
        "Starcoder2",
        "Nemotron",
        "Persimmon",
    ),
    *("Phi", "SmolLM3", "Apertus", "Arcee", "Ernie4_5", "BitNet", "Exaone4", "GPTNeoX", "BioGpt"),
)
OLDER = "GPT2", "GPTJ", "GPTBigCode", "Bloom"
WINDOWS = {"head_dim": 12, "query_pre_attn_scalar": 12, "sliding_window": 8}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 24, "intermediate_size": 96}
ARCHITECTURES = {
    **{name: sizes(name) for name in PLAIN},
    **{name: older(name) for name in OLDER},
    "CodeGen": {**older("CodeGen"), "n_head": 4},
    **{name: {**sizes(name), "head_dim": 12} for name in ("Qwen3", "Glm", "Glm4", "SeedOss")},
    **{name: {**sizes(name), "sliding_window": 8} for name in ("Mistral", "Cohere2")},
    **{name: {**sizes(name), **WINDOWS} for name in ("Gemma2", "Gemma3Text")},
    **{name: {**sizes(name), "num_local_experts": 4, **EXPERTS} for name in ("Mixtral", "GraniteMoe")},
    "GptOss": {**sizes("GptOss"), "num_local_experts": 4, "head_dim": 16, "sliding_window": 16, **EXPERTS},
    "Olmoe": {**sizes("Olmoe"), "num_experts": 4, **EXPERTS},
    "Qwen2Moe": {**sizes("Qwen2Moe"), "num_experts": 4, "shared_expert_intermediate_size": 32, **EXPERTS},
    "Phi3": {**sizes("Phi3"), "original_max_position_embeddings": 64},
    "Falcon": {**sizes("Falcon"), "new_decoder_architecture": False},
    "Lfm2": sizes("Lfm2"),
    "OPT": {**sizes("OPT"), "ffn_dim": 72, "word_embed_proj_dim": 20},
    "Mamba": {**sizes("Mamba"), "state_size": 8},
}


def dense_model(name):
    """Random weights, larger than those that a model begins its training with: every layer matters."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**ARCHITECTURES[name])
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for leaf, weight in model.named_parameters():
            if weight.dim() > 1 and not leaf.endswith("A_log"):
                weight.add_(0.05 * torch.randn(weight.shape))
    return model


def windows(model):
    return tokens(8, 32, seed=1) % (model.config.vocab_size - 4) + 4


def logits(model):
    """Of a prompt, and of one token, which kernels read in another way."""
    ids = tokens(1, 12) % (model.config.vocab_size - 4) + 4
    with torch.no_grad():
        return torch.cat([model(input_ids=part).logits[0].float() for part in (ids, ids[:, :1])])


def off(expected, got):
    return float((got - expected).norm() / expected.norm())


def saved_and_loaded(model, folder):
    model.save_pretrained(folder)
    return AutoModelForCausalLM.from_pretrained(folder)


def assigned(model, _):
    model.load_state_dict({name: value.clone() for name, value in model.state_dict().items()}, assign=True)
    return model


def offloaded(model, _):
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    return model


EVENTS = {
    "saved": saved_and_loaded,
    "cast": lambda model, _: model.to(torch.bfloat16),
    "moved": lambda model, _: model.share_memory(),
    "assigned": assigned,
    "copied": lambda model, _: copy.deepcopy(model),
    "pickled": lambda model, _: pickle.loads(pickle.dumps(model)),
    "offloaded": offloaded,
}


def converted(way, method, folder):
    settings = METHOD_SETTINGS[method]
    if way == "loading":
        dense = AutoModelForCausalLM.from_pretrained(folder)
        config = RankgateConfig(method, windows=windows(dense), **settings)
        return AutoModelForCausalLM.from_pretrained(folder, quantization_config=config)
    model, chosen = AutoModelForCausalLM.from_pretrained(folder), METHODS[method](**settings)
    convert_(model, chosen, calibrate(model, windows(model), sensitivity=True) if chosen.needs_stats else None)
    return model


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_same_logits_or_refused(name, tmp_path):
    warnings.simplefilter("ignore")  # of what peft and accelerate do not know
    dense = dense_model(name)
    exact = logits(dense)
    cast = off(exact, logits(copy.deepcopy(dense).to(torch.bfloat16)))
    dense.save_pretrained(tmp_path / "dense")
    for method in METHOD_SETTINGS:
        answers = {}
        for way in ("loading", "in memory"):
            model = converted(way, method, tmp_path / "dense")
            assert list(converted_layers(model))
            answers[way] = expected = logits(model)
            assert off(exact, expected) < ROUNDING
            for event, happens in EVENTS.items():
                allowed = 0.05 + 4 * cast if event == "cast" else 1e-5
                try:
                    error = off(expected, logits(happens(copy.deepcopy(model), tmp_path / f"{method} {way}")))
                except RankgateError as refusal:
                    assert event == "offloaded" and "\n" not in str(refusal)
                    continue
                assert error < allowed, (method, way, event, error)
        assert off(*answers.values()) < 0.02  # calibration may round where products are added up in another order
