"""What the README shows works, on the real embedded model, and its figures are those of the committed results."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


@pytest.mark.slow
def test_commands_run(tmp_path):
    commands = [shlex.split(line) for block in blocks("bash") for line in block.splitlines()]
    assert {command[1] for command in commands} == {"analyze", "evaluate", "convert", "generate"}
    outputs = []
    for command in commands:
        assert command[0] == "rankgate"
        argv = [sys.executable, "-m", "rankgate.cli", *command[1:]]
        done = subprocess.run(argv, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert "Traceback" not in done.stderr and "warn" not in done.stderr.lower()
        outputs.append(done.stdout)
    assert (tmp_path / "report" / "index.html").is_file()
    analysis, gsi, conversion, asvd, text = outputs
    assert "theoretical speedup" in analysis
    assert "150 of 210 layers converted" in conversion
    for table, closed in ((gsi, False), (asvd, True)):
        ratio, reads = (float(x) for x in (table.splitlines()[1].split("held-out")[1].split()[i] for i in (0, 5)))
        assert (reads < 1) == closed
        assert (1.5 < ratio < 10) if closed else (0.99 < ratio < 1.01)
    assert text.startswith("The lighthouse keeper") and len(text) > 60


@pytest.mark.slow
def test_python_runs(tmp_path):
    (code,) = blocks("python")
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    *layers, figures = done.stdout.splitlines()
    assert len(layers) == 4 and "self_attn.q_proj 144 0." in layers[0]
    ratio, top1, fire, speedup = map(float, figures.split())
    assert 1.0 < ratio < 1.5 and 0.7 < top1 < 1 and 0.5 < fire < 1 and speedup < 1


def test_generated_documents_are_up_to_date(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import render

    for path, text in render.documents().items():
        assert path.read_text(encoding="utf-8") == text, f"run python benchmarks/render.py ({path.name} is stale)"
