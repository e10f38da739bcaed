"""Which tokens stand for others in SmolLM2-135M, layer by layer, full selection and cascade: results/attention.json.

    python benchmarks/attention.py ../shared/data/wikitext-2

WikiText-2 test, sequences of 512 and 2048 tokens, τ of 0.1 to 0.5. Errors of attention outputs at τ = 0.3 only,
which is the paper's; other rules there and in the shorter sequences only. Quarter of an hour on two cores.
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import Any

from provenance import write

from rankgate.attention.attend import AttentionConfig
from rankgate.attention.profile import LayerProfile, profile, savings
from rankgate.common.progress import track
from rankgate.hub.opening import open_dense

MODEL, SEQUENCES = "smollm2-135m", 8
LENGTHS, TAUS, PAPER = (512, 2048), (0.1, 0.2, 0.3, 0.5), 0.3
VARIANTS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "earlier": {"select": "earlier"},
    "centred": {"centred": True},
    "stride 4": {"stride": 4},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="folder with test.txt")
    arguments = parser.parse_args()
    opened = open_dense(MODEL)
    results = []
    for length in LENGTHS:
        windows = opened.windows(str(arguments.data / "test.txt"), SEQUENCES * length, length)
        others = VARIANTS if length == LENGTHS[0] else {}
        cases = [("greedy", tau) for tau in TAUS] + [(name, PAPER) for name in others if name != "greedy"]
        for name, tau in track(cases, f"{length} tokens"):
            config = AttentionConfig(tau=tau, **VARIANTS[name])
            found = profile(opened.model, windows, config, errors=(name, tau) == ("greedy", PAPER))
            results.append({"length": length, "variant": name, "tau": tau, "sequences": [summary(s) for s in found]})
            write("attention", {"model": MODEL, "text": "WikiText-2 test", "sequences": SEQUENCES}, results)


def summary(layers: list[LayerProfile]) -> dict[str, Any]:
    rows = [{k: v for k, v in vars(layer).items() if k != "chosen"} for layer in layers]
    short: dict[str, Any] = rounded({"saved": dataclasses.asdict(savings(layers)), "layers": rows})
    return short


def rounded(value: Any) -> Any:
    """To four digits, for a smaller file."""
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [rounded(item) for item in value]
    return round(value, 4) if isinstance(value, float) else value


if __name__ == "__main__":
    main()
