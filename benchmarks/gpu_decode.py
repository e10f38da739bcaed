"""Decoding on a GPU, end to end, at batch 1: results/gpu_decode/h100.json.

    python benchmarks/gpu_decode.py llama gptj opt [--budget 300] [--fire 0.1]
    python benchmarks/gpu_decode.py smollm2 --model PATH --text ../shared/data/wikitext-2

Models of the shape of Llama-7B, GPT-J-6B and OPT-6.7B with random weights in bfloat16, whose linears are replaced by
groups of random weights: speed does not depend on values. Gates are made to open for a given share of the groups (gsi)
or channels (lrq), and what they open on the model's own text is measured. SmolLM2 is converted for real, in bfloat16;
its dense float32 text is compared with generate()'s.
Time per token: of 128 new tokens less 32, after a prompt of 64, the median of three; and of the CUDA graph alone. The
file is written after every row. A model is measured anew as a whole, so that its ratios are of one run; rows of other
models stay, each with the commit and the copy ceiling of its own run.
"""

from __future__ import annotations

import argparse
import copy
import functools
import gc
import importlib.util
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import frame
import torch
from frame import Columns, Content, Row, shown, timed
from gpu import DEVICE, DTYPE, K, copy_ceiling, gated, quantized, svd_rank
from torch import Tensor
from transformers import AutoModelForCausalLM, GPTJConfig, LlamaConfig, OPTConfig, PreTrainedConfig, PreTrainedModel

from rankgate.conversion.calibration import calibrate
from rankgate.conversion.convert import convert_
from rankgate.conversion.gates import record_gates
from rankgate.conversion.groups import input_groups, linears, shape
from rankgate.conversion.reads import weight_reads
from rankgate.core import GroupedLinear, LinearGroup
from rankgate.decoding.loop import decode
from rankgate.decoding.steps import captured
from rankgate.hub.opening import open_dense
from rankgate.methods import GSIConfig, Int4Config, Int8Config, LRQConfig, SVDConfig
from rankgate.quantized import QuantizedGroup

PROMPT, FEW, MANY = 64, 32, 128
PROMPTS, SAME = 20, 100  # prompts whose text is compared, and its tokens
CALIBRATION_TOKENS, CONTEXT = 16_384, 512
TORCHAO = importlib.util.find_spec("torchao") is not None
LOOPS: dict[str, dict[str, Any]] = {
    "generate": {},
    "engine": {"custom_generate": decode},
    "generate, compiled": {"cache_implementation": "static"},  # which transformers compiles by itself
}
MODELS = {
    "llama": LlamaConfig(),
    "gptj": GPTJConfig(),
    "opt": OPTConfig(
        hidden_size=4096, ffn_dim=16384, num_hidden_layers=32, num_attention_heads=32, word_embed_proj_dim=4096
    ),
}
NAMES = {"llama": "Llama-7B", "gptj": "GPT-J-6B", "opt": "OPT-6.7B", "smollm2": "SmolLM2-135M"}
Make = Callable[[int, int], LinearGroup]
Variant = tuple[str, float, Make]  # method, share of open gates, group of m × n


def variants(main: bool, fire: float) -> list[Variant]:
    """By importance: a run may end before the last."""

    def lrq(share: float) -> Variant:
        return "lrq", share, lambda m, n: quantized(m, n, rank=16, opened=share)

    def gsi(share: float) -> Variant:
        chance = torch.Generator().manual_seed(frame.SEED)
        return "gsi", share, lambda m, n: gated(m, n, K, 0.0 if torch.rand(1, generator=chance) < share else 2.0)

    few = [lrq(0.05), gsi(0.0)]
    more: list[Variant] = [
        ("int4", 0.0, quantized),
        gsi(1.0),
        lrq(fire),
        gsi(0.1),
        ("svd", 0.0, lambda m, n: gated(m, n, svd_rank(m, n), None)),
        ("int8", 0.0, functools.partial(quantized, bits=8)),
        gsi(0.5),
        lrq(0.0),
    ]
    return few + more if main else few


