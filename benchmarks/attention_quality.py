"""What attention to fewer keys costs SmolLM2-135M in quality: results/attention_quality.json.

    python benchmarks/attention_quality.py ../shared/data/wikitext-2

WikiText-2 test, 8 sequences of 512, 2048 and 4096 tokens. The heads' windows are chosen on 4096 tokens of WikiText-2
valid, in sequences of the same length. As a control, one window for all heads, without representatives, that reads
about half of the keys. The file is written after every sequence. Forty minutes on two cores.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from provenance import write
from torch import Tensor
from torch.nn import functional as F

from rankgate.attention.attend import AttentionConfig, select_tokens_
from rankgate.attention.heads import try_heads
from rankgate.attention.strands import Heads
from rankgate.conversion.convert import twin
from rankgate.hub.opening import Opened, open_dense

MODEL, SEQUENCES, HEAD_TOKENS = "smollm2-135m", 8, 4096
LENGTHS, TAU, WINDOWS, SHARES = (512, 2048, 4096), 0.3, (64, 128, 256), (0.55, 0.4)
CONTROL = 0.3  # of the length: a window for all heads that reads half of the keys


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="folder with valid.txt and test.txt")
    arguments = parser.parse_args()
    opened, results = open_dense(MODEL), []
    settings = {"model": MODEL, "text": "WikiText-2 test", "sequences": SEQUENCES, "head_tokens": HEAD_TOKENS}
    for length in LENGTHS:
        windows = opened.windows(str(arguments.data / "test.txt"), SEQUENCES * length, length)
        cases = list(configs(opened, str(arguments.data / "valid.txt"), length))
        rows: list[dict[str, Any]] = [{"length": length, **name, "sequences": []} for name, _ in cases]
        for window in windows:
            reference = logits(opened.model, window)
            for row, (_, config) in zip(rows, cases, strict=True):
                row["sequences"].append(measured(opened, window, reference, config))
            write("attention_quality", settings, [*results, *rows])
            print(length, [round(row["sequences"][-1]["ratio"], 4) for row in rows], flush=True)
        results += rows


def configs(opened: Opened, valid: str, length: int) -> Iterator[tuple[dict[str, Any], AttentionConfig]]:
    yield {"rule": "paper", "tau": TAU}, AttentionConfig("paper", TAU)
    for window in WINDOWS:
        yield {"rule": "windowed", "tau": TAU, "window": window}, AttentionConfig("windowed", TAU, window)
    config = opened.model.config
    every = ((Heads(round(CONTROL * length), None),) * config.num_key_value_heads,) * config.num_hidden_layers
    yield {"rule": "one window", "window": round(CONTROL * length)}, AttentionConfig(heads=every)
    costs = try_heads(opened.model, opened.windows(valid, HEAD_TOKENS, length))
    for share in SHARES:
        plan = costs.plan(share)
        kinds: dict[str, int] = {}
        for head in (head for layer in plan.heads for head in layer):
            name = "all" if head.window is None else f"{head.window}" + (f", tau {head.tau}" if head.tau else "")
            kinds[name] = kinds.get(name, 0) + 1
        row = {"rule": "by head", "keys": share, "predicted": plan.loss, "heads": kinds}
        yield row, AttentionConfig(heads=plan.heads)


def measured(opened: Opened, window: Tensor, reference: Tensor, config: AttentionConfig) -> dict[str, float]:
    """Perplexity ratio, top-1 agreement, KL and keys read of one sequence."""
    model = twin(opened.model)
    with select_tokens_(model, config) as selection:
        candidate = logits(model, window)
    target = window[1:, None]
    more = (reference[:-1].gather(1, target) - candidate[:-1].gather(1, target)).double().mean().item()
    same = (reference[:-1].argmax(1) == candidate[:-1].argmax(1)).double().mean().item()
    kl = F.kl_div(candidate[:-1], reference[:-1], log_target=True, reduction="batchmean").item()
    return {"ratio": math.exp(more), "top1": same, "kl": kl, "keys": selection.share}


def logits(model: Any, window: Tensor) -> Tensor:
    """Log probabilities (T × vocabulary)."""
    with torch.inference_mode():
        return F.log_softmax(model(input_ids=window[None], use_cache=False).logits[0].float(), -1)


if __name__ == "__main__":
    main()
