"""The same bytes in llama.cpp: Q4_0 and Q8_0 files of ours and of llama-quantize, by its own KL: results/blocks.json.

    python benchmarks/blocks.py ../shared/data/wikitext-2 BIN SMOLLM2.gguf GEMMA.gguf

BIN: with llama.cpp's `llama-quantize`, `llama-imatrix` and `llama-perplexity`, built natively. The other two are dense
GGUF files (bfloat16); SmolLM2's weights are dithered off the 4-bit grid that they come from, see `controls`. Linears
are quantised by both, embeddings stay as they are. Calibration is the default text for both. 15 minutes on two cores.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from controls import noise
from frame import SEED, Columns, Content, Row, parser, record, source, start, table
from gguf import GGMLQuantizationType, GGUFReader
from memory import run

from rankgate.hub import texts
from rankgate.hub.export import gguf as exported
from rankgate.reporting.tables import number

CONTEXT, CALIBRATION, EVALUATED = 512, 32, 16  # tokens of a window, and windows
FLOAT32 = 0  # general.file_type
EMBEDDINGS = ("--token-embedding-type", "bf16", "--output-tensor-type", "bf16")
OURS_ALL = ("--method", "lrq", "--rank", "0", "--refine", "0", "--group-size", "32")
OURS = {"Q4_0": ("--bits", "4"), "Q8_0": ("--bits", "8")}


def main() -> None:
    options = parser(__doc__, "folder")
    options.add_argument("bin", type=Path)
    options.add_argument("smollm2", type=Path)
    options.add_argument("gemma", type=Path)
    arguments = start(options)
    settings = {"context": CONTEXT, "calibration_windows": CALIBRATION, "windows": EVALUATED}
    with tempfile.TemporaryDirectory() as scratch:
        record("blocks", settings, measured(arguments, Path(scratch)))


def measured(arguments: argparse.Namespace, scratch: Path) -> Iterator[Row]:
    calibration = scratch / "calibration.txt"
    calibration.write_text(texts.load_text(texts.CALIBRATION), encoding="utf-8")
    dithered = scratch / "smollm2-dithered.gguf"
    dither(arguments.smollm2, dithered)
    for model, dense in (("SmolLM2-135M, dithered", dithered), ("Gemma-3-270M", arguments.gemma)):
        tools = Tools(arguments.bin, dense, arguments.folder / "test.txt", scratch)
        tools.run("imatrix", "-f", calibration, "-o", scratch / "imatrix.gguf", "--chunks", CALIBRATION)
        for kind, options in OURS.items():
            for name, more in (("llama-quantize", ()), ("with imatrix", ("--imatrix", scratch / "imatrix.gguf"))):
                file = scratch / "theirs.gguf"
                subprocess.run(
                    [arguments.bin / "llama-quantize", "--pure", *EMBEDDINGS, *more, dense, file, kind],
                    check=True,
                    capture_output=True,
                )
                yield {"model": model, "type": kind, "by": name, **tools.measure(file)}
            tokens = str(CONTEXT * CALIBRATION)
            with tempfile.TemporaryDirectory(dir=scratch) as folder:
                ours, file = Path(folder) / "ours", Path(folder) / "ours.gguf"
                run(["convert", str(dense), "-o", str(ours), *OURS_ALL, *options, "--calibration-tokens", tokens])
                run(["export", str(ours), "-o", str(file), "--format", "gguf"])
                yield {"model": model, "type": kind, "by": "rankgate", **tools.measure(file)}


class Tools:
    """llama.cpp's, on a dense file and what is made of it."""

    def __init__(self, folder: Path, dense: Path, text: Path, scratch: Path) -> None:
        self.folder, self.dense, self.text, self.base = folder, dense, text, scratch / "base.kld"
        self.run("perplexity", *self._windows(), "--kl-divergence-base", self.base)

    def _windows(self) -> tuple[Any, ...]:
        return "-f", self.text, "--chunks", EVALUATED

    def run(self, tool: str, *options: Any, model: Path | None = None) -> str:
        """What a tool prints."""
        command = [self.folder / f"llama-{tool}", "-m", model or self.dense, "-c", CONTEXT, "-t", 2, *options]
        done = subprocess.run([str(word) for word in command], check=True, capture_output=True, text=True)
        return done.stdout + done.stderr

    def measure(self, file: Path) -> dict[str, float]:
        """KL in nats and top-1 of a file against the dense one, and its bytes."""
        said = self.run(
            "perplexity", *self._windows(), "--kl-divergence-base", self.base, "--kl-divergence", model=file
        )
        return {
            "kl_mean": figure(said, r"Mean\s+KLD:\s+([\d.]+)"),
            "top1": figure(said, r"Same top p:\s+([\d.]+)") / 100,
            "bytes": file.stat().st_size,
        }


def figure(said: str, pattern: str) -> float:
    found = re.search(pattern, said)
    if found is None:
        raise RuntimeError(f"llama.cpp printed no {pattern}: {said[-300:]}")
    return float(found[1])


def dither(dense: Path, file: Path) -> None:
    """The same file with the noise of `controls` on every linear, in float32."""
    reader, generator = GGUFReader(dense), torch.Generator().manual_seed(SEED)
    others: dict[str, tuple[np.ndarray, GGMLQuantizationType]] = {}
    for tensor in reader.tensors:
        if tensor.name.startswith("blk.") and len(tensor.shape) == 2:
            W = torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type).astype(np.float32))
            others[tensor.name] = (W + noise(W, generator)).numpy(), GGMLQuantizationType.F32
    exported.copy(reader, file, others, FLOAT32)


def section(content: Content) -> str:
    rows = content["results"]
    best = {(row["model"], row["type"]): row["kl_mean"] for row in rows if row["by"] == "with imatrix"}

    def share(row: Mapping[str, Any]) -> str:
        reference = best.get((row["model"], row["type"]))
        return "-" if reference is None else number(row["kl_mean"] / reference, 2)

    columns: Columns = {
        "model": lambda r: r["model"],
        "format": lambda r: r["type"],
        "codes by": lambda r: r["by"],
        "KL": lambda r: number(r["kl_mean"], 4),
        "same top token": lambda r: f"{r['top1']:.1%}",
        "MB": lambda r: f"{r['bytes'] / 1e6:.1f}",
        "KL × with imatrix": share,
    }
    settings = content["settings"]
    return f"""## The same bytes in llama.cpp

Files of the same format and size, opened by llama.cpp, which says the KL to the dense file itself
(`llama-perplexity --kl-divergence`, {settings["windows"]} windows of {settings["context"]} tokens of WikiText-2 test).
Ours are `lrq --rank 0 --refine 0 --group-size 32`, exported; theirs by `llama-quantize --pure`, without and with an
importance matrix. Both are calibrated on {settings["calibration_windows"]} windows of the default text.

{table(rows, columns)}

{source(content)}
"""


if __name__ == "__main__":
    main()
