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
    assert {command[1] for command in commands} == {"analyze", "evaluate", "convert", "bench", "generate"}
    outputs = []
    for command in commands:
        assert command[0] == "rankgate"
        argv = [sys.executable, "-m", "rankgate.cli", *command[1:]]
        done = subprocess.run(argv, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert "Traceback" not in done.stderr and "warn" not in done.stderr.lower()
        outputs.append(done.stdout)
    assert (tmp_path / "report" / "index.html").is_file()
    keys, selection, analysis, lrq, conversion, planned, bench, text, exact = outputs
    assert 0.4 < float(re.search(r"([\d.]+)% of the keys", keys)[1]) / 100 < 0.6
    assert 0.99 < float(keys.splitlines()[1].split()[2]) < 1.1
    assert "The cascade saves" in selection
    assert "theoretical speedup" in analysis
    assert int(re.search(r"(\d+) of 211 layers converted", conversion)[1]) > 20  # by what the machine is doing else
    assert "within ppl=1.02: predicted perplexity" in conversion
    assert (tmp_path / "smollm2-fast" / "plan.json").is_file()
    for table in (lrq, planned):
        ratio, reads = (float(x) for x in (table.splitlines()[1].split("held-out")[1].split()[i] for i in (0, 5)))
        assert 0.98 < ratio < 1.1 and reads < 0.9
    assert bench.startswith("model") and "smollm2-fast decode" in bench
    assert text.startswith("The lighthouse keeper") or len(text) > 60
    assert re.search(r"dense passes for 40 tokens", exact)


@pytest.mark.slow
def test_python_runs(tmp_path):
    code = "".join(blocks("python"))
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    *layers, figures, text = done.stdout.splitlines()[:6]
    keys = float(done.stdout.splitlines()[-1])
    assert 0.35 < keys < 0.65
    assert len(layers) == 4 and "self_attn.q_proj 576 576" in layers[0]
    ratio, top1, share, bits = map(float, figures.split())
    assert 0.98 < ratio < 1.1 and 0.85 < top1 < 1 and 0.02 < share < 0.1 and 4.6 < bits < 5
    assert text.startswith("The lighthouse keeper")


def test_generated_documents_are_up_to_date(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import render

    for path, text in render.documents().items():
        assert path.read_text(encoding="utf-8") == text, f"run python benchmarks/render.py ({path.name} is stale)"
