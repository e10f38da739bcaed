"""The same Llama in another basis: a control for weights that have been quantised before."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel


@torch.no_grad()
def rotate_(model: PreTrainedModel, seed: int) -> None:
    """Rotate the residual stream of a Llama-like model by a random orthogonal matrix R, in place.

    RMSNorm commutes with a rotation once its gain is folded into the linears that follow, so
    W ← W diag(gain) R for what reads the stream and W ← Rᵀ W for what writes to it leaves every output as it was.
    Embedding and output embedding are untied.
    """
    stack, width = model.model, model.config.hidden_size
    generator = torch.Generator().manual_seed(seed)
    R = torch.linalg.qr(torch.randn(width, width, generator=generator, dtype=torch.float64))[0].to(model.device)

    def into(linear: nn.Linear, norm: nn.Module) -> None:
        linear.weight = fresh(linear.weight.double() * norm.weight.double() @ R, linear.weight)

    def out_of(linear: nn.Linear) -> None:
        linear.weight = fresh(R.T @ linear.weight.double(), linear.weight)

    model.lm_head.weight = fresh(model.lm_head.weight.double() * stack.norm.weight.double() @ R, model.lm_head.weight)
    stack.embed_tokens.weight = fresh(stack.embed_tokens.weight.double() @ R, stack.embed_tokens.weight)
    model.config.tie_word_embeddings = False
    for layer in stack.layers:
        for linear in (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj):
            into(linear, layer.input_layernorm)
        for linear in (layer.mlp.gate_proj, layer.mlp.up_proj):
            into(linear, layer.post_attention_layernorm)
        out_of(layer.self_attn.o_proj)
        out_of(layer.mlp.down_proj)
        for norm in (layer.input_layernorm, layer.post_attention_layernorm):
            norm.weight.fill_(1)
    stack.norm.weight.fill_(1)


def fresh(value: Tensor, like: Tensor) -> nn.Parameter:
    return nn.Parameter(value.to(like.dtype), requires_grad=False)
