"""A server on a free port of this machine, in a thread of the tests or in a process of its own, and its clients."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx2
from prometheus_client.parser import text_string_to_metric_families

from rankgate.hub.opening import Opened
from rankgate.serving.serve import Limits, Server, listen

LIMITS = {"context": 4000, "body": 20_000, "parallel": 4, "queue": 64, "seconds": 60.0, "grace": 5}
LONG = {"model": "tiny-chat", "prompt": "a", "max_tokens": 3900, "temperature": 0}


@contextlib.contextmanager
def serving(opened: Opened, key: str | None = None, **limits: float) -> Iterator[str]:
    """The address of a server."""
    listener = listen("127.0.0.1", 0)
    server = Server(opened, Limits(**{**LIMITS, **limits}), key)  # type: ignore[arg-type]
    thread = threading.Thread(target=server.run, args=(listener,))
    thread.start()
    try:
        address = f"http://127.0.0.1:{listener.getsockname()[1]}"
        assert httpx2.get(f"{address}/health", timeout=60).is_success  # it answers when it has warmed up
        yield address
    finally:
        server.http.should_exit = True
        thread.join(20)
        assert not thread.is_alive()


@contextlib.contextmanager
def process(chat_dir: Path, log: Path, *options: str) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    command = [sys.executable, "-m", "rankgate.cli", "serve", str(chat_dir), "--port", "0", "--device", "cpu", *options]
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in a shell's background job, and by its children
    with log.open("w") as errors, subprocess.Popen(command, stderr=errors) as running:
        try:
            wait_for(lambda: "is served at" in log.read_text() or running.poll() is not None)
            yield running, log.read_text().split()[-1].removesuffix("/v1")
        finally:
            running.kill()


def post(address: str, body: object, path: str = "/v1/completions", **headers: str) -> httpx2.Response:
    return httpx2.post(address + path, json=body, headers=headers, timeout=60)


def metrics(address: str) -> dict[tuple[str, ...], float]:
    """Values by name and labels."""
    text = httpx2.get(f"{address}/metrics", verify=False).text  # asked again and again: reads no certificates each time
    families = text_string_to_metric_families(text)
    return {(s.name, *s.labels.values()): s.value for family in families for s in family.samples}


def wait_for(true: Callable[[], bool]) -> None:
    until = time.monotonic() + 30
    while not true():
        assert time.monotonic() < until
        time.sleep(0.02)


@contextlib.contextmanager
def begun(address: str) -> Iterator[Iterator[str]]:
    """A long answer that is on its way: the lines that follow."""
    with httpx2.stream("POST", f"{address}/v1/completions", json={**LONG, "stream": True}, timeout=60) as response:
        lines = response.iter_lines()
        assert next(lines).startswith("data: ")
        yield lines
