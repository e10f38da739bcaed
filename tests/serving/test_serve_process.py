"""`rankgate serve` as a process: signals, patience, bad options."""

from __future__ import annotations

import json
import signal
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx2
import pytest
from server import LONG, begun, metrics, post, process, wait_for

from rankgate.serving.serve import listen


@pytest.mark.parametrize(("sent", "code"), [(signal.SIGTERM, -signal.SIGTERM), (signal.SIGINT, 130)])
def test_running_answers_finish_before_the_server_does(chat_dir: Path, tmp_path: Path, sent: signal.Signals, code: int):
    with process(chat_dir, tmp_path / "log", "--grace", "60") as (running, address):
        with begun(address) as lines:
            running.send_signal(sent)
            events = [line for line in lines if line]
        assert events[-1] == "data: [DONE]"
        assert json.loads(events[-2].removeprefix("data: "))["choices"][0]["finish_reason"] == "length"
        assert running.wait(20) == code
        with pytest.raises(httpx2.ConnectError):
            httpx2.get(f"{address}/health")


def test_patience_ends(chat_dir: Path, tmp_path: Path):
    with process(chat_dir, tmp_path / "log", "--grace", "1") as (running, address):
        with begun(address) as lines, ThreadPoolExecutor(20) as pool:
            waiting = [pool.submit(post, address, LONG) for _ in range(20)]
            wait_for(lambda: metrics(address)["rankgate_unfinished",] > 15)
            running.send_signal(signal.SIGTERM)
            assert running.wait(20) == -signal.SIGTERM
            events = [line for line in lines if line]
            assert events[-1] == "data: [DONE]" or "the server is stopping" in events[-1]
            codes = [request.result().status_code for request in waiting]
        assert 503 in codes and {*codes} <= {200, 503}
    assert "Traceback" not in (tmp_path / "log").read_text()


def test_bad_options_are_one_line(refuses, chat_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "empty").write_text("\n")
    with listen("127.0.0.1", 0) as taken:
        cases = {
            ("--port", str(taken.getsockname()[1])): "choose another --port",
            ("--port", "70000"): "cannot listen at",
            ("--port", "0", "--host", "no.such.host.invalid"): "cannot listen at",
            ("--port", "0", "--context", "5000"): "longer than the 4000 positions",
            ("--port", "0", "--api-key-file", str(tmp_path / "none")): "cannot read the key",
            ("--port", "0", "--api-key-file", str(tmp_path / "empty")): "is empty",
            ("--max-queue", "-1"): "argument --max-queue",
        }
        for options, message in cases.items():
            assert message in refuses("serve", chat_dir, *options), options
    monkeypatch.setenv("RANKGATE_API_KEY", "")
    assert "RANKGATE_API_KEY is empty" in refuses("serve", chat_dir)
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    monkeypatch.delitem(sys.modules, "rankgate.serving.serve")
    assert "pip install 'rankgate[serve]'" in refuses("serve", chat_dir)
