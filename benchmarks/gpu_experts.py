"""Mixtures of experts on a GPU, token by token: results/gpu_experts/h100.json.

    python benchmarks/gpu_experts.py [--budget 200]

Qwen3-MoE with random weights in bfloat16, one of 2.7 billion weights of which a token reads half a billion, and a tiny
one: dense, and its linears, those of every expert by itself, replaced by random groups, with 5 % of the channels of
`lrq` open on the model's own text. Time per token of captured steps: of 96 new tokens less 32, after a prompt of 64,
all methods in turn in one process, the median of five; and of the CUDA graph alone. That a step reads no experts but
those of its token is checked with all others filled with what is not finite: the output of every layer stays the same
to the bit. Three minutes on an H100, most of them compiling.
"""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Iterator

import frame
import torch
from frame import Columns, Content, Row
from gpu import DEVICE, DTYPE, copy_ceiling, quantized
from gpu_decode import Make, build, generate, graph_of, open_gates, prompt, read_of, replace, replay
from torch import Tensor
from transformers import PreTrainedModel, Qwen3MoeConfig

from rankgate.conversion.groups import input_groups
from rankgate.experts import Experts, experts_of, found_by_tables, unstack_, unstacked

FEW, MANY, ROUNDS = 32, 96, 5
OPENED = 0.05
SHAPES = {
    "2.7B-A0.5B": Qwen3MoeConfig(
        **{"hidden_size": 2048, "num_hidden_layers": 16, "num_experts": 32, "num_experts_per_tok": 4},
        **{"moe_intermediate_size": 768, "num_attention_heads": 16, "num_key_value_heads": 4, "head_dim": 128},
        vocab_size=32_000,
    ),
    "tiny": Qwen3MoeConfig(
        **{"hidden_size": 256, "num_hidden_layers": 4, "num_experts": 8, "num_experts_per_tok": 2},
        **{"moe_intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64},
        vocab_size=1000,
    ),
}
METHODS: dict[str, Make | None] = {
    "dense": None,
    "lrq": functools.partial(quantized, rank=16, opened=OPENED),
    "int8": functools.partial(quantized, bits=8),
    "int4": quantized,
}


def main() -> None:
    options = frame.parser(__doc__)
    options.add_argument("--budget", type=float, default=1e9, help="seconds after which no model is begun")
    arguments = frame.start(options)
    end = time.monotonic() + arguments.budget
    settings = {"device": frame.card(), "new": [FEW, MANY], "ceiling_tb_s": copy_ceiling()}
    frame.record(f"gpu_experts/{frame.device_name()}", settings, measured(end))


def measured(end: float) -> Iterator[Row]:
    for name in SHAPES:
        if time.monotonic() < end:
            models, ids = {method: model(name, make) for method, make in METHODS.items()}, prompt()
            calls = {
                (method, new): functools.partial(generate, one, ids, new, "engine")
                for method, one in models.items()
                for new in (FEW, MANY)
            }
            times = frame.in_turn(calls, ROUNDS, DEVICE)
            for method, one in models.items():
                pairs = zip(times[method, FEW], times[method, MANY], strict=True)
                ms = 1e3 * statistics.median(many - few for few, many in pairs) / (MANY - FEW)
                yield {"model": name, "method": method, "ms": ms, **figures(one, ids)}


def model(name: str, make: Make | None) -> PreTrainedModel:
    made = build(SHAPES[name])
    if make is not None:
        unstack_(made)
        replace(made, input_groups(made), make)
        open_gates(made, OPENED)
    return made


def figures(one: PreTrainedModel, ids: Tensor) -> Row:
    """Time of the graph alone, bytes that a token reads as modelled, and whether other experts are left alone."""
    result: Row = {"graph_ms": 1e3 * replay(graph_of(one))}
    text, apart = generate(one, ids, MANY, "engine"), unstacked(one)
    result |= read_of(apart, text)
    if apart is one:
        with torch.inference_mode():
            result["others_unread"] = all(others_unread(experts) for experts in experts_of(one).values())
    return result


def others_unread(experts: Experts) -> bool:
    """Whether a layer's output is the same to the bit when all experts but a token's own are not finite."""
    n = experts[0][experts.up].in_features  # type: ignore[index]
    x, weights = torch.randn(1, n, device=DEVICE, dtype=DTYPE), torch.rand(1, experts.per_token, device=DEVICE)
    chosen = torch.randperm(len(experts), device=DEVICE)[None, : experts.per_token]
    with found_by_tables():
        before = experts(x, chosen, weights)
        others = [expert for number, expert in enumerate(experts) if number not in chosen[0].tolist()]
        parts = [part for expert in others for part in expert.parameters() if part.is_floating_point()]
        kept = [part.clone() for part in parts]
        for part in parts:
            part.fill_(torch.nan)
        after = experts(x, chosen, weights)
    for part, values in zip(parts, kept, strict=True):
        part.copy_(values)
    return bool(parts) and bool(before.isfinite().all()) and torch.equal(before, after)


def section(content: Content) -> str:
    settings, results = content["settings"], content["results"]
    few, many = settings["new"]
    dense = {r["model"]: r for r in results if r["method"] == "dense"}
    columns: Columns = {
        "model": lambda r: r["model"],
        "method": lambda r: r["method"],
        "ms/token": lambda r: f"{r['ms']:.2f}",
        "graph, ms": lambda r: f"{r['graph_ms']:.2f}",
        "MB/token": lambda r: f"{r['bytes'] / 1e6:.1f}",
        "TB/s": lambda r: f"{r['bytes'] / r['graph_ms'] / 1e9:.2f}",
        "x dense": lambda r: f"{dense[r['model']]['ms'] / r['ms']:.2f}",
        "fewer bytes": lambda r: f"{dense[r['model']]['bytes'] / r['bytes']:.2f}",
        "others unread": lambda r: {True: "yes", False: "NO", None: "-"}[r.get("others_unread")],
    }
    shapes = "; ".join(
        f"*{name}*: {c.num_hidden_layers} layers of {c.hidden_size}, "
        f"{c.num_experts_per_tok} of {c.num_experts} experts of {c.moe_intermediate_size}"
        for name, c in SHAPES.items()
    )
    return f"""## Mixtures of experts on a GPU ({settings["device"]})

Qwen3-MoE with random weights, bfloat16, batch 1, captured steps. {shapes}. Time per token: {many} new tokens less
{few}, all methods in turn; *graph*: the replay of a step's CUDA graph alone. *MB/token*: weights that a token reads, as
modelled; *TB/s*: these over the time of the graph, where a copy moved {settings["ceiling_tb_s"]:.2f}. *others unread*:
experts that are not a token's own may hold what is not finite, and its output is the same to the bit. The speed of
random weights says nothing about quality. {frame.source(content)}

{frame.table(results, columns)}
"""


if __name__ == "__main__":
    main()
