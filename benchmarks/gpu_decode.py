"""Decoding on a GPU, end to end, at batch 1: results/gpu_decode_h100.json.

    python benchmarks/gpu_decode.py llama gptj opt [--budget 300]
    python benchmarks/gpu_decode.py smollm2 --model PATH --text ../shared/data/wikitext-2

Models of the shape of Llama-7B, GPT-J-6B and OPT-6.7B with random weights in bfloat16, whose linears are replaced by
groups of random weights: speed does not depend on values. Gates are made to open for a given share of the groups (gsi)
or channels (lrq). SmolLM2 is converted for real, in bfloat16; its dense float32 text is compared with generate()'s.
Time per token: of 128 new tokens less 32, after a prompt of 64, the median of three; and of the CUDA graph alone.
"""

from __future__ import annotations

import argparse
import copy
import functools
import importlib.util
import json
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import torch
from gpu import DTYPE, copy_ceiling, device_name, gated, quantized, read_bytes
from provenance import RESULTS, SEED, write
from transformers import AutoModelForCausalLM, GPTJConfig, LlamaConfig, OPTConfig, PreTrainedModel

from rankgate import decode
from rankgate.calibration import calibrate
from rankgate.convert import convert_, converted_layers, shared_part, twin
from rankgate.core import GatedGroup, GroupedLinear, LinearGroup
from rankgate.groups import input_groups, linears, shape
from rankgate.methods import Int4Config, Int8Config, LRQConfig
from rankgate.pipeline import open_dense
from rankgate.quantized import QuantizedGroup

PROMPT, FEW, MANY = 64, 32, 128
K, SVD_THEORY = 256, 2.9
MODELS = {
    "llama": LlamaConfig(
        hidden_size=4096,
        intermediate_size=11008,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=32,
        vocab_size=32000,
    ),
    "gptj": GPTJConfig(),
    "opt": OPTConfig(
        hidden_size=4096, ffn_dim=16384, num_hidden_layers=32, num_attention_heads=32, word_embed_proj_dim=4096
    ),
}
Make = Callable[[int, int], LinearGroup]
Variant = tuple[str, float, Make]  # method, share of open gates, group of m × n


def variants(main: bool) -> list[Variant]:
    """By importance: a run may end before the last."""

    def lrq(fire: float) -> Variant:
        return "lrq", fire, lambda m, n: quantized(m, n, rank=16, opened=fire)

    def gsi(fire: float) -> Variant:
        chance = torch.Generator().manual_seed(SEED)
        return "gsi", fire, lambda m, n: gated(m, n, K, 0.0 if torch.rand(1, generator=chance) < fire else 2.0)

    few = [lrq(0.05), gsi(0.0)]
    more: list[Variant] = [
        ("int4", 0.0, quantized),
        gsi(1.0),
        gsi(0.1),
        gsi(0.5),
        lrq(0.2),
        lrq(0.0),
        ("svd", 0.0, lambda m, n: gated(m, n, round(m * n / (SVD_THEORY * (m + n)) / 16) * 16, None)),
        ("int8", 0.0, functools.partial(quantized, bits=8)),
    ]
    return few + more if main else few


def main() -> None:
    arguments = parse()
    start = time.monotonic()
    settings, rows = earlier()
    settings |= {
        "device": torch.cuda.get_device_name(),
        "ceiling_tb_s": copy_ceiling(),
        "prompt": PROMPT,
        "new": [FEW, MANY],
        "torchao": importlib.util.find_spec("torchao") is not None,
    }
    for name in arguments.models:
        rows = [row for row in rows if row["model"] != name]
        measured = smollm2(arguments) if name == "smollm2" else random_model(name)
        while time.monotonic() - start < arguments.budget:
            row = next(measured, None)
            if row is None:
                break
            rows.append({"model": name, **row})
            print(rows[-1], flush=True)
            write(f"gpu_decode_{device_name()}", settings, rows)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", choices=(*MODELS, "smollm2"))
    parser.add_argument("--budget", type=float, default=1e9, help="seconds after which no measurement is begun")
    parser.add_argument("--model", help="of smollm2")
    parser.add_argument("--text", type=Path, help="folder with valid.txt and test.txt, for smollm2")
    return parser.parse_args()


def earlier() -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """What was measured on this kind of device before, of other models."""
    path = RESULTS / f"gpu_decode_{device_name()}.json"
    content = json.loads(path.read_text()) if path.exists() else {"settings": {}, "results": []}
    return content["settings"], content["results"]


def random_model(name: str) -> Iterator[dict[str, Any]]:
    with torch.device("cuda"):
        dense = AutoModelForCausalLM.from_config(MODELS[name], dtype=DTYPE).eval()
    cast(Any, dense).generation_config.eos_token_id = None
    groups = input_groups(dense)
    yield {"method": "dense", "loop": "generate", "fire": 0.0, "ms": per_token(dense, loop=None)}
    yield {"method": "dense", "loop": "engine", "fire": 0.0, **figures(dense)}
    for method, fire, make in variants(main=name == "llama"):
        model = twin(dense)
        replace(model, groups, make)
        open_gates(model, fire)
        yield {"method": method, "loop": "engine", "fire": fire, **figures(model, fire)}
        del model


