"""Tiny models of the architectures that people run: for `architectures`."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, PreTrainedModel

VOCABULARY, WINDOW, LENGTH = 260, 8, 128
COMMON = {"vocab_size": VOCABULARY, "pad_token_id": 1, "bos_token_id": 2, "eos_token_id": 3}
LLAMA = {
    **COMMON,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": LENGTH,
}
ALL_HEADS = {**LLAMA, "num_key_value_heads": 4}
HEADS = {**LLAMA, "head_dim": 8}
OLDER = {**COMMON, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": LENGTH}
GEMMA = {**HEADS, "query_pre_attn_scalar": 8}
SLIDING = {"sliding_window": WINDOW}
MIXED = {**SLIDING, "layer_types": ["sliding_attention", "full_attention"]}
LOCAL = {"num_local_experts": 4, "num_experts_per_tok": 2}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
ROUTED = {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
GROUPED = {**ROUTED, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1}
LATENT = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}


def rope(kind: str, **more: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 1e4, **more}}


HALF = {"original_max_position_embeddings": LENGTH // 2}
FACTORS = {"long_factor": [2.0] * 4, "short_factor": [1.0] * 4}
BANDS = {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
BIOGPT = {key: value for key, value in LLAMA.items() if key not in {"num_key_value_heads"}}
OPT = {**COMMON, "hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
# by what is shown: the class of the configuration, and its settings
CONFIGURATIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "Llama": ("Llama", LLAMA),
    "Llama 3.1 (rope llama3)": ("Llama", {**LLAMA, **rope("llama3", factor=8.0, **BANDS, **HALF)}),
    "Llama, yarn": ("Llama", {**LLAMA, **rope("yarn", factor=4.0, **HALF)}),
    "Llama, linear rope": ("Llama", {**LLAMA, **rope("linear", factor=4.0)}),
    "Llama, dynamic rope": ("Llama", {**LLAMA, **rope("dynamic", factor=4.0)}),
    "Mistral, windows": ("Mistral", {**LLAMA, **SLIDING}),
    "Ministral 3": ("Ministral3", HEADS),
    "Qwen2": ("Qwen2", LLAMA),
    "Qwen2, windows": ("Qwen2", {**LLAMA, **SLIDING, "use_sliding_window": True, "max_window_layers": 1}),
    "Qwen3": ("Qwen3", HEADS),
    "Gemma": ("Gemma", HEADS),
    "Gemma 2": ("Gemma2", {**GEMMA, **MIXED}),
    "Gemma 3": ("Gemma3Text", {**GEMMA, **MIXED}),
    "Phi-2": ("Phi", LLAMA),
    "Phi-3, windows": ("Phi3", {**LLAMA, **SLIDING}),
    "Phi-3.5 (LongRoPE)": ("Phi3", {**LLAMA, **HALF, **rope("longrope", **FACTORS, **HALF)}),
    "GPT-2": ("GPT2", OLDER),
    "GPT-J": ("GPTJ", {**OLDER, "rotary_dim": 4}),
    "GPT-Neo": (
        "GPTNeo",
        {
            **COMMON,
            "hidden_size": 32,
            "num_layers": 2,
            "num_heads": 4,
            "attention_types": [[["global", "local"], 1]],
            "window_size": WINDOW,
            "max_position_embeddings": LENGTH,
        },
    ),
    "GPT-NeoX (Pythia)": ("GPTNeoX", BIOGPT),
    "GPT-BigCode": ("GPTBigCode", OLDER),
    "CodeGen": ("CodeGen", {**OLDER, "rotary_dim": 4}),
    "OPT": ("OPT", {**OPT, "word_embed_proj_dim": 32, "max_position_embeddings": LENGTH}),
    "Bloom (ALiBi)": ("Bloom", {**COMMON, "hidden_size": 32, "n_layer": 2, "n_head": 4}),
    "Falcon": ("Falcon", {**COMMON, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}),
    "MPT (ALiBi)": ("Mpt", {"vocab_size": VOCABULARY, "d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 128}),
    "XGLM": ("XGLM", {**COMMON, "d_model": 32, "ffn_dim": 48, "num_layers": 2, "attention_heads": 4}),
    "StableLM": ("StableLm", LLAMA),
    "StarCoder2": ("Starcoder2", {**LLAMA, **SLIDING}),
    "Command R": ("Cohere", LLAMA),
    "Command R7B": ("Cohere2", {**LLAMA, **MIXED}),
    "OLMo": ("Olmo", LLAMA),
    "OLMo 2": ("Olmo2", LLAMA),
    "OLMo 3": ("Olmo3", {**LLAMA, **MIXED}),
    "Granite": ("Granite", LLAMA),
    "SmolLM3": ("SmolLM3", LLAMA),
    "GLM": ("Glm", HEADS),
    "GLM-4": ("Glm4", HEADS),
    "Helium": ("Helium", HEADS),
    "Nemotron": ("Nemotron", HEADS),
    "EXAONE 4": ("Exaone4", {**LLAMA, **MIXED}),
    "ERNIE 4.5": ("Ernie4_5", HEADS),
    "Seed-OSS": ("SeedOss", HEADS),
    "Hunyuan": ("HunYuanDenseV1", HEADS),
    "BioGPT": ("BioGpt", BIOGPT),
    "Persimmon": ("Persimmon", BIOGPT),
    "Mixtral": ("Mixtral", {**LLAMA, **LOCAL}),
    "Qwen2-MoE": ("Qwen2Moe", {**LLAMA, **EXPERTS, "shared_expert_intermediate_size": 48}),
    "Qwen3-MoE": ("Qwen3Moe", {**HEADS, **EXPERTS}),
    "OLMoE": ("Olmoe", {**LLAMA, "num_experts": 4, "num_experts_per_tok": 2}),
    "gpt-oss (sinks)": ("GptOss", {**HEADS, **LOCAL, **MIXED}),
    "Granite MoE": ("GraniteMoe", {**LLAMA, **LOCAL}),
    "Phi-3.5-MoE": ("Phimoe", {**LLAMA, **LOCAL}),
    "GLM-4.5": ("Glm4Moe", {**HEADS, **GROUPED}),
    "ERNIE 4.5 MoE": ("Ernie4_5_Moe", {**HEADS, "moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 24}),
    "DeepSeek V2": ("DeepseekV2", {**ALL_HEADS, **GROUPED, **LATENT, "topk_method": "greedy"}),
    "DeepSeek V3": ("DeepseekV3", {**ALL_HEADS, **GROUPED, **LATENT}),
    "Mamba": ("Mamba", {**COMMON, "hidden_size": 32, "state_size": 4, "num_hidden_layers": 2, "time_step_rank": 4}),
}


def tiny(name: str) -> PreTrainedModel:
    """Random weights, large enough that every layer matters; float32."""
    torch.manual_seed(0)
    kind, settings = CONFIGURATIONS[name]
    model: PreTrainedModel = AutoModelForCausalLM.from_config(getattr(transformers, f"{kind}Config")(**settings))
    with torch.no_grad():
        for leaf, weight in model.named_parameters():
            if "norm" not in leaf and not leaf.endswith("A_log"):
                weight.add_(0.1 * torch.randn(weight.shape))
    return model.eval()
