"""The section of docs/results.md about exact mode."""

from __future__ import annotations

from typing import Any

from rankgate.tables import markdown

HEADERS = (
    "draft",
    "identical texts",
    "acceptance",
    "accepted per verification",
    "tokens per dense pass",
    "pauses per text",
    "speed (tenth to ninetieth percentile)",
)


def exact(content: dict[str, Any], source: str) -> str:
    settings, results = content["settings"], content["results"]
    return f"""## Exact mode (CPU)

{settings["model"]} in float32, {results[0]["texts"]} prompts of {settings["prompt_tokens"]} tokens from
{settings["text"]}, {settings["new_tokens"]} new tokens each, greedy. The converted model drafts, the dense one
verifies; a text is identical if every token is that of dense `generate()`. Speed: how many times as fast as that, the
median of the texts; the first row is the dense model alone in our own loop. {source}

{markdown(HEADERS, [row(result) for result in results])}
"""


def row(result: dict[str, Any]) -> tuple[str, ...]:
    low, high = result["speedup_quantiles"]
    drafts = ("–",) * 4
    if "drafted" in result:
        drafts = (
            f"{result['acceptance']:.3f}",
            f"{result['mean_accepted']:.2f}",
            f"{result['tokens_per_dense_pass']:.2f}",
            f"{result['pauses'] / result['texts']:.1f}",
        )
    identical = f"{result['identical'] * result['texts']:.0f} of {result['texts']}"
    return (result["draft"], identical, *drafts, f"{result['speedup']:.2f} ({low:.2f}–{high:.2f})")
