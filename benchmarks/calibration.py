"""What calibration costs: results/calibration.json.

    python benchmarks/calibration.py

Calibration over plain forward passes on the same tokens, the two run in turn and their medians divided; on
SmolLM2-135M as the number of tokens grows, and on random Llamas as the width grows. About 8 minutes on two
cores that do nothing else.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from provenance import SEED, write
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from rankgate.common.terminal import quiet_libraries
from rankgate.conversion.calibration import calibrate
from rankgate.hub.sources import DEFAULT, load, resolve

CONTEXT = 512
BATCH = 4
REPEATS = 3
TOKENS = (2_048, 4_096, 8_192)
WIDTHS = (256, 512, 1024, 2048)
WIDTH_TOKENS = 2_048


def main() -> None:
    quiet_libraries()
    torch.manual_seed(SEED)
    results = []
    model, _ = load(resolve(DEFAULT))
    for tokens in TOKENS:
        results.append({"what": "tokens", "tokens": tokens, "width": 576, **cost(model, tokens)})
        print(results[-1], flush=True)
    for width in WIDTHS:
        results.append({"what": "width", "tokens": WIDTH_TOKENS, "width": width, **cost(llama(width), WIDTH_TOKENS)})
        print(results[-1], flush=True)
    write("calibration", {"context": CONTEXT, "batch": BATCH, "repeats": REPEATS}, results)


def cost(model: PreTrainedModel, tokens: int) -> dict[str, float]:
    """Seconds of calibration over seconds of the plain forward passes (median of interleaved repeats)."""
    windows = torch.randint(10, model.config.vocab_size, (tokens // CONTEXT, CONTEXT))

    def forward() -> None:
        with torch.inference_mode():
            for batch in windows.split(BATCH):
                model(input_ids=batch, use_cache=False)

    forward()
    pairs = [(seconds(forward), seconds(lambda: calibrate(model, windows, batch_size=BATCH))) for _ in range(REPEATS)]
    plain, calibration = (statistics.median(column) for column in zip(*pairs, strict=True))
    return {"ratio": calibration / plain, "ratios": [c / p for p, c in pairs], "per_token": calibration / tokens}


def seconds(run: Callable[[], object]) -> float:
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def llama(width: int) -> PreTrainedModel:
    config = LlamaConfig(
        vocab_size=8_192,
        hidden_size=width,
        intermediate_size=width * 8 // 3,
        num_hidden_layers=4,
        num_attention_heads=width // 64,
        num_key_value_heads=width // 64,
    )
    return LlamaForCausalLM(config).eval()


if __name__ == "__main__":
    main()
