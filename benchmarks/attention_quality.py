"""What attention to fewer keys costs SmolLM2-135M in quality: results/attention_quality.json.

    python benchmarks/attention_quality.py ../shared/data/wikitext-2

WikiText-2 test, sequences of 2,048 and 8,192 tokens. The heads' windows are chosen on WikiText-2 valid, in sequences of
the same length; once also without representatives. As a control, one window for all heads, without representatives,
that reads about half of the keys. The file is written after every sequence. Forty minutes on two cores.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import torch
from frame import MODEL, Columns, Content, Row, parser, source, spread, start, table, write
from torch import Tensor
from torch.nn import functional as F

from rankgate.attention.attend import AttentionConfig, select_tokens_
from rankgate.attention.heads import try_heads
from rankgate.attention.strands import Heads
from rankgate.common.copies import twin
from rankgate.hub.opening import Opened, open_dense

SEQUENCES, HEAD_TOKENS = 2, 8192
LENGTHS, TAU, WINDOWS, SHARES = (2048, 8192), 0.3, (128,), (0.55, 0.4)
CONTROL = 0.3  # of the length: a window for all heads that reads half of the keys


def main() -> None:
    folder = start(parser(__doc__, "folder")).folder
    opened = open_dense(MODEL)
    results: list[Row] = []
    settings = {"model": MODEL, "text": "WikiText-2 test", "sequences": SEQUENCES, "head_tokens": HEAD_TOKENS}
    for length in LENGTHS:
        windows = opened.windows(str(folder / "test.txt"), SEQUENCES * length, length)
        cases = list(configs(opened, str(folder / "valid.txt"), length))
        rows: list[Row] = [{"length": length, **name, "sequences": []} for name, _ in cases]
        for window in windows:
            reference = logits(opened.model, window)
            for row, (_, config) in zip(rows, cases, strict=True):
                row["sequences"].append(measured(opened, window, reference, config))
            write("attention_quality", settings, [*results, *rows])
            print(length, [round(row["sequences"][-1]["ratio"], 4) for row in rows], flush=True)
        results += rows


def configs(opened: Opened, valid: str, length: int) -> Iterator[tuple[Row, AttentionConfig]]:
    yield {"rule": "paper", "tau": TAU}, AttentionConfig("paper", TAU)
    for window in WINDOWS:
        yield {"rule": "windowed", "tau": TAU, "window": window}, AttentionConfig("windowed", TAU, window)
    config = opened.model.config
    every = ((Heads(round(CONTROL * length), None),) * config.num_key_value_heads,) * config.num_hidden_layers
    yield {"rule": "one window", "window": round(CONTROL * length)}, AttentionConfig(heads=every)
    costs = try_heads(opened.model, opened.windows(valid, HEAD_TOKENS, length))
    for share, representatives in [*((share, True) for share in SHARES), (SHARES[-1], False)]:
        plan = costs.plan(share, representatives=representatives)
        kinds = Counter(kind(head) for layer in plan.heads for head in layer)
        more = {"representatives": representatives, "predicted": plan.loss, "heads": kinds}
        row = {"rule": "by head", "keys": share, **more}
        yield row, AttentionConfig(heads=plan.heads)


def kind(head: Heads) -> str:
    return "all" if head.window is None else f"{head.window}" + (f", tau {head.tau}" if head.tau else "")


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


def how(r: Row) -> str:
    """The rule, and of how many sequences the row is if not of all."""
    if r["rule"] == "by head":
        rule = f"by head, {r['keys']:.0%} asked for" + ("" if r["representatives"] else ", no representatives")
    elif r["rule"] == "one window":
        rule = f"one window of {r['window']}"
    else:
        rule = f"{r['rule']}, τ = {r['tau']:g}" + (f", w = {r['window']}" if "window" in r else "")
    few = len(r["sequences"]) < SEQUENCES
    return rule + (f" ({len(r['sequences'])} sequences)" if few else "")


def of_sequences(name: str, digits: int) -> Callable[[Row], str]:
    return lambda r: spread((s[name] for s in r["sequences"]), digits)


QUALITY: Columns = {
    "T": lambda r: str(r["length"]),
    "attention": how,
    "keys read": of_sequences("keys", 2),
    "ppl ratio": of_sequences("ratio", 4),
    "top-1": of_sequences("top1", 3),
}
DIVERGENCE: Columns = {"KL mean": of_sequences("kl", 4)}


def overview(content: Content) -> str:
    """For the README: the longest texts."""
    longest = max(r["length"] for r in content["results"])
    return table((r for r in content["results"] if r["length"] == longest and r["sequences"]), QUALITY)


def section(content: Content) -> str:
    settings = content["settings"]
    return f"""## Quality with fewer keys

SmolLM2-135M, float32, {settings["text"]}, sequences of T tokens; mean ± standard deviation over {settings["sequences"]}
of them (fewer where the row says so). *keys read*: of those of dense attention. *one window*: the same window for all
heads and no representatives. *by head*: a window and a tolerance for each key head, chosen on
{settings["head_tokens"]:,} tokens of WikiText-2 valid in sequences of the same length, see
`rankgate.attention.heads`. {source(content)}

{table((r for r in content["results"] if r["sequences"]), QUALITY, DIVERGENCE)}
"""


if __name__ == "__main__":
    main()
