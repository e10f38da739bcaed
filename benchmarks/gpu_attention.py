"""Attention to fewer keys by head on a GPU: results/gpu_attention/h100.json.

    python benchmarks/gpu_attention.py [--budget 400]

Attention of a prompt: layers of the shape of an 8B model (32 heads of 128, 8 key heads) and of a 7B model (32 key
heads), bfloat16, against scaled_dot_product_attention of the same queries, keys and values. What the key heads read is
what was planned for 40 % of the keys of SmolLM2-135M on texts of 4,096 tokens (results/attention_quality.json), dealt
out to the heads of several layers, windows in proportion to the text. Keys are random, around as many centres that
about 0.3 of them are representatives, as in SmolLM2. *choosing*: representatives alone. The same without
representatives: heads that have some take windows that read as much.

Whole models of these shapes with random weights, 4 bits with refinements (lrq): reading a prompt, and a token after it
by captured steps, with all keys and by head, without representatives, which random keys have not. Medians of repeats in
turn.
"""

from __future__ import annotations

import functools
import gc
import random
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import frame
import torch
from frame import Columns, Content, Row
from gpu import DEVICE, DTYPE, quantized
from gpu_decode import build, generate, replace
from torch import Tensor
from torch.nn import functional as F
from transformers import LlamaConfig, PreTrainedModel

from rankgate.attention.attend import AttentionConfig, TokenSelection, select_tokens_
from rankgate.attention.prompt import attend_prompt
from rankgate.attention.select import select_each, unit
from rankgate.attention.strands import Heads, Strand, strands_of
from rankgate.conversion.groups import input_groups

LENGTHS, MODEL_LENGTHS = (4096, 16384, 32768, 65536), (16384, 32768)
KEYS, PLANNED, SINKS, WIDTH, HEADS = 0.4, 2048, 4, 128, 32
REPRESENTATIVES, SPREAD = 0.3, 0.1  # share of keys, and how far those of a centre lie apart
DRAWN = 96  # key heads that the plan is dealt out to
REPEATS, FEW, MANY = 3, 16, 80
SHAPES = {
    "8B, 8 key heads": LlamaConfig(
        **{"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": HEADS},
        **{"num_key_value_heads": 8, "vocab_size": 128_256, "max_position_embeddings": 1 << 17},
    ),
    "7B, 32 key heads": LlamaConfig(max_position_embeddings=1 << 17),
}


def main() -> None:
    options = frame.parser(__doc__)
    options.add_argument("--budget", type=float, default=1e9, help="seconds after which no row is begun")
    end = time.monotonic() + frame.start(options).budget
    rows = [functools.partial(prompts, name, tokens, r) for tokens in LENGTHS for name in SHAPES for r in (True, False)]
    models = (row for name in SHAPES for row in models_of(name, end))
    settings = {"device": frame.card(), "keys": KEYS, "planned": PLANNED, "repeats": REPEATS}
    found = (row() for row in rows if time.monotonic() < end)
    frame.record(f"gpu_attention/{frame.device_name()}", settings, (row for rows in (found, models) for row in rows))


