"""The section of docs/results.md about the server."""

from __future__ import annotations

from typing import Any

from rankgate.tables import markdown


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