def replace(model: PreTrainedModel, groups: list[tuple[str, ...]], make: Make) -> None:
    """Put random groups in place of all linears."""
    modules = linears(model)
    for names in groups:
        sizes = [shape(modules[name])[0] for name in names]
        group = make(sum(sizes), shape(modules[names[0]])[1])
        start = 0
        for name, size in zip(names, sizes, strict=True):
            model.set_submodule(name, GroupedLinear(group, start, start + size, modules[name].bias))
            start += size


def open_gates(model: PreTrainedModel, fire: float) -> None:
    """Set channel thresholds so that this share of what a random text sends is open."""

    def set_threshold(group: QuantizedGroup, args: tuple[torch.Tensor, ...]) -> None:
        assert group.refinement is not None
        group.refinement.gate.threshold.fill_(args[0].abs().float().quantile(1 - fire))

    refined = [m for m in model.modules() if isinstance(m, QuantizedGroup) and m.refinement is not None]
    handles = [group.register_forward_pre_hook(set_threshold) for group in refined]
    with torch.inference_mode():
        model(torch.randint(5, 1000, (1, PROMPT), device="cuda"))
    for handle in handles:
        handle.remove()


def figures(model: PreTrainedModel, fire: float = 0.0) -> dict[str, Any]:
    """Time per token, with everything and of the graph alone, and the bytes of weights that a token reads."""
    ms = per_token(model, loop=decode.decode)
    capture = decode._captures[model][1]
    if capture is None:
        raise SystemExit(f"{type(model).__name__} was not captured")
    graph = cast(Any, capture.bind).__self__.graph
    head = model.get_output_embeddings()
    groups = {id(shared_part(layer)): shared_part(layer) for _, layer in converted_layers(model)}
    nbytes = sum(read_bytes(cast(Any, group), fires(group, fire)) for group in groups.values())
    nbytes += sum(cast(Any, module.weight).nbytes for module in (*linears(model).values(), head))
    return {"ms": ms, "graph_ms": 1e3 * replay(graph), "bytes": nbytes}


def fires(group: Any, fire: float) -> float:
    return float(group.subspace.eps == 0) if isinstance(group, GatedGroup) else fire


def replay(graph: torch.cuda.CUDAGraph, times: int = 50) -> float:
    """Seconds of one replay."""
    graph.replay()
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(times):
        graph.replay()
    torch.cuda.synchronize()
    return (time.perf_counter() - start) / times


def per_token(model: PreTrainedModel, loop: Callable[..., Any] | None) -> float:
    """Milliseconds."""
    ids = torch.randint(5, 1000, (1, PROMPT), device="cuda")

    def seconds(new: int) -> float:
        torch.cuda.synchronize()
        start = time.perf_counter()
        generate(model, ids, new, loop)
        torch.cuda.synchronize()
        return time.perf_counter() - start

    seconds(4)
    return 1e3 * statistics.median(seconds(MANY) - seconds(FEW) for _ in range(3)) / (MANY - FEW)


def generate(model: PreTrainedModel, ids: torch.Tensor, new: int, loop: Callable[..., Any] | None) -> torch.Tensor:
    out: torch.Tensor = cast(Any, model).generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=new,
        do_sample=False,
        pad_token_id=0,
        **({} if loop is None else {"custom_generate": loop}),
    )
    return out


def smollm2(arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """The real model: does float32 say what generate() says; how fast is each method in bfloat16."""
    opened = open_dense(arguments.model)
    prompts = opened.windows(str(arguments.text / "test.txt"), 20 * PROMPT, PROMPT).cuda()
    wide = opened.model.cuda()
    wide.generation_config.eos_token_id = None
    same = sum(torch.equal(*(generate(wide, p[None], 100, loop) for loop in (None, decode.decode))) for p in prompts)
    yield {"method": "dense", "loop": "engine, float32", "fire": 0.0, "same_text": same, **figures(wide)}
    dense = copy.deepcopy(wide).to(DTYPE)
    yield {"method": "dense", "loop": "generate", "fire": 0.0, "ms": per_token(dense, loop=None)}
    yield {"method": "dense", "loop": "engine", "fire": 0.0, **figures(dense)}
    stats = calibrate(dense, opened.windows(str(arguments.text / "valid.txt"), 16_384, 512), sensitivity=True)
    for method in (Int8Config(), Int4Config(), LRQConfig(refine=0.0), LRQConfig(refine=0.05), LRQConfig(refine=0.2)):
        model = twin(dense)
        convert_(model, method, stats)
        fire = float(getattr(method, "refine", 0.0))
        yield {"method": method.name, "loop": "engine", "fire": fire, **figures(model, fire)}


if __name__ == "__main__":
    torch.manual_seed(SEED)
    main()
