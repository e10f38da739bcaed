"""Which tokens stand for others in SmolLM2-135M, layer by layer, full selection and cascade: results/attention.json.

    python benchmarks/attention.py ../shared/data/wikitext-2

WikiText-2 test, sequences of 512 and 2048 tokens, τ of 0.1 to 0.5. Errors of attention outputs at τ = 0.3 only,
which is the paper's; other rules there and in the shorter sequences only. Quarter of an hour on two cores.
"""

from __future__ import annotations

import functools
import json
import operator
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from frame import MODEL, Columns, Content, Row, parser, record, source, spread, start, table

from rankgate.attention.attend import AttentionConfig
from rankgate.attention.profile import LayerProfile, profile, savings
from rankgate.hub.opening import Opened, open_dense

SEQUENCES = 8
LENGTHS, TAUS, PAPER = (512, 2048), (0.1, 0.2, 0.3, 0.5), 0.3
OTHERS: dict[str, Any] = {"earlier": {"select": "earlier"}, "centred": {"centred": True}, "stride 4": {"stride": 4}}
PAPER_SAVED, PAPER_OVERLAP = "22–63 %", "0.83–0.94"


def main() -> None:
    folder = start(parser(__doc__, "folder")).folder
    settings = {"model": MODEL, "text": "WikiText-2 test", "sequences": SEQUENCES}
    record("attention", settings, measured(open_dense(MODEL), folder))


def measured(opened: Opened, folder: Path) -> Iterator[Row]:
    for length in LENGTHS:
        windows = opened.windows(str(folder / "test.txt"), SEQUENCES * length, length)
        cases = [("greedy", tau) for tau in TAUS] + [(name, PAPER) for name in OTHERS if length == LENGTHS[0]]
        for name, tau in cases:
            config = AttentionConfig(tau=tau, **OTHERS.get(name, {}))
            found = profile(opened.model, windows, config, errors=(name, tau) == ("greedy", PAPER))
            yield {"length": length, "variant": name, "tau": tau, "sequences": [summary(layers) for layers in found]}


def summary(layers: list[LayerProfile]) -> Row:
    rows = [{k: v for k, v in vars(layer).items() if k != "chosen"} for layer in layers]
    return rounded({"saved": vars(savings(layers)), "layers": rows})


def rounded(row: Row) -> Row:
    """To four digits, for a smaller file."""
    short: Row = json.loads(json.dumps(row), parse_float=lambda digits: round(float(digits), 4))
    return short


def of_layers(*path: str) -> Callable[[Row], str]:
    """A cell: over sequences, what lies at `path` in a layer, the mean of the layers that have it."""

    def cell(r: Row) -> str:
        values = [[functools.reduce(operator.getitem, path, layer) for layer in s["layers"]] for s in r["sequences"]]
        return spread(statistics.fmean(v for v in found if v is not None) for found in values)

    return cell


def saved(s: Row) -> float:
    """Of the cosines that choosing anew takes, in one sequence."""
    done, all_of_them = (sum(layer[name] for layer in s["layers"]) for name in ("cascade_dots", "dots"))
    return float(1 - done / all_of_them)


COMPARED: Columns = {
    "cascade like anew": of_layers("jaccard", "cascade"),
    "inherited": of_layers("jaccard", "inherited"),
    "random": of_layers("jaccard", "random"),
    "added": of_layers("added"),
    "removed": of_layers("removed"),
}
SELECTION: Columns = {
    "T": lambda r: str(r["length"]),
    "rule": lambda r: r["variant"],
    "τ": lambda r: f"{r['tau']:g}",
    "r/T": of_layers("share"),
    "saved of T × T": lambda r: spread(s["saved"]["full"] for s in r["sequences"]),
    "of its half": lambda r: spread(s["saved"]["causal"] for s in r["sequences"]),
    "of choosing anew": lambda r: spread(map(saved, r["sequences"])),
    "like the layer before": of_layers("previous"),
}
DEPTH: Columns = {
    "layer": lambda r: str(r["layer"]),
    "r/T": of_layers("share"),
    "r/T cascade": of_layers("cascade_share"),
}
ERRORS: Columns = {
    "error anew": of_layers("errors", "anew"),
    "cascade": of_layers("errors", "cascade"),
    "inherited": of_layers("errors", "inherited"),
    "random": of_layers("errors", "random"),
}


def section(content: Content) -> str:
    results = content["results"]
    detailed = [r for r in results if r["sequences"][0]["layers"][0]["errors"]]
    tables = "\n\n".join(
        f"T = {r['length']}, τ = {r['tau']:g}, greedy rule; errors ‖o − o_dense‖ / ‖o_dense‖ of windowed attention "
        f"(128 recent tokens):\n\n{table(by_layer(r), DEPTH, COMPARED, ERRORS)}"
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
set. *stride 4*: repaired in every fourth layer only. {source(content)}

{table(results, SELECTION, COMPARED)}

{tables}
"""


def by_layer(r: Row) -> list[Row]:
    """A row for each layer: the same sequences, of this layer alone."""
    count = len(r["sequences"][0]["layers"])
    return [{"layer": i, "sequences": [{"layers": [s["layers"][i]]} for s in r["sequences"]]} for i in range(count)]


if __name__ == "__main__":
    main()
