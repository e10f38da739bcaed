"""`rankgate chat`: a conversation in the terminal."""

from __future__ import annotations

import contextlib
import dataclasses
import signal
import sys
import threading
from collections.abc import Iterator
from typing import Any

from rankgate.common.terminal import say
from rankgate.decoding.batch import Batch
from rankgate.hub.opening import Opened
from rankgate.serving.answer import Sampling, answer, chat_tokens, context_length
from rankgate.serving.stream import Piece

HELP = "/reset begins anew, /exit or the end of the file ends it, Ctrl-C stops an answer"


def chat(opened: Opened, system: str | None, sampling: Sampling) -> None:
    """Answer lines of stdin on stdout, each in view of the ones before, up to the end of the file or /exit.

    Raises RankgateError if the tokenizer has no chat template.
    """
    beginning = [{"role": "system", "content": system}] if system else []
    context = context_length(opened)
    history = list(beginning)
    chat_tokens(opened.tokenizer, [*history, {"role": "user", "content": ""}])  # whether there is a template at all
    say(HELP)
    for line in lines():
        if line == "/exit":
            return
        if line == "/reset":
            history = list(beginning)
            say("forgotten")
        elif line.startswith("/"):
            say(HELP)
        elif line:
            history.append({"role": "user", "content": line})
            prompt = chat_tokens(opened.tokenizer, history)
            room = context - len(prompt)
            if room < 1:
                history.pop()
                say(f"with this, the conversation would have {len(prompt)} tokens of {context}: shorten it, or /reset")
                continue
            fitting = dataclasses.replace(sampling, tokens=min(sampling.tokens, room))
            history.append({"role": "assistant", "content": said(opened, prompt, fitting)})


def lines() -> Iterator[str]:
    """What is typed, without the spaces around it."""
    if sys.stdin.isatty():
        import readline  # noqa: F401  # gives input() a history
    while True:
        try:
            yield input("> " if sys.stdin.isatty() else "").strip()
        except EOFError:
            return


def said(opened: Opened, prompt: list[int], sampling: Sampling) -> str:
    """The answer, or as much of it as there was before Ctrl-C; printed as it comes."""
    pieces: list[str] = []

    def emit(piece: Piece) -> None:
        pieces.append(piece)
        print(piece, end="", flush=True)

    with interruption() as stopped:
        answer(opened, prompt, sampling, emit, stopped.is_set, Batch(1))
    print(flush=True)
    return "".join(pieces)


@contextlib.contextmanager
def interruption() -> Iterator[threading.Event]:
    """Ctrl-C sets the event, so that nothing is left half-done; a second one interrupts as usual."""
    event = threading.Event()
    usual = signal.getsignal(signal.SIGINT)

    def stop(*_: Any) -> None:
        event.set()
        signal.signal(signal.SIGINT, usual)

    signal.signal(signal.SIGINT, stop)
    try:
        yield event
    finally:
        signal.signal(signal.SIGINT, usual)
