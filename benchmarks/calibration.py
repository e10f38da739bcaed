"""What calibration costs: results/calibration.json.

    python benchmarks/calibration.py

Calibration over plain forward passes on the same tokens, the two run in turn and their medians divided; on
SmolLM2-135M as the number of tokens grows, and on random Llamas as the width grows. About 8 minutes on two
cores that do nothing else.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator

import torch
from frame import MODEL, Columns, Content, Row, in_turn, parser, record, source, start, table
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from rankgate.conversion.calibration import calibrate
from rankgate.hub.sources import load, resolve

CONTEXT, BATCH, REPEATS = 512, 4, 3
TOKENS = (2_048, 4_096, 8_192)
WIDTHS, WIDTH_TOKENS = (256, 512, 1024, 2048), 2_048


def main() -> None:
    start(parser(__doc__))
    record("calibration", {"context": CONTEXT, "batch": BATCH, "repeats": REPEATS}, measured())


def measured() -> Iterator[Row]:
    model, _ = load(resolve(MODEL))
    for tokens in TOKENS:
        yield {"what": "tokens", "tokens": tokens, "width": 576, **cost(model, tokens)}
    for width in WIDTHS:
        yield {"what": "width", "tokens": WIDTH_TOKENS, "width": width, **cost(llama(width), WIDTH_TOKENS)}


def cost(model: PreTrainedModel, tokens: int) -> Row:
    """Seconds of calibration over seconds of the plain forward passes."""
    windows = torch.randint(10, model.config.vocab_size, (tokens // CONTEXT, CONTEXT))

    def forward() -> None:
        with torch.inference_mode():
            for batch in windows.split(BATCH):
                model(input_ids=batch, use_cache=False)

    calls = {"forward": forward, "calibrate": lambda: calibrate(model, windows, batch_size=BATCH)}
    plain, calibrating = in_turn(calls, REPEATS).values()
    ratios = [c / p for p, c in zip(plain, calibrating, strict=True)]
    typical = statistics.median(calibrating)
    return {"ratio": typical / statistics.median(plain), "ratios": ratios, "per_token": typical / tokens}


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


COSTS: Columns = {
    "model": lambda r: "SmolLM2-135M" if r["what"] == "tokens" else "random Llama, 4 layers",
    "width": lambda r: f"{r['width']}",
    "tokens": lambda r: f"{r['tokens']:,}",
    "ratio": lambda r: f"{r['ratio']:.2f}",
    "range": lambda r: f"{min(r['ratios']):.2f} – {max(r['ratios']):.2f}",
}


def section(content: Content) -> str:
    return f"""## What calibration costs

Calibration over plain forward passes on the same tokens, run in turn {content["settings"]["repeats"]} times; the
ratio of the medians, and the range of the ratios. {source(content)}

{table(content["results"], COSTS)}
"""


if __name__ == "__main__":
    main()
