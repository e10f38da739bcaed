"""What the documents show works, on the real embedded model, and their figures are those of the committed results."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# fewer rounds and tokens for commands that take minutes as they stand
SMALLER = {"bench": ["--rounds", "2", "-n", "32"], "convert": ["--calibration-tokens", "4096"]}


def blocks(document: str, language: str) -> list[str]:
    text = (ROOT / document).read_text(encoding="utf-8")
    return re.findall(rf"```{language}\n(.*?)```", text, flags=re.DOTALL)


def run(document: str, folder: Path, verbs: set[str]) -> list[str]:
    """What the `rankgate` commands of a document print, one after the other."""
    lines = [line for block in blocks(document, "bash") for line in block.splitlines()]
    commands = [shlex.split(line) for line in lines if line.startswith("rankgate ")]
    assert {command[1] for command in commands} == verbs
    outputs = []
    for command in commands:
        argv = [sys.executable, "-m", "rankgate.cli", *command[1:], *SMALLER.get(command[1], [])]
        done = subprocess.run(argv, cwd=folder, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert "Traceback" not in done.stderr and "warn" not in done.stderr.lower()
        outputs.append(done.stdout)
    return outputs


def figures(table: str) -> tuple[float, float]:
    """Perplexity ratio, and reads over dense, of the only row of `evaluate`."""
    columns = table.splitlines()[1].split("held-out")[1].split()
    return float(columns[0]), float(columns[5])


@pytest.mark.real
def test_commands_of_the_readme(tmp_path):
    conversion, table, text = run("README.md", tmp_path, {"convert", "evaluate", "generate"})
    assert "211 of 211 layers converted" in conversion
    ratio, reads = figures(table)
    assert 0.98 < ratio < 1.1 and reads < 0.2  # of float32
    assert text.startswith("The lighthouse keeper") or len(text) > 60


@pytest.mark.slow
def test_commands_that_plan_and_measure(tmp_path):
    outputs = run("docs/commands.md", tmp_path, {"analyze", "evaluate", "convert", "bench", "generate"})
    analysis, lrq, conversion, planned, bench, text, exact = outputs
    assert (tmp_path / "report" / "index.html").is_file()
    assert "theoretical speedup" in analysis
    assert int(re.search(r"(\d+) of 211 layers converted", conversion)[1]) > 20  # by what the machine is doing else
    assert "within ppl=1.02, linear layers" in conversion
    assert (tmp_path / "smollm2-fast" / "plan.json").is_file()
    for table in (lrq, planned):
        ratio, reads = figures(table)
        assert 0.98 < ratio < 1.1 and reads < 0.9
    assert bench.startswith("model") and "smollm2-fast decode" in bench
    assert text.startswith("The lighthouse keeper") or len(text) > 60
    assert re.search(r"dense passes for 40 tokens", exact)


@pytest.mark.slow
def test_commands_about_attention(tmp_path):
    keys, selection = run("docs/attention.md", tmp_path, {"evaluate", "analyze"})
    assert 0.4 < float(re.search(r"([\d.]+)% of the keys", keys)[1]) / 100 < 0.6
    assert 0.99 < float(keys.splitlines()[1].split()[2]) < 1.1
    assert "The cascade saves" in selection
    assert (tmp_path / "report" / "index.html").is_file()


@pytest.mark.slow
def test_commands_about_other_engines(tmp_path):
    conversion, directory, file = run("docs/engines.md", tmp_path, {"convert", "export"})
    assert "210 of 211 layers converted" in conversion
    assert directory == "wrote smollm2-w4a16: 210 layers as W4A16\n"
    assert file == "wrote smollm2-q4_0.gguf: 210 layers as Q4_0\n"


@pytest.mark.slow
def test_demo(tmp_path):
    argv = [sys.executable, "-m", "rankgate.cli", "demo", "-o", str(tmp_path)]
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "x the tokens per second of dense generate()" in done.stdout
    assert (tmp_path / "index.html").is_file()


@pytest.mark.slow
def test_python(tmp_path):
    code = "".join(blocks("docs/python.md", "python") + blocks("docs/attention.md", "python"))
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    *layers, values, text = done.stdout.splitlines()[:6]
    keys = float(done.stdout.splitlines()[-1])
    assert 0.35 < keys < 0.65
    assert len(layers) == 4 and "self_attn.q_proj 576 576" in layers[0]
    ratio, top1, share, bits = map(float, values.split())
    assert 0.98 < ratio < 1.1 and 0.85 < top1 < 1 and 0.02 < share < 0.1 and 4.6 < bits < 5
    assert text.startswith("The lighthouse keeper")


def test_generated_documents_are_up_to_date(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import render

    for path, text in render.documents().items():
        assert path.read_text(encoding="utf-8") == text, f"run python benchmarks/render.py ({path.name} is stale)"


def test_links_between_documents_lead_somewhere():
    for document in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")):
        text = document.read_text(encoding="utf-8")
        for target, anchor in re.findall(r"\]\((?!https?:)([^)#\s]*)#?([^)\s]*)\)", text):
            path = (document.parent / target) if target else document
            assert path.exists(), f"{document.name}: {target}"
            if anchor:
                headings = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), flags=re.MULTILINE)
                names = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
                assert anchor in names, f"{document.name}: {target}#{anchor}"
