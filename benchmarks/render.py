"""Write docs/results.md, its charts, docs/api.md and the tables in other documents from results/*.json and docstrings.

python benchmarks/render.py            (tests check that it changes nothing)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import architectures
import attention
import attention_quality
import attention_speed
import blocks
import calibration
import calibration_texts
import concurrency
import controls
import curve
import exact
import foundation
import gpu_attention
import gpu_batches
import gpu_convert
import gpu_decode
import gpu_exact
import gpu_experts
import gpu_kernels
import gpu_tensor_parallel
import harness
import memory
import peers
import render_api
import serving
import speed
from frame import ROOT, Columns, Content, load, of_devices, shown, table

from rankgate.reporting.tables import describe, number

DOCS = ROOT / "docs"
BEGIN, END = "<!-- {}: written by benchmarks/render.py -->\n", "<!-- end of {} -->"


def main() -> None:
    for path, text in documents().items():
        path.write_text(text, encoding="utf-8")
    foundation.plot(load("foundation")).savefig(DOCS / "foundation.png", dpi=120)
    curve.plot(load("curve"), load("speed")).savefig(DOCS / "curve.png", dpi=120)
    peers.plot(of_devices("peers")).savefig(DOCS / "peers.png", dpi=120)
    gpu_kernels.plot(of_devices("gpu_kernels")).savefig(DOCS / "roofline.png", dpi=120)


def documents() -> dict[Path, str]:
    """Every generated text by its path."""
    return {
        **{path: filled(path, texts) for path, texts in marked().items()},
        DOCS / "api.md": render_api.reference(),
        DOCS / "results.md": "\n".join(results()),
    }


def marked() -> dict[Path, dict[str, str]]:
    """What goes between marks of files that are written by hand: by file and mark."""
    return {
        ROOT / "README.md": {"results": overview(), "peers": peers.overview()},
        DOCS / "attention.md": {"attention": attention_quality.overview(load("attention_quality"))},
    }


def overview() -> str:
    """The README's table: what is fast and what that costs, and what the published methods cost, which are not."""
    fast = [{"what": speed.label(r), "speedup": r["decode_speedup"], **r["quality"]} for r in speed.rows(load("speed"))]
    published = [
        {**r, "what": describe(r["method"]), "speedup": None, "bits": curve.bits(r)}
        for r in load("curve")["results"]
        if r["method"]["name"] in {"gsi", "svd"}
    ]
    return table([*(r for r in fast if r["what"] in FAST), *published], OVERVIEW)


FAST = (
    *("bfloat16 generate", "bfloat16 torchao int8 generate compiled", "bfloat16 torchao int4 generate compiled"),
    *("int8 decode", "plan for ppl=1.01 decode", "lrq r=16 refine=0.2 decode", "lrq r=16 decode"),
)
OVERVIEW: Columns = {
    "model, loop": lambda r: r["what"],
    "bits": lambda r: f"{r['bits']:.2f}",
    "ppl ratio": lambda r: number(r["ppl_ratio"], 4),
    "top-1": lambda r: number(r["top1"], 4),
    "decode x generate()": lambda r: shown(r["speedup"], ".2f"),
}


def filled(path: Path, texts: dict[str, str]) -> str:
    """The file with each of `texts` between the marks of its name."""
    text = path.read_text(encoding="utf-8")
    for name, content in texts.items():
        begin, end = BEGIN.format(name), END.format(name)
        before, rest = text.split(begin)
        _, after = rest.split(end)
        text = f"{before}{begin}{content}\n{end}{after}"
    return text


def results() -> Iterator[str]:
    """The sections of docs/results.md."""

    def of_each(section: Callable[[Content], str], name: str) -> Iterator[str]:
        return map(section, of_devices(name))

    yield "# Results\n\nWritten by `benchmarks/render.py` from `benchmarks/results/*.json`; do not edit.\n"
    yield curve.section(load("curve"))
    yield controls.section(load("controls"))
    yield speed.plans(load("plans"))
    yield speed.section(load("speed"))
    yield peers.section()
    yield blocks.section(load("blocks"))
    yield foundation.section(load("foundation"))
    yield memory.section(load("memory"))
    yield from of_each(architectures.section, "architectures")
    yield calibration.section(load("calibration"))
    yield calibration_texts.section(load("calibration_texts"))
    yield attention_quality.section(load("attention_quality"))
    yield attention.section(load("attention"))
    yield from of_each(attention_speed.section, "attention_speed")
    yield from of_each(gpu_attention.section, "gpu_attention")
    yield from of_each(exact.section, "exact")
    yield harness.section(load("harness"))
    yield serving.section(load("serving"))
    yield concurrency.section(load("concurrency"))
    yield from of_each(gpu_decode.section, "gpu_decode")
    yield from of_each(gpu_experts.section, "gpu_experts")
    yield from of_each(gpu_kernels.section, "gpu_kernels")
    yield "![bandwidth against bytes read, for each kernel](roofline.png)\n"
    yield from of_each(gpu_batches.section, "gpu_batches")
    yield from of_each(gpu_tensor_parallel.section, "gpu_tensor_parallel")
    yield from of_each(gpu_exact.section, "gpu_exact")
    yield from of_each(gpu_convert.section, "gpu_convert")


if __name__ == "__main__":
    main()
