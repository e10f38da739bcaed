"""Every method on SmolLM2-135M and WikiText-2, held-out beside in-sample: results/foundation.json.

    python benchmarks/foundation.py ../shared/data/wikitext-2

Calibrated on valid.txt; held-out rows are measured on test.txt, in-sample rows on the beginning of what was calibrated
on. About 15 minutes on two cores.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from provenance import SEED, write

from rankgate.common.terminal import quiet_libraries, show_table
from rankgate.hub.opening import open_dense
from rankgate.hub.sources import DEFAULT
from rankgate.methods import ASVDConfig, GSIConfig, Method, SVDConfig
from rankgate.reporting.pipeline import Reference, statistics
from rankgate.reporting.tables import HEADERS, row

CONTEXT = 512
CALIBRATION_TOKENS = 16_384
TOKENS = 4_096
PROMPTS = 8

HELD_OUT: tuple[Method, ...] = (
    GSIConfig(rank=0.125, eps=0.05),
    GSIConfig(rank=0.25, eps=0.05),
    GSIConfig(rank=0.5, eps=0.05, allow_larger=True),
    GSIConfig(rank=0.25, eps=0.2),
    GSIConfig(rank=0.25, eps=0.05, basis="context"),
    GSIConfig(rank=0.25, eps=0.2, basis="context"),
    SVDConfig(energy=0.9, allow_larger=True),
    SVDConfig(energy=0.9),
    ASVDConfig(rank=0.5, allow_larger=True),
    ASVDConfig(rank=0.5),
)
IN_SAMPLE: tuple[Method, ...] = (
    GSIConfig(rank=0.25, eps=0.05),
    GSIConfig(rank=0.25, eps=0.2),
    ASVDConfig(rank=0.5, allow_larger=True),
)


def main() -> None:
    folder = Path(sys.argv[1])
    quiet_libraries()
    torch.manual_seed(SEED)
    opened = open_dense(DEFAULT)
    valid, test = str(folder / "valid.txt"), str(folder / "test.txt")
    stats = statistics(opened, valid, CALIBRATION_TOKENS, CONTEXT)
    unseen, seen = (Reference.of(opened, opened.windows(text, TOKENS, CONTEXT), PROMPTS) for text in (test, valid))
    records = []
    for method, reference in [(m, unseen) for m in HELD_OUT] + [(m, seen) for m in IN_SAMPLE]:
        records.append(reference.measure(method, stats, in_sample=reference is seen).record())
        show_table(HEADERS, [row(records[-1])])
    settings = {
        "model": DEFAULT,
        "corpus": "WikiText-2, calibrated on valid, held-out rows on test",
        "context": CONTEXT,
        "calibration_tokens": CALIBRATION_TOKENS,
        "tokens": TOKENS,
        "prompts": PROMPTS,
    }
    write("foundation", settings, records)


if __name__ == "__main__":
    main()
