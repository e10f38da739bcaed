"""Exact mode on SmolLM2-135M, dense in float32, with drafts of several methods: results/exact_cpu.json.

    python benchmarks/exact.py ../shared/data/wikitext-2 [--device cuda] [--prompts 20] [--model PATH]

WikiText-2 test, 50 prompts of 32 tokens, 128 new ones, greedy. On each prompt dense `generate()`, the dense model in
our loop and exact mode with every draft take turns, timed; what is reported is the share of identical texts, what was
accepted, and how many times as fast as dense `generate()` the median text was written. `lrq` is calibrated on
WikiText-2 valid. The file is written after every prompt. Half an hour on two cores that do nothing else; on a GPU it is
called exact_h100.json and the like.
"""

from __future__ import annotations

import argparse
import statistics
import time
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from gpu import device_name
from provenance import write

from rankgate.common.terminal import quiet_libraries
from rankgate.conversion.calibration import calibrate
from rankgate.conversion.convert import convert_, twin
from rankgate.decoding.exact import Exact, Statistics
from rankgate.decoding.loop import decode
from rankgate.hub.opening import open_dense
from rankgate.methods import Int4Config, Int8Config, LRQConfig, Method, SVDConfig

DENSE = "none: dense, decode"
MODEL, PROMPT_TOKENS, NEW_TOKENS = "smollm2-135m", 32, 128
CONTEXT, CALIBRATION_TOKENS = 512, 4096
DRAFTS: dict[str, Method] = {
    "lrq r=16 refine=0.05": LRQConfig(rank=16, refine=0.05),
    "int4": Int4Config(),
    "int8": Int8Config(),
    "svd k=0.5": SVDConfig(rank=0.5, allow_larger=True),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="folder with valid.txt and test.txt")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--prompts", type=int, default=50)
    parser.add_argument("--model", default=MODEL, help="where it is, on a machine that cannot fetch it")
    arguments = parser.parse_args()
    data, device = arguments.data, torch.device(arguments.device)
    quiet_libraries()
    opened = open_dense(arguments.model, arguments.device)
    prompts = opened.windows(str(data / "test.txt"), arguments.prompts * PROMPT_TOKENS, PROMPT_TOKENS).to(device)
    stats = calibrate(
        opened.model, opened.windows(str(data / "valid.txt"), CALIBRATION_TOKENS, CONTEXT), sensitivity=True
    )
    loops: dict[str, Any] = {DENSE: decode}
    for name, method in DRAFTS.items():
        draft = twin(opened.model)
        convert_(draft, method, stats, lm_head=True)
        loops[name] = Exact(draft)
    del stats
    for loop in (None, *loops.values()):
        generate(opened.model, prompts[:1], loop)  # compiles kernels and captures steps
    rows: dict[str, list[dict[str, Any]]] = {name: [] for name in loops}
    settings = {"model": MODEL, "text": "WikiText-2 test", "prompt_tokens": PROMPT_TOKENS, "new_tokens": NEW_TOKENS}
    if device.type == "cuda":
        settings["device"] = torch.cuda.get_device_name()
    for prompt in prompts.split(1):
        expected, dense_s = generate(opened.model, prompt, None)
        for name, loop in loops.items():
            got, seconds = generate(opened.model, prompt, loop)
            drafts = vars(loop.statistics) if isinstance(loop, Exact) else {}
            rows[name].append({"identical": torch.equal(expected, got), "speedup": dense_s / seconds, **drafts})
        results = [{"draft": name, **summary(texts)} for name, texts in rows.items()]
        write(f"exact_{device_name(arguments.device)}", settings, results)
        print(results, flush=True)


def generate(model: Any, prompt: torch.Tensor, loop: Any) -> tuple[torch.Tensor, float]:
    """A greedy text of NEW_TOKENS, and its seconds."""
    start = time.perf_counter()
    length = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS}
    out = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        do_sample=False,
        pad_token_id=0,
        **({} if loop is None else {"custom_generate": loop}),
        **length,
    )
    return out, time.perf_counter() - start


def summary(texts: list[dict[str, Any]]) -> dict[str, Any]:
    speedups = sorted(text["speedup"] for text in texts)
    result = {
        "texts": len(texts),
        "identical": sum(text["identical"] for text in texts) / len(texts),
        "speedup": statistics.median(speedups),
        "speedup_quantiles": [speedups[round(q * (len(speedups) - 1))] for q in (0.1, 0.9)],
    }
    if "drafted" in texts[0]:
        total = Statistics(**{field.name: sum(text[field.name] for text in texts) for field in fields(Statistics)})
        result |= {**total.record(), "tokens_per_dense_pass": total.new_tokens / total.dense_passes}
    return result


if __name__ == "__main__":
    main()
