"""Write docs/results.md, its charts, docs/api.md and the tables in README.md from results/*.json and docstrings.

python benchmarks/render.py            (tests check that it changes nothing)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import attention
import attention_quality
import attention_speed
import calibration
import controls
import curve
import exact
import foundation
import gpu_convert
import gpu_decode
import gpu_kernels
import harness
import memory
import render_api
import serving
import speed
from frame import ROOT, Content, load, of_devices

DOCS = ROOT / "docs"
BEGIN, END = "<!-- {}: written by benchmarks/render.py -->\n", "<!-- end of {} -->"


def main() -> None:
    for path, text in documents().items():
        path.write_text(text, encoding="utf-8")
    foundation.plot(load("foundation")).savefig(DOCS / "foundation.png", dpi=120)
    curve.plot(load("curve"), load("speed")).savefig(DOCS / "curve.png", dpi=120)
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
        ROOT / "README.md": {
            "results": curve.overview(load("curve")) + "\n\n" + speed.overview(load("speed")),
            "attention": attention_quality.overview(load("attention_quality")),
        },
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
    yield foundation.section(load("foundation"))
    yield memory.section(load("memory"))
    yield calibration.section(load("calibration"))
    yield attention_quality.section(load("attention_quality"))
    yield attention.section(load("attention"))
    yield from of_each(attention_speed.section, "attention_speed")
    yield from of_each(exact.section, "exact")
    yield harness.section(load("harness"))
    yield serving.section(load("serving"))
    yield from of_each(gpu_decode.section, "gpu_decode")
    yield from of_each(gpu_kernels.section, "gpu_kernels")
    yield "![bandwidth against bytes read, for each kernel](roofline.png)\n"
    yield from of_each(gpu_convert.section, "gpu_convert")


if __name__ == "__main__":
    main()
