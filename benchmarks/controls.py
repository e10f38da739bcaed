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

from collections.abc import Iterator
from pathlib import Path

import torch
from curve import BITS, CURVE, METHOD, conditions, measured
from frame import MODEL, SEED, Columns, Content, Row, parser, record, source, start, table
from torch import Tensor, nn
from transformers import PreTrainedModel

from rankgate.conversion.groups import linears
from rankgate.hub.opening import open_dense
from rankgate.reporting.tables import number

CONTROLS = {name: CURVE[name] for name in ("rank 16", "5 %", "36 %, asymmetric")}
OLD_GROUP, OLD_LEVELS = 32, 15  # of Q4_1


def main() -> None:
    arguments = start(parser(__doc__, "folder", "--device"))
    record("controls", conditions(arguments.device), of_models(arguments.folder, arguments.device))


def of_models(folder: Path, device: str) -> Iterator[Row]:
    """The same methods on the model as it is, and on the ones made from it."""
    for name, change_ in (("as it is", None), ("dithered", dither_), ("rotated", rotate_)):
        opened = open_dense(MODEL)
        if change_ is not None:
            change_(opened.model)
        opened.model.to(device)
        yield from measured(opened, folder, CONTROLS, name)


@torch.no_grad()
def dither_(model: PreTrainedModel) -> None:
    """Add uniform noise of one step of the old grid to every weight of the linears, in place."""
    generator = torch.Generator().manual_seed(SEED)
    for module in linears(model).values():
        module.weight.add_(noise(module.weight, generator))


def noise(W: Tensor, generator: torch.Generator) -> Tensor:
    """Uniform noise, one step of the old grid wide, for every weight of W (m × n)."""
    groups = W.unflatten(-1, (-1, OLD_GROUP))
    step = (groups.amax(-1, keepdim=True) - groups.amin(-1, keepdim=True)) / OLD_LEVELS
    return ((torch.rand(groups.shape, generator=generator) - 0.5) * step).flatten(-2)


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


def against_dense(part: str) -> Columns:
    return {part: lambda r: f"{number(r[part]['ppl_ratio'], 4)} / {number(r[part]['kl_mean'], 4)}"}


def section(content: Content) -> str:
    rows: dict[str, Row] = {}  # of a method, as measured on the model as it is, and by model
    for r in content["results"]:
        rows.setdefault(r["what"], {**r})[r["part"]] = r
    costs = [r["dithered"]["kl_mean"] / r["as it is"]["kl_mean"] - 1 for r in rows.values()]
    parts = map(against_dense, ("as it is", "dithered", "rotated"))
    return f"""### Off the grid that the weights were on

The model comes from a 4-bit file (Q4_1: asymmetric, groups of 32), so its weights lie on a grid of their own, and a
method could do well by finding it again. The same settings, perplexity ratio / mean KL, each against its own dense
model: *dithered* has uniform noise of one step of that grid on every weight; *rotated* has its residual stream in
another basis, where every weight is different and every output the same. {source(content)}

{table(rows.values(), METHOD, BITS, *parts)}

Dithering makes the divergence {min(costs):.0%} to {max(costs):.0%} larger: at most that much rests on the grid (noise
in the weights is harder to round by itself). Rotation takes away something else besides, which gates live on: a few
channels of the residual stream that are much larger than the rest. A rotation and channel gates exclude each other.
"""


if __name__ == "__main__":
    main()
