"""The sections of docs/results.md about token selection."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable
from typing import Any

from rankgate.reporting.tables import markdown

PAPER_SAVED, PAPER_OVERLAP = "22–63 %", "0.83–0.94"
SELECTION = (
    *(
        "T",
        "rule",
        "τ",
        "r/T",
        "saved of T × T",
        "of its half",
        "of choosing anew",
        "like the layer before",
        "cascade like anew",
    ),
    *("inherited", "random", "added", "removed"),
)
DEPTH = (
    *("layer", "r/T", "r/T cascade", "cascade like anew", "inherited", "random", "added", "removed"),
    *("error anew", "cascade", "inherited", "random"),
)
QUALITY = ("T", "attention", "keys read", "ppl ratio", "top-1", "KL mean")


def selection(content: dict[str, Any], source: str) -> str:
    results = content["results"]
    detailed = [r for r in results if r["sequences"][0]["layers"][0]["errors"]]
    tables = "\n\n".join(
        f"T = {r['length']}, τ = {r['tau']:g}, greedy rule; errors ‖o − o_dense‖ / ‖o_dense‖ of windowed attention "
        f"(128 recent tokens):\n\n{markdown(DEPTH, depth_rows(r))}"
        for r in detailed
    )
    return f"""## Tokens that stand for others

SmolLM2-135M, {content["settings"]["text"]}, {content["settings"]["sequences"]} sequences, mean ± standard deviation
over them, of all layers. *r/T*: share of tokens that are representatives, chosen anew in every layer. *saved*: cosines
that the cascade does not compute, of the full Gram matrix (the paper: {PAPER_SAVED}), of its causal half, and of what
choosing anew by the same rule takes, which for `greedy` is a comparison with representatives only. *like the layer
before*: Jaccard overlap of the sets chosen anew in consecutive layers (the paper: {PAPER_OVERLAP}). *cascade like
anew*: of the cascade with the set chosen anew in the same layer; *inherited* and *random*: the same of the first
layer's set inherited unchecked, and of as many random tokens. *added*, *removed*: by the cascade, as shares of its
set. *stride 4*: repaired in every fourth layer only. {source}

{markdown(SELECTION, [selection_row(r) for r in results])}

{tables}
"""


def selection_row(r: dict[str, Any]) -> tuple[str, ...]:
    def layers(value: Callable[[dict[str, Any]], float | None]) -> str:
        """Of a sequence its mean over layers."""
        means = []
        for sequence in r["sequences"]:
            found = [v for layer in sequence["layers"] if (v := value(layer)) is not None]
            means.append(statistics.fmean(found))
        return spread(means)

    return (
        str(r["length"]),
        r["variant"],
        f"{r['tau']:g}",
        layers(lambda p: p["share"]),
        spread([s["saved"]["full"] for s in r["sequences"]]),
        spread([s["saved"]["causal"] for s in r["sequences"]]),
        spread([1 - total(s, "cascade_dots") / total(s, "dots") for s in r["sequences"]]),
        layers(lambda p: p["previous"]),
        *(layers(lambda p, kind=kind: p["jaccard"][kind]) for kind in ("cascade", "inherited", "random")),  # type: ignore[misc]
        layers(lambda p: p["added"]),
        layers(lambda p: p["removed"]),
    )


def total(sequence: dict[str, Any], name: str) -> float:
    return float(sum(layer[name] for layer in sequence["layers"]))


def depth_rows(r: dict[str, Any]) -> list[tuple[str, ...]]:
    rows = []
    for i, found in enumerate(zip(*(s["layers"] for s in r["sequences"]), strict=True)):
        rows.append(
            (
                str(i),
                spread([p["share"] for p in found]),
                spread([p["cascade_share"] for p in found]),
                *(spread([p["jaccard"][kind] for p in found]) for kind in ("cascade", "inherited", "random")),
                spread([p["added"] for p in found]),
                spread([p["removed"] for p in found]),
                *(spread([p["errors"][kind] for p in found]) for kind in ("anew", "cascade", "inherited", "random")),
            )
        )
    return rows


def quality(content: dict[str, Any], source: str) -> str:
    settings = content["settings"]
    return f"""## Quality with fewer keys