def planned(tokens: int, count: int, *, representatives: bool) -> list[Heads]:
    """What so many key heads read of texts of so many tokens: the plan of SmolLM2, in a fixed random order."""
    plans = [r for r in frame.load("attention_quality")["results"] if r["rule"] == "by head" and r["length"] == PLANNED]
    (kinds,) = (r["heads"] for r in plans if (r["keys"], r["representatives"]) == (KEYS, representatives))
    heads = [head(kind, tokens) for kind, number in sorted(kinds.items()) for _ in range(number)]
    random.Random(frame.SEED).shuffle(heads)
    return (heads * -(-count // len(heads)))[:count]


def head(kind: str, tokens: int) -> Heads:
    """As `attention_quality.kind` writes it, for a text of another length."""
    window, _, tau = kind.partition(", tau ")
    if tau:
        return Heads(int(window), float(tau))
    return Heads(None if window == "all" else int(window) * tokens // PLANNED, None)


@torch.inference_mode()
def prompts(name: str, tokens: int, representatives: bool) -> Row:
    """One shape and length: milliseconds of a layer, the mean over several."""
    groups = SHAPES[name].num_key_value_heads
    layers = DRAWN // groups
    centres = int(REPRESENTATIVES * tokens)
    which = torch.randint(centres, (tokens,), device=DEVICE)
    near = torch.randn(groups, centres, WIDTH, device=DEVICE)[:, which]
    k = (near + SPREAD * torch.randn(groups, tokens, WIDTH, device=DEVICE)).to(DTYPE)
    q, v = (torch.randn(heads, tokens, WIDTH, device=DEVICE, dtype=DTYPE) for heads in (HEADS, groups))
    heads = planned(tokens, DRAWN, representatives=representatives)
    by_layer = [heads[layer * groups : (layer + 1) * groups] for layer in range(layers)]
    strands: list[list[Strand]] = []

    def few() -> None:
        strands[:] = [strands_of(own, SINKS) for own in by_layer]
        for layer in strands:
            attend_prompt(layer, q, k, v, None, None, WIDTH**-0.5)

    def choosing() -> None:
        for own in by_layer:
            taus = [(i, h.tau) for i, h in enumerate(own) if h.tau is not None]
            if taus:
                select_each(unit(k[[i for i, _ in taus]]), torch.tensor([tau for _, tau in taus], device=DEVICE))

    def dense() -> None:
        for _ in by_layer:
            F.scaled_dot_product_attention(q[None], k[None], v[None], is_causal=True, enable_gqa=groups < HEADS)

    calls = {"dense": dense, "few": few, "choosing": choosing}
    seconds = {what: statistics.median(times) for what, times in frame.in_turn(calls, REPEATS, DEVICE).items()}
    ms = {what: 1e3 * value / layers for what, value in seconds.items()}
    every = [strand for layer in strands for strand in layer]
    share = sum(strand.read for strand in every) / sum(strand.pairs for strand in every)
    what = {"what": "prompt", "shape": name, "tokens": tokens, "representatives": representatives}
    return {**what, "share": share, **ms}


def models_of(name: str, end: float) -> Iterator[Row]:
    gc.collect()
    model = build(SHAPES[name])
    replace(model, input_groups(model), functools.partial(quantized, rank=16, opened=0.05))
    for tokens in MODEL_LENGTHS:
        if time.monotonic() < end:
            yield {"what": "model", "shape": name, "tokens": tokens, **whole(model, tokens)}


def whole(model: PreTrainedModel, tokens: int) -> Row:
    """Seconds of a prompt and milliseconds of a token, with all keys and by head."""
    ids = torch.randint(5, 250, (1, tokens - MANY - 1), device=DEVICE)
    config = model.config
    groups = config.num_key_value_heads
    heads = planned(tokens, groups * config.num_hidden_layers, representatives=False)
    plan = AttentionConfig(heads=tuple(tuple(heads[i : i + groups]) for i in range(0, len(heads), groups)))
    out: Row = {}
    for what in ("dense", "few"):
        with select_tokens_(model, plan) if what == "few" else nullcontext() as selection:
            generate(model, ids, FEW, "engine")  # compiles and records
            calls: dict[str, Callable[[], Tensor]] = {
                str(new): functools.partial(generate, model, ids, new, "engine") for new in (1, FEW, MANY)
            }
            prompt, short, long = frame.in_turn(calls, 3, DEVICE).values()
            steps = [b - a for a, b in zip(short, long, strict=True)]
            out[f"{what}_prompt_s"] = statistics.median(prompt)
            out[f"{what}_ms"] = 1e3 * statistics.median(steps) / (MANY - FEW)
            if selection is not None:
                read = [counted(selection, functools.partial(generate, model, ids, new, "engine")) for new in (1, MANY)]
                out["share"] = read[0][0] / read[0][1]
                out["step_share"] = (read[1][0] - read[0][0]) / (read[1][1] - read[0][1])
    return out


def counted(selection: TokenSelection, call: Callable[[], Any]) -> tuple[int, int]:
    """Keys read, and all, in a call."""
    read, pairs = selection.read, selection.pairs
    call()
    return selection.read - read, selection.pairs - pairs


PROMPTS: Columns = {
    "shape": lambda r: r["shape"],
    "T": lambda r: f"{r['tokens']:,}",
    "representatives": lambda r: "yes" if r["representatives"] else "no",
    "keys read": lambda r: f"{r['share']:.2f}",
    "SDPA, ms": lambda r: f"{r['dense']:.2f}",
    "by head, ms": lambda r: f"{r['few']:.2f}",
    "× SDPA's speed": lambda r: f"{r['dense'] / r['few']:.2f}",
    "choosing / SDPA": lambda r: f"{r['choosing'] / r['dense']:.2f}",
}
MODELS: Columns = {
    "shape": lambda r: r["shape"],
    "T": lambda r: f"{r['tokens']:,}",
    "keys read, prompt and after": lambda r: f"{r['share']:.2f}, {r['step_share']:.2f}",
    "prompt, s": lambda r: f"{r['dense_prompt_s']:.2f} → {r['few_prompt_s']:.2f}",
    "× as fast": lambda r: f"{r['dense_prompt_s'] / r['few_prompt_s']:.2f}",
    "a token, ms": lambda r: f"{r['dense_ms']:.2f} → {r['few_ms']:.2f}",
    "× as fast ": lambda r: f"{r['dense_ms'] / r['few_ms']:.2f}",
}


def section(content: Content) -> str:
    """One device."""
    settings, rows = content["settings"], content["results"]
    of = {what: [r for r in rows if r["what"] == what] for what in ("prompt", "model")}
    return f"""## Attention to fewer keys on a GPU ({frame.place(content)})

A layer's attention to a prompt of T tokens, bfloat16, 32 heads of 128: by head as planned for {settings["keys"]:.0%} of
SmolLM2's keys at {settings["planned"]:,} tokens, windows in proportion to T, keys with about {REPRESENTATIVES} of
representatives, all that it takes to choose and hold them included; against `scaled_dot_product_attention`. *choosing*:
representatives alone. {frame.source(content)}

{frame.table(of["prompt"], PROMPTS)}

Models with random weights, 4 bits and refinements, a prompt of T tokens and a token after it by captured steps, with
all keys and by head (windows in place of representatives, which random keys have not):

{frame.table(of["model"], MODELS)}
"""


if __name__ == "__main__":
    main()