def main() -> None:
    arguments = parse()
    end = time.monotonic() + arguments.budget
    settings = {"device": frame.card(), "prompt": PROMPT, "new": [FEW, MANY]}
    run = {"commit": frame.commit(), "ceiling_tb_s": copy_ceiling()}
    file = f"gpu_decode/{frame.device_name()}"
    for name in arguments.models:
        earlier = frame.load(file)["results"] if (frame.RESULTS / f"{file}.json").exists() else []
        measured = smollm2(arguments) if name == "smollm2" else random_model(name, arguments.fire)
        rows = ({"model": name, **run, **row} for row in until(end, measured))
        frame.record(file, settings, rows, [row for row in earlier if row["model"] != name])


def parse() -> argparse.Namespace:
    options = frame.parser(__doc__)
    options.add_argument("models", nargs="+", choices=(*MODELS, "smollm2"))
    options.add_argument("--budget", type=float, default=1e9, help="seconds after which no measurement is begun")
    options.add_argument("--fire", type=float, default=0.1, help="share of channels that lrq opens in one of its rows")
    options.add_argument("--model", help="of smollm2")
    options.add_argument("--text", type=Path, help="folder with valid.txt and test.txt, for smollm2")
    arguments = frame.start(options)
    if "smollm2" in arguments.models and None in (arguments.model, arguments.text):
        options.error("smollm2 needs --model and --text")
    return arguments


def until(end: float, measured: Iterator[Row]) -> Iterator[Row]:
    """None is begun after `end`."""
    while time.monotonic() < end and (row := next(measured, None)) is not None:
        yield row


def random_model(name: str, fire: float) -> Iterator[Row]:
    model = build(MODELS[name])
    groups = input_groups(model)
    for loop in ("generate", "engine"):
        yield {"method": "dense", "loop": loop, "fire": 0.0, **figures(model, prompt(), loop)}
    del model
    for method, share, make in variants(name == "llama", fire):
        yield {"method": method, "loop": "engine", "fire": share, **attempt(replaced, name, groups, make, share)}
    if TORCHAO and name == "llama":
        for loop in ("engine", "generate, compiled"):
            yield {"method": "torchao int4", "loop": loop, "fire": 0.0, **attempt(torchao, name, loop)}


def build(config: PreTrainedConfig) -> PreTrainedModel:
    gc.collect()  # the model before, whose memory is needed
    torch.cuda.empty_cache()
    with torch.device(DEVICE):
        model = AutoModelForCausalLM.from_config(config, dtype=DTYPE).eval()
    model.generation_config.eos_token_id = None
    return cast(PreTrainedModel, model)


def attempt(measure: Callable[..., Row], *arguments: Any) -> Row:
    """What it measures; or its error, so that the other variants still run."""
    try:
        return measure(*arguments)
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"[:300]}


def replaced(name: str, groups: list[tuple[str, ...]], make: Make, fire: float) -> Row:
    model = build(MODELS[name])
    replace(model, groups, make)
    open_gates(model, fire)
    return figures(model, prompt(), "engine")


def replace(model: PreTrainedModel, groups: list[tuple[str, ...]], make: Make) -> None:
    """Put random groups in place of all linears, each dense weight going as its group comes."""
    modules = linears(model)
    for names in groups:
        members = [modules.pop(name) for name in names]
        group = make(sum(shape(member)[0] for member in members), shape(members[0])[1])
        start = 0
        for name, member in zip(names, members, strict=True):
            stop = start + shape(member)[0]
            model.set_submodule(name, GroupedLinear(group, start, stop, cast(Any, member.bias)))
            start = stop


def open_gates(model: PreTrainedModel, fire: float) -> None:
    """Set channel thresholds so that this share of what the model's own text sends to a group is open."""

    def set_threshold(group: QuantizedGroup, args: tuple[Tensor, ...]) -> None:
        assert group.refinement is not None
        group.refinement.gate.threshold.fill_(args[0].abs().float().quantile(1 - fire))

    refined = [m for m in model.modules() if isinstance(m, QuantizedGroup) and m.refinement is not None]
    if not refined:
        return
    text = generate(model, prompt(), MANY, "engine")
    with torch.inference_mode():
        read_again = rereader(model, text)
        handles = [group.register_forward_pre_hook(set_threshold) for group in refined]
        read_again()
    for handle in handles:
        handle.remove()


