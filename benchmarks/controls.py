"""Whether lrq's results rest on the grid that the embedded weights were on once: results/controls.json.

    python benchmarks/controls.py ../shared/data/wikitext-2 [--device cuda]

The embedded SmolLM2-135M was dequantised from Q4_1 (asymmetric 4-bit, groups of 32), so a method could do well on it by
finding that grid again. The same settings are measured on the model as it is and on two that are off the grid, each
against its own dense model:

    dithered   every weight plus uniform noise as wide as its grid's step: what weights before Q4_1 could have been
    rotated    the residual stream in another basis: every weight changes and no output does; but the few channels that
               are much larger than the rest, on which channel gates live, are spread over all of them

About 15 minutes on two cores, two minutes on a GPU.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from curve import CALIBRATION_TOKENS, CONTEXT, CURVE, TOKENS, describe_device, measure, parse
from provenance import SEED, write
from torch import Tensor, nn
from transformers import PreTrainedModel

from rankgate.common.terminal import quiet_libraries
from rankgate.conversion.groups import linears
from rankgate.hub.opening import open_dense
from rankgate.hub.sources import DEFAULT

CONTROLS = {name: CURVE[name] for name in ("rank 16", "5 %", "36 %, asymmetric")}
OLD_GROUP, OLD_LEVELS = 32, 15  # of Q4_1


def main() -> None:
    arguments = parse(__doc__)
    quiet_libraries()
    records = []
    models: dict[str, Callable[[PreTrainedModel], None]] = {
        "as it is": lambda _: None,
        "dithered": dither_,
        "rotated": rotate_,
    }
    for name, change in models.items():
        opened = open_dense(DEFAULT)
        change(opened.model)
        opened.model.to(arguments.device)
        records += measure(opened, arguments.folder, CONTROLS, name)
    settings = {
        "context": CONTEXT,
        "calibration_tokens": CALIBRATION_TOKENS,
        "tokens": TOKENS,
        "device": describe_device(arguments.device),
    }
    write("controls", settings, records)


@torch.no_grad()
def dither_(model: PreTrainedModel) -> None:
    """Add uniform noise of one step of the old grid to every weight of the linears, in place."""
    generator = torch.Generator().manual_seed(SEED)
    for module in linears(model).values():
        groups = module.weight.unflatten(-1, (-1, OLD_GROUP))
        step = (groups.amax(-1, keepdim=True) - groups.amin(-1, keepdim=True)) / OLD_LEVELS
        noise = torch.rand(groups.shape, generator=generator) - 0.5
        module.weight.add_((noise * step).flatten(-2))


@torch.no_grad()
def rotate_(model: PreTrainedModel) -> None:
    """Rotate the residual stream of a Llama-like model by a random orthogonal matrix R, in place.

    RMSNorm commutes with a rotation once its gain is folded into the linears that follow, so
    W ← W diag(gain) R for what reads the stream and W ← Rᵀ W for what writes to it leaves every output as it was.
    Embedding and output embedding are untied.
    """
    stack, width = model.model, model.config.hidden_size
    generator = torch.Generator().manual_seed(SEED)
    R = torch.linalg.qr(torch.randn(width, width, generator=generator, dtype=torch.float64))[0]

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


if __name__ == "__main__":
    main()
