"""Conversations with scripted stdin; Ctrl-C in a process of its own."""

from __future__ import annotations

import io
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from rankgate.cli import main
from rankgate.decoding.loop import fast_generate
from rankgate.hub.opening import open_any
from rankgate.serving.answer import chat_tokens

SHORT = ("-n", "12", "--temperature", "0")


@pytest.fixture
def talk(chat_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """What is said on stdout to these lines; what else there was, is in `talk.notes`."""

    def talk(text: str, *options: str) -> str:
        monkeypatch.setattr(sys, "stdin", io.StringIO(text))
        assert main(["chat", str(chat_dir), "--device", "cpu", *options]) == 0
        captured = capsys.readouterr()
        talk.notes = captured.err  # type: ignore[attr-defined]
        return captured.out

    return talk


def expected(directory: Path, *lines: str, system: str | None = None) -> str:
    """Greedy answers of 12 tokens, each after all that was said before."""
    opened = open_any(str(directory))
    history, printed = [{"role": "system", "content": system}] if system else [], ""
    for line in lines:
        history.append({"role": "user", "content": line})
        ids = torch.tensor([chat_tokens(opened.tokenizer, history)])
        out = fast_generate(opened.model, ids, max_new_tokens=12, do_sample=False, pad_token_id=1)
        said = str(opened.tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True))
        history.append({"role": "assistant", "content": said})
        printed += said + "\n"
    return printed


def test_answers_follow_from_all_that_was_said(talk, chat_dir: Path):
    both = expected(chat_dir, "Hello", "And then?")
    assert both.startswith(expected(chat_dir, "Hello"))
    assert not both.endswith(expected(chat_dir, "And then?"))
    assert talk("Hello\n\n  And then? \n", *SHORT) == both


def test_reset_forgets_and_exit_ends(talk, chat_dir: Path):
    alone = expected(chat_dir, "Hello", system="Be kind")
    options = (*SHORT, "--system", "Be kind")
    assert talk("Hello\n/reset\nHello\n/exit\nHello\n", *options) == alone * 2
    assert alone != expected(chat_dir, "Hello")
    assert talk("/what\n/exit\n") == "" and talk.notes.count("/reset") == 2


def test_a_conversation_that_grows_too_long_goes_on_after_a_reset(talk, chat_dir: Path):
    hello = expected(chat_dir, "Hello")
    assert talk(f"Hello\n{'a' * 4000}\n/reset\nHello\n", *SHORT) == hello * 2
    assert "/reset" in talk.notes and "of 4000" in talk.notes
    answer = talk("a" * 3975 + "\n", *SHORT)  # with the template 3991: what fits is said
    assert 0 < len(answer) <= 10


def test_answers_are_sampled(talk):
    assert talk("Hello\n", "-n", "40") != talk("Hello\n", "-n", "40")


def test_bad_input(refuses, model_dir: Path, chat_dir: Path):
    assert "no chat template" in refuses("chat", model_dir)
    for value in ("-1", "2.5", "nan", "warm"):
        assert "from 0 to 2" in refuses("chat", chat_dir, "--temperature", value)


def test_ctrl_c_stops_the_answer_and_not_the_conversation(chat_dir: Path):
    command = [sys.executable, "-m", "rankgate.cli", "chat", str(chat_dir), "--device", "cpu", "-n", "3900"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write(b"Hello\n")
        process.stdin.flush()
        first = process.stdout.read(20)
        time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        out, errors = process.communicate(b"/reset\n/exit\n", timeout=60)
    assert process.returncode == 0, errors
    assert len(first) == 20 and len(out) < 3000
    assert b"forgotten" in errors and b"Traceback" not in errors