SmolLM2-135M, float32, {settings["text"]}, sequences of T tokens; mean ± standard deviation over {settings["sequences"]}
of them (fewer where the row says so). *keys read*: of those of dense attention. *one window*: the same window for all
heads and no representatives. *by head*: a window and a tolerance for each key head, chosen on
{settings["head_tokens"]:,} tokens of WikiText-2 valid in sequences of the same length, see
`rankgate.attention.heads`. {source}

{markdown(QUALITY, [quality_row(r) for r in content["results"] if r["sequences"]])}
"""


def speed(content: dict[str, Any], source: str) -> str:
    """One device: prefill, decoding and the cache, as multiples of dense attention's."""
    lengths: dict[int, dict[str, Any]] = {}
    for r in content["results"]:
        lengths.setdefault(r["length"], {})[r["what"]] = r
    kinds = [what for what in next(iter(lengths.values())) if what not in ("select", "cascade")]

    def prefill(rows: dict[str, Any], what: str) -> float:
        """With the selection that it needs: of states by cascade; by-head attention chooses by itself."""
        return float(rows[what]["x dense"] + (rows["cascade"]["x dense"] if what.startswith("windowed") else 0))

    times = [
        (
            *(str(T), f"{rows['select']['r']:.2f}"),
            *(f"{rows[what]['x dense']:.2f}" for what in ("select", "cascade")),
            *(f"{prefill(rows, what):.2f}" for what in kinds),
        )
        for T, rows in lengths.items()
    ]
    steps = [
        (str(T), *(f"{rows[what]['decode']:.2f}" for what in kinds), *(f"{rows[what]['cache']:.2f}" for what in kinds))
        for T, rows in lengths.items()
    ]
    pays = "\n".join(
        f"- {what}: prefill {pays_from({T: prefill(rows, what) for T, rows in lengths.items()})}, decoding "
        f"{pays_from({T: rows[what]['decode'] for T, rows in lengths.items()})}"
        for what in kinds
    )
    return f"""## Speed with fewer keys ({content["settings"]["device"]})

One layer (number {content["settings"]["layer"]}) of SmolLM2-135M on real text of T tokens; medians of
{content["settings"]["repeats"]} in turn, as multiples of `scaled_dot_product_attention` of the same queries. *anew* and
*cascade*: choosing representatives of states, alone. The others: attention with all that it needs to choose (windowed:
by cascade). {source}

{markdown(("T", "r/T", "anew", "cascade", *kinds), times)}

One new token, and bytes of the cache, likewise:

{markdown(("T", *(f"{what}: step" for what in kinds), *(f"{what}: cache" for what in kinds)), steps)}

Faster than dense attention from which T on, as far as measured:

{pays}
"""


def pays_from(ratios: dict[int, float]) -> str:
    """The least length from which on all are below 1."""
    slow = [T for T, ratio in ratios.items() if ratio >= 1]
    fast = [T for T in ratios if max(slow, default=0) < T]
    return f"from {min(fast)}" if fast else f"not up to {max(ratios)}"


def overview(content: dict[str, Any]) -> str:
    """For the README: the longest texts."""
    longest = max(r["length"] for r in content["results"])
    rows = [quality_row(r) for r in content["results"] if r["length"] == longest and r["sequences"]]
    return markdown(QUALITY[:5], [row[:5] for row in rows])


def quality_row(r: dict[str, Any]) -> tuple[str, ...]:
    if r["rule"] == "by head":
        how = f"by head, {r['keys']:.0%} asked for"
    elif r["rule"] == "one window":
        how = f"one window of {r['window']}"
    else:
        how = f"{r['rule']}, τ = {r['tau']:g}" + (f", w = {r['window']}" if "window" in r else "")
    few = "" if len(r["sequences"]) == 8 else f" ({len(r['sequences'])} sequences)"
    values = {name: [s[name] for s in r["sequences"]] for name in ("keys", "ratio", "top1", "kl")}
    return (
        str(r["length"]),
        how + few,
        spread(values["keys"]),
        spread(values["ratio"], 4),
        spread(values["top1"], 3),
        spread(values["kl"], 4),
    )


def spread(values: Iterable[float], digits: int = 2) -> str:
    """Mean ± standard deviation."""
    values = list(values)
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.fmean(values):.{digits}f} ± {deviation:.{digits}f}"
