"""Texts token by token: what is passed on, and when."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import AddedToken

from rankgate.decoding.batch import Batch
from rankgate.hub.opening import Opened, open_any
from rankgate.serving import answer as answering
from rankgate.serving.answer import Sampling
from rankgate.serving.stream import Piece


@pytest.fixture
def opened(chat_dir: Path) -> Opened:
    return open_any(str(chat_dir))


def test_what_ends_an_answer(opened: Opened, monkeypatch: pytest.MonkeyPatch):
    """End of text to the model or to its tokenizer, and stop texts that are special tokens: none of it is text."""
    tokenizer = copy.deepcopy(opened.tokenizer)
    tokenizer.add_tokens([AddedToken("<|end|>", special=True)], special_tokens=True)
    tokenizer.add_tokens(["<turn>"])
    turn, end = tokenizer.convert_tokens_to_ids(["<turn>", "<|end|>"])
    own = Opened("tiny", copy.deepcopy(opened.model), tokenizer)
    said, told = [*tokenizer("Paris.").input_ids, 0, *tokenizer(" More.").input_ids], {}

    def says(model: object, ids: torch.Tensor, **options: Any) -> None:
        told.update(options)
        options["streamer"].put(ids)
        for token in said:
            options["streamer"].put(torch.tensor([token]))
        options["streamer"].end()

    monkeypatch.setattr(answering, "fast_generate", says)
    at = said.index(0)
    cases = ((end, ("<|end|>",), None, None), (turn, (), [2, turn], None), (3, (), None, "</s>"))
    for last, stop, model_ends, tokenizer_ends in cases:
        said[at], own.model.generation_config.eos_token_id, tokenizer.eos_token = last, model_ends, tokenizer_ends
        pieces: list[Piece] = []
        answered = answering.answer(own, [5], Sampling(1000, stop=stop), pieces.append, lambda: False, Batch(1))
        text = "".join(pieces)
        assert (text, answered.reason, len(answered.times)) == ("Paris.", "stop", at + 1)
        assert last in told["eos_token_id"]


def pieces_of(opened: Opened, prompt: str, monkeypatch: pytest.MonkeyPatch, text: str, *stop: str) -> list[str]:
    """What `answer` passes on while a model says `text`, a byte at a time."""

    def says(model: object, ids: torch.Tensor, **options: object) -> None:
        streamer = options["streamer"]
        streamer.put(ids)  # type: ignore[attr-defined]
        for token in opened.tokenizer(text).input_ids:
            streamer.put(torch.tensor([token]))  # type: ignore[attr-defined]
        streamer.end()  # type: ignore[attr-defined]

    monkeypatch.setattr(answering, "fast_generate", says)
    pieces: list[Piece] = []
    ids = opened.tokenizer(prompt).input_ids
    answering.answer(opened, ids, Sampling(1000, stop=stop), pieces.append, lambda: False, Batch(1))
    return [str(piece) for piece in pieces]


def test_text_is_passed_on_when_it_is_certain(opened: Opened, monkeypatch: pytest.MonkeyPatch):
    def pieces(text: str, *stop: str) -> list[str]:
        return pieces_of(opened, "?", monkeypatch, text, *stop)

    assert pieces("héllo") == ["h", "é", "l", "l", "o"]
    assert pieces("a\N{SNOWMAN}\N{GRINNING FACE}") == ["a", "\N{SNOWMAN}", "\N{GRINNING FACE}"]
    assert pieces("ab<en<end>c", "<end>") == ["a", "b", "<en"]
    assert pieces("ab<en", "<end>") == ["a", "b", "<en"]
    assert pieces("aabab", "abab", "c") == ["a"]
    assert pieces("xyz", "y", "xyz!") == ["x"]


def test_what_never_becomes_a_character_is_passed_on(opened: Opened, monkeypatch: pytest.MonkeyPatch):
    half = opened.tokenizer("é").input_ids[0]
    monkeypatch.setattr(type(opened.tokenizer), "__call__", lambda *_: type("Ids", (), {"input_ids": [half] * 40}))
    assert "".join(pieces_of(opened, "?", monkeypatch, "")) == "\N{REPLACEMENT CHARACTER}" * 40
