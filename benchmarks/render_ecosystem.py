"""The sections of docs/results.md about what a model is used with: exact mode, the evaluation harness, the server."""

from __future__ import annotations

from typing import Any

from rankgate.reporting.tables import describe, markdown

EXACT = (
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
    return f"""## Exact mode ({settings.get("device", "CPU")})

{settings["model"]} in float32, {results[0]["texts"]} prompts of {settings["prompt_tokens"]} tokens from
{settings["text"]}, {settings["new_tokens"]} new tokens each, greedy. The converted model drafts, the dense one
verifies; a text is identical if every token is that of dense `generate()`. Speed: how many times as fast as that, the
median of the texts; the first row is the dense model alone in our own loop. {source}

{markdown(EXACT, [exact_row(result) for result in results])}
"""


def exact_row(result: dict[str, Any]) -> tuple[str, ...]:
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


HARNESS = ("method", "lm-evaluation-harness", "ours", "relative difference")


def harness(content: dict[str, Any], source: str) -> str:
    settings, results = content["settings"], content["results"]
    rows = [
        (
            "dense" if r["method"] is None else describe(r["method"]),
            *(f"{r[of]:.6f}" for of in ("harness", "ours")),
            f"{abs(r['harness'] / r['ours'] - 1):.1e}",
        )
        for r in results
    ]
    return f"""## lm-evaluation-harness

Perplexity per byte of {settings["model"]} on {settings["documents"]} paragraphs of Python's language reference (task
`pydoc` in `examples/tasks`), by the harness and by our own evaluation of the same tokens. {source}

{markdown(HARNESS, rows)}
"""


def serving(content: dict[str, Any], source: str) -> str:
    settings, (result,) = content["settings"], content["results"]
    ends = ", ".join(f"{int(count)} {end}" for end, count in result["answers_by_end"].items())
    memory = ", ".join(f"{value / 1e6:,.0f}" for value in result["resident_bytes"])
    mix = ", ".join(f"{count} {kind}" for kind, count in settings["mix"].items())
    rows = [(*status.split(": "), str(count)) for status, count in result["statuses"].items()]
    return f"""## Serving

{settings["requests"]} requests at concurrency {settings["concurrency"]} to SmolLM2-135M in {settings["method"]}
({mix}), of {settings["new_tokens"]} new tokens each, checked for status, order of the stream and text; the table also
counts the questions asked alone before, whose answers these must equal. Ends of the answers: {ends}.
Resident memory of the server in MB after a warm-up and after every quarter of the requests: {memory}. {source}

{markdown(("request", "status", "answers"), rows)}
"""
