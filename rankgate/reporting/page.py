"""One HTML file that can be read without the terminal (images are inside it), and the plots beside it."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import jinja2
from matplotlib.figure import Figure

from rankgate.common.files import atomic_path


@dataclass(frozen=True)
class Plot:
    """A figure with the file name, the heading and the explanation that it is shown with."""

    file: str
    title: str
    caption: str
    figure: Figure


@dataclass(frozen=True)
class Report:
    """What the HTML shows: a heading, facts, titled tables (headers, rows), samples (title, text) and plots."""

    title: str
    facts: Mapping[str, str]
    tables: Sequence[tuple[str, str, Sequence[str], Sequence[Sequence[str]]]] = ()
    samples: Sequence[tuple[str, str]] = ()
    plots: Sequence[Plot] = field(default_factory=list)

    def write(self, directory: str | Path) -> Path:
        """Write `index.html` and the PNG files into `directory` (made if absent) and return the HTML's path."""
        directory = Path(directory)
        images = {}
        for plot in self.plots:
            with atomic_path(directory / plot.file) as temporary:
                plot.figure.savefig(temporary, dpi=120)
            images[plot.file] = base64.b64encode((directory / plot.file).read_bytes()).decode()
        environment = jinja2.Environment(loader=jinja2.PackageLoader("rankgate.reporting"), autoescape=True)
        html = environment.get_template("report.html").render(report=self, images=images)
        with atomic_path(directory / "index.html") as temporary:
            temporary.write_text(html, encoding="utf-8")
        return directory / "index.html"