def rereader(model: PreTrainedModel, text: Tensor) -> Callable[[], Any]:
    """What runs the tokens after the prompt once more, in one call; the prompt is read at once."""
    cache = model(text[:, :PROMPT]).past_key_values
    return functools.partial(model, text[:, PROMPT:], past_key_values=cache)


def torchao(name: str, loop: str) -> Row:
    """4 bits in groups of 64 in the layout of torch's own kernel."""
    from torchao.quantization import Int4WeightOnlyConfig, quantize_

    model = build(MODELS[name])
    chosen = set(linears(model).values())
    config = Int4WeightOnlyConfig(group_size=64, int4_packing_format="tile_packed_to_4d")
    quantize_(model, config, filter_fn=lambda module, _: module in chosen)
    return {"ms": per_token(model, prompt(), loop)}


def figures(model: PreTrainedModel, ids: Tensor, loop: str) -> Row:
    """Time per token, with everything and of the graph alone; memory; what its text reads, and how many gates it opens.

    Gates and bytes are of the tokens that follow the prompt `ids`.
    """
    text = generate(model, ids, MANY, loop)  # the first time: compiles and records
    torch.cuda.reset_peak_memory_stats()
    result = {"ms": per_token(model, ids, loop), "peak_bytes": torch.cuda.max_memory_allocated()}
    if loop == "engine":
        result["graph_ms"] = 1e3 * replay(graph_of(model))
    return result | read_of(model, text)


def read_of(model: PreTrainedModel, text: Tensor) -> Row:
    """Bytes that a token of a text reads behind the prompt, as modelled, and the share of gates it opens, if any."""
    with torch.inference_mode():
        read_again = rereader(model, text)
        with record_gates(model) as gates:
            read_again()
    reads = weight_reads(model, gates)
    opened = {"opened": statistics.fmean(log.rate for log in gates.values())} if gates else {}
    return {"bytes": reads.converted + reads.other, **opened}


def graph_of(model: PreTrainedModel) -> torch.cuda.CUDAGraph:
    capture = captured(model)
    if capture is None:
        raise RuntimeError(f"{type(model).__name__} was not captured")
    graph: torch.cuda.CUDAGraph = cast(Any, capture.bind).__self__.graph
    return graph


def replay(graph: torch.cuda.CUDAGraph, times: int = 50) -> float:
    """Seconds of one replay."""
    graph.replay()
    return timed(lambda: [graph.replay() for _ in range(times)], DEVICE)[1] / times


def per_token(model: PreTrainedModel, ids: Tensor, loop: str, few: int = FEW, many: int = MANY) -> float:
    """Milliseconds."""
    calls = {str(new): functools.partial(generate, model, ids, new, loop) for new in (few, many)}
    short, long = frame.in_turn(calls, 3, DEVICE).values()
    return 1e3 * statistics.median(b - a for a, b in zip(short, long, strict=True)) / (many - few)


def prompt() -> Tensor:
    return torch.randint(5, 250, (1, PROMPT), device=DEVICE)


def generate(model: PreTrainedModel, ids: Tensor, new: int, loop: str) -> Tensor:
    options = {"max_new_tokens": new, "do_sample": False, "pad_token_id": 0, **LOOPS[loop]}
    out: Tensor = cast(Any, model).generate(ids, attention_mask=torch.ones_like(ids), **options)
    return out


def smollm2(arguments: argparse.Namespace) -> Iterator[Row]:
    """The real model: does float32 say what generate() says; how fast is each method in bfloat16."""
    opened = open_dense(arguments.model)
    model = opened.model.to(DEVICE)
    cast(Any, model).generation_config.eos_token_id = None
    prompts = opened.windows(str(arguments.text / "test.txt"), PROMPTS * PROMPT, PROMPT).to(DEVICE)
    same = sum(torch.equal(*(generate(model, p[None], SAME, loop) for loop in ("generate", "engine"))) for p in prompts)
    for dtype in ("float32", "bfloat16"):
        model.to(getattr(torch, dtype))
        for loop in ("generate", "engine"):
            compared = {"same_text": [same, len(prompts)]} if (dtype, loop) == ("float32", "engine") else {}
            row = {"method": "dense", "loop": loop, "dtype": dtype, "fire": 0.0, **compared}
            yield {**row, **figures(model, prompts[:1], loop)}
    windows = opened.windows(str(arguments.text / "valid.txt"), CALIBRATION_TOKENS, CONTEXT)
    stats = calibrate(model, windows, sensitivity=True)
    dense = model.cpu()
    for method in (
        *(LRQConfig(rank=16, refine=0.05), Int4Config(), GSIConfig(), SVDConfig(rank=0.25), Int8Config()),
        *(LRQConfig(rank=16, refine=share) for share in (0.0, 0.2)),
    ):
        model = copy.deepcopy(dense).to(DEVICE)
        convert_(model, method, stats)
        row = {"method": method.name, "loop": "engine", "dtype": "bfloat16"}
        yield {**row, "fire": float(getattr(method, "refine", 0.0)), **figures(model, prompts[:1], "engine")}


