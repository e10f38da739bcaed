"""The examples run, on a tiny model."""

import runpy
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"
ARGUMENTS = {
    "adapter.py": ["{model}", "A text to learn.", "{out}"],
    "compare.py": ["{model}"],
    "load.py": ["{model}", "{out}"],
}
SAYS = {"adapter.py": "step 4: loss", "compare.py": "gsi: perplexity x", "load.py": "MB in"}


@pytest.mark.parametrize("name", sorted(path.name for path in EXAMPLES.glob("*.py")))
def test_example(name, model_dir, tmp_path, monkeypatch, capsys):
    argv = [a.format(model=model_dir, out=tmp_path / "out") for a in ARGUMENTS[name]]
    monkeypatch.setattr("sys.argv", [name, *argv])
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    assert SAYS[name] in capsys.readouterr().out


def test_examples_are_short():
    for path in EXAMPLES.glob("*.py"):
        assert len(path.read_text(encoding="utf-8").splitlines()) <= 20, path
