"""Quality against bits read, for lrq, its parts one by one, and every baseline: results/curve.json.

    python benchmarks/curve.py ../shared/data/wikitext-2 [--device cuda]

SmolLM2-135M, calibrated on valid.txt, measured on test.txt. About an hour on two cores, five minutes on a GPU.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from provenance import SEED, write

from rankgate.common.terminal import quiet_libraries, show_table
from rankgate.conversion.calibration import calibrate
from rankgate.hub.opening import Opened, open_dense
from rankgate.hub.sources import DEFAULT
from rankgate.methods import ASVDConfig, GSIConfig, Int4Config, Int8Config, LRQConfig, Method, SparseConfig, SVDConfig
from rankgate.reporting.pipeline import Reference
from rankgate.reporting.tables import HEADERS, row

CONTEXT = 512
CALIBRATION_TOKENS = 16_384
TOKENS = 16_384

CURVE = {
    "rank 8": LRQConfig(rank=8, refine=0.0),
    "rank 16": LRQConfig(rank=16, refine=0.0),
    "rank 16, 2 % of the channels": LRQConfig(rank=16, refine=0.02),
    "5 %": LRQConfig(rank=16, refine=0.05),
    "9 %": LRQConfig(rank=16, refine=0.09),
    "20 %": LRQConfig(rank=16, refine=0.2),
    "36 %, asymmetric": LRQConfig(rank=16, refine=0.36, symmetric=False),
    "50 %, asymmetric": LRQConfig(rank=16, refine=0.5, symmetric=False),
    "8 bits": LRQConfig(bits=8, rank=0, refine=0.0),
}
ABLATION = {
    "rounded to nearest": Int4Config(),
    "+ error compensation": LRQConfig(rank=0, refine=0.0),
    "+ rank 16, chosen once": LRQConfig(rank=16, refine=0.0, rounds=1),
    "+ Q and A B in turn": LRQConfig(rank=16, refine=0.0),
    "+ gate, 5 % of the channels": LRQConfig(rank=16, refine=0.05),
    "gate without rank": LRQConfig(rank=0, refine=0.05),
    "rank without gate, asymmetric": LRQConfig(rank=16, refine=0.0, symmetric=False),
    "rank and gate, asymmetric": LRQConfig(rank=16, refine=0.05, symmetric=False),
}
BASELINES: dict[str, Method] = {
    "int8": Int8Config(),
    "sparse, 75 %": SparseConfig(keep=0.75),
    "sparse, 50 %": SparseConfig(keep=0.5),
    "gsi": GSIConfig(rank=0.25, eps=0.05),
    "gsi, wide gate": GSIConfig(rank=0.25, eps=0.2),
    "svd": SVDConfig(energy=0.9),
    "asvd": ASVDConfig(rank=0.5),
}


def main() -> None:
    arguments = parse(__doc__)
    quiet_libraries()
    torch.manual_seed(SEED)
    opened = open_dense(DEFAULT)
    opened.model.to(arguments.device)
    records = []
    for part, methods in (("curve", CURVE), ("ablation", ABLATION), ("baseline", BASELINES)):
        records += measure(opened, arguments.folder, methods, part)
    settings = {
        "model": DEFAULT,
        "corpus": "WikiText-2, calibrated on valid, measured on test",
        "context": CONTEXT,
        "calibration_tokens": CALIBRATION_TOKENS,
        "tokens": TOKENS,
        "device": describe_device(arguments.device),
    }
    write("curve", settings, records)


def parse(description: str | None) -> argparse.Namespace:
    """The folder with the text, and the device."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--device", default="cpu")
    return parser.parse_args()


def describe_device(device: str) -> str:
    return torch.cuda.get_device_name() if device == "cuda" else device


def measure(opened: Opened, folder: Path, methods: Mapping[str, Method], part: str) -> list[dict[str, Any]]:
    """The rows of one part of the table."""
    windows = opened.windows(str(folder / "valid.txt"), CALIBRATION_TOKENS, CONTEXT)
    stats = calibrate(opened.model, windows, sensitivity=True)
    reference = Reference.of(opened, opened.windows(str(folder / "test.txt"), TOKENS, CONTEXT), prompts=0)
    records = []
    for what, method in methods.items():
        record = {**reference.measure(method, stats).record(), "part": part, "what": what}
        record.pop("fire_rates")
        show_table(HEADERS, [row(record)])
        records.append(record)
    return records


if __name__ == "__main__":
    main()