def label(r: Row) -> str:
    return " ".join(word for word in (r["method"], r.get("dtype", ""), r["loop"]) if word)


def speed(r: Row) -> float | None:
    """TB/s of the graph."""
    return r["bytes"] / r["graph_ms"] / 1e9 if "graph_ms" in r else None


def against(loop: str) -> Callable[[Row], str]:
    """A cell: how many times as fast as the dense model through this loop, if that was measured."""
    return lambda r: f"{r['dense'][loop] / r['ms']:.2f}" if loop in r["dense"] else "-"


DECODING: Columns = {
    "method, loop": label,
    "open": lambda r: f"{r['fire']:.0%}, {r['opened']:.1%}" if "opened" in r else "-",
    "ms/token": lambda r: f"{r['ms']:.2f}",
    "tokens/s": lambda r: f"{1e3 / r['ms']:.0f}",
    "graph, ms": lambda r: shown(r.get("graph_ms"), ".2f"),
    "GB/token": lambda r: shown(r.get("bytes"), ".2f", 1e9),
    "TB/s": lambda r: shown(speed(r), ".2f"),
    "of a copy": lambda r: shown(speed(r), ".0%", r["ceiling_tb_s"]),
    "x engine": against("engine"),
    "x generate": against("generate"),
    "peak GB": lambda r: shown(r.get("peak_bytes"), ".2f", 1e9),
}


def section(content: Content) -> str:
    settings, results = content["settings"], content["results"]
    few, many = settings["new"]
    compared = any(r["method"].startswith("torchao") for r in results)
    torchao = "" if compared else "torchao was not at hand there, so it is not compared with. "
    by_model = {name: [r for r in results if r["model"] == name] for name in NAMES}
    sections = "\n\n".join(model_section(name, rows) for name, rows in by_model.items() if rows)
    return f"""## GPU decoding ({settings["device"]})

Batch 1, end to end: a prompt of {settings["prompt"]} tokens and {many} new ones less the same with {few}, the median
of three; *graph*: the replay of a step's CUDA graph alone. *generate* is transformers' loop, *engine* ours. *open*:
share of gates that open, as set, and as measured on the text that the model wrote. *GB/token*: weights read, modelled
from stored bytes and measured gates; *TB/s*: these over the time of the graph; *of a copy*: of what a copy on the
device moved in that run. *x engine*, *x generate*: against the dense bfloat16 model through either loop, end to end, in
the same run. Models but SmolLM2 have the shapes named and random weights: their speed says nothing about quality.
{torchao}{frame.source(content)}

{sections}
"""


def model_section(name: str, results: list[Row]) -> str:
    rows = [r for r in results if "error" not in r]
    half = [r for r in rows if r["method"] == "dense" and r.get("dtype", "bfloat16") == "bfloat16"]
    dense = {r["loop"]: r["ms"] for r in half}
    title = f"### {NAMES[name]}\n\nCommit {results[0]['commit']}, a copy moves {results[0]['ceiling_tb_s']:.2f} TB/s."
    same = "".join(
        f" Of {r['same_text'][1]} prompts, {r['same_text'][0]} are continued by the engine with the same tokens as by"
        " `generate()` (dense, float32, greedy)."
        for r in rows
        if "same_text" in r
    )
    failed = "".join(f"\n\n{label(r)} did not run: {r['error']}" for r in results if "error" in r)
    return f"{title}{same}\n\n{frame.table(({**r, 'dense': dense} for r in rows), DECODING)}{failed}"


if __name__ == "__main__":
    main()
