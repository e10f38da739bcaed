"""An interrupted conversion goes on where it was."""

import pytest
import torch
from conftest import tiny_model
from safetensors.torch import load_file

from rankgate.cli.parser import main
from rankgate.conversion.walk import Walk
from rankgate.methods import lrq

OPTIONS = ("--calibration-tokens", "320", "--context", "64", "--device", "cpu")
STEPS = {"moments": (Walk, "step"), "labels": (Walk, "backward"), "codes": (lrq, "quantize_group")}


class Stopped(BaseException):
    """As by Ctrl-C."""


def convert(model, out, *options):
    return main(["convert", str(model), "-o", str(out), *OPTIONS, *options])


def interrupted(monkeypatch, step, calls, run):
    """Let `run` end at the given call of a step."""
    owner, name = STEPS[step]
    own, count = getattr(owner, name), 0

    def counted(*args, **kwargs):
        nonlocal count
        count += 1
        if count > calls:
            raise Stopped
        return own(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, counted)
        with pytest.raises(Stopped):
            run()


def counting(monkeypatch, step):
    owner, name = STEPS[step]
    own, calls = getattr(owner, name), []
    monkeypatch.setattr(owner, name, lambda *args, **kwargs: calls.append(1) or own(*args, **kwargs))
    return calls


@pytest.mark.parametrize(("step", "calls"), [("labels", 0), ("moments", 12), ("codes", 3)])
def test_the_result_is_that_of_one_run(monkeypatch, tmp_path, model_dir, capsys, step, calls):
    once, twice = tmp_path / "once", tmp_path / "twice"
    assert convert(model_dir, once) == 0
    interrupted(monkeypatch, step, calls, lambda: convert(model_dir, twice))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["once", "twice.unfinished"]
    done = counting(monkeypatch, step)
    capsys.readouterr()
    assert convert(model_dir, twice) == 0
    assert ("going on with twice.unfinished" in capsys.readouterr().err) == (step != "labels")
    assert step != "codes" or len(done) == 8 - calls
    a, b = (load_file(path / "model.safetensors") for path in (once, twice))
    assert a.keys() == b.keys() and all(torch.equal(tensor, b[name]) for name, tensor in a.items())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["once", "twice"]


@pytest.mark.parametrize("options", [("--rank", "8"), ("--calibration-tokens", "384")])
def test_other_settings_begin_anew(monkeypatch, tmp_path, model_dir, capsys, options):
    interrupted(monkeypatch, "codes", 3, lambda: convert(model_dir, tmp_path / "out"))
    capsys.readouterr()
    assert convert(model_dir, tmp_path / "out", "--method", "lrq", *options) == 0
    assert "going on" not in capsys.readouterr().err


def test_another_model_begins_anew(monkeypatch, tmp_path, tokenizer, capsys):
    model = tiny_model("llama")
    for folder in ("first", "second"):
        model.save_pretrained(tmp_path / folder)
        tokenizer.save_pretrained(tmp_path / folder)
        model.model.layers[1].mlp.down_proj.weight.data += 0.01
    interrupted(monkeypatch, "codes", 3, lambda: convert(tmp_path / "first", tmp_path / "out"))
    capsys.readouterr()
    assert convert(tmp_path / "second", tmp_path / "out") == 0
    assert "going on" not in capsys.readouterr().err


def test_bad_input_leaves_nothing(tmp_path, model_dir):
    assert convert(model_dir, tmp_path / "out", "--method", "gsi", "--rank", "1000") == 2
    assert not any(tmp_path.iterdir())
