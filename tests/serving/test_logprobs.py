"""Log-probabilities, against a softmax of the model's logits; lm-evaluation-harness as a client."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import openai
import pytest
import torch
from conftest import tiny_model, tokens
from server import LONG, post
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from rankgate.decoding import loop
from rankgate.decoding.steps import captured
from rankgate.hub.opening import Opened
from rankgate.serving import likelihood
from rankgate.serving.answer import chat_tokens
from rankgate.serving.likelihood import Scorer, spelling

SHORT = {**LONG, "prompt": "once upon", "max_tokens": 8}
HELLO = [{"role": "user", "content": "Hello"}]
TOLERANCE = {"abs": 1e-4}  # of float32 logits of size 10, by steps or at once


def expected(opened: Opened, ids: list[int]) -> torch.Tensor:
    """Log-probabilities (tokens, vocabulary) of what follows each token."""
    with torch.no_grad():
        return opened.model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)


def complete(address: str, **options: object) -> dict[str, Any]:
    response = post(address, {**SHORT, **options})
    assert response.status_code == 200, response.text
    choice: dict[str, Any] = response.json()["choices"][0]
    return choice


def ids_of(opened: Opened, tokens: list[str]) -> list[int]:
    """By their texts: bytes, here."""
    data = [bytes.fromhex(t[8:]) if t.startswith("bytes:") else t.encode() for t in tokens]
    names = {i: bytes(spelling(opened.tokenizer, i)[1] or b"") for i in range(4, 260)}
    return [next(i for i, name in names.items() if name == piece) for piece in data]


@pytest.mark.parametrize("temperature", [0, 1.5])
@pytest.mark.parametrize("echo", [False, True])
def test_completions_report_the_models_own(address: str, opened: Opened, temperature: float, echo: bool):
    options = {"temperature": temperature, "top_p": 0.9, "repetition_penalty": 1.3, "seed": 5}
    plain = complete(address, **options)
    choice = complete(address, **options, logprobs=3, echo=echo)
    assert choice["text"] == "once upon" * echo + plain["text"]  # asking changes nothing
    assert captured(opened.model) is not None
    found = choice["logprobs"]
    prompt = opened.tokenizer("once upon").input_ids
    ids = [*([] if echo else prompt), *ids_of(opened, found["tokens"])]
    assert len(ids) == len(prompt) + 8
    rows = expected(opened, ids)
    own = [rows[i - 1, ids[i]].item() for i in range(1, len(ids))]
    if echo:
        assert found["token_logprobs"][0] is None and found["top_logprobs"][0] is None
        assert found["token_logprobs"][1:] == pytest.approx(own, **TOLERANCE)
    else:
        assert found["token_logprobs"] == pytest.approx(own[-8:], **TOLERANCE)
    for value, top, row in zip(
        found["token_logprobs"][::-1], found["top_logprobs"][::-1], rows.flip(0)[1:], strict=False
    ):
        if top is not None:
            assert sorted(top.values())[-3:] == pytest.approx(sorted(row.topk(3).values.tolist()), **TOLERANCE)
            assert value in top.values() and 3 <= len(top) <= 4
    at = found["text_offset"]
    assert at == sorted(at) and at[0] == 0 and at[-1] < len(choice["text"]) + 1


def test_a_prompt_alone(address: str, opened: Opened):
    done = complete(address, max_tokens=0, echo=True, logprobs=0)
    assert done["text"] == "once upon" and done["finish_reason"] == "length"
    assert done["logprobs"]["tokens"] == list("once upon") and done["logprobs"]["text_offset"] == list(range(9))
    assert [len(top) for top in done["logprobs"]["top_logprobs"][1:]] == [1] * 8
    only = complete(address, max_tokens=0, echo=True, prompt=[70])
    assert only["logprobs"] is None and len(only["text"]) == 1
    one = complete(address, max_tokens=0, echo=True, prompt=[70], logprobs=2)["logprobs"]
    assert one["token_logprobs"] == [None]
    snow = complete(address, max_tokens=0, echo=True, prompt="a\N{SNOWMAN}b", logprobs=1)
    assert snow["text"] == "a\N{SNOWMAN}b" and snow["logprobs"]["text_offset"] == [0, 1, 1, 1, 2]
    assert snow["logprobs"]["tokens"] == ["a", r"bytes:\xe2", r"bytes:\x98", r"bytes:\x83", "b"]
    refused = post(address, {**SHORT, "max_tokens": 0})
    assert refused.status_code == 400 and "echo" in refused.json()["error"]["message"]


@pytest.mark.parametrize("echo", [False, True])
def test_streams_report_the_same(address: str, echo: bool):
    options = {"logprobs": 2, "echo": echo, "max_tokens": 20}
    whole = complete(address, **options)
    lines = [
        line.removeprefix("data: ") for line in post(address, {**SHORT, **options, "stream": True}).text.split("\n\n")
    ]
    choices = [json.loads(line)["choices"][0] for line in lines if line and line != "[DONE]"]
    assert "".join(choice["text"] for choice in choices) == whole["text"]
    parts = [choice["logprobs"] for choice in choices if choice["logprobs"]]
    assert len(parts) > 5
    for name, values in whole["logprobs"].items():
        assert [value for part in parts for value in part[name]] == values


def test_tokens_that_are_cut_away_are_not_reported(address: str):
    free = complete(address, max_tokens=60, logprobs=0)
    word = free["text"][20:23]
    cut = complete(address, max_tokens=60, logprobs=0, stop=word)
    end = len(cut["text"])
    assert cut["text"] == free["text"][: free["text"].index(word)]
    count = sum(at < end for at in free["logprobs"]["text_offset"])
    for name, values in cut["logprobs"].items():
        assert values == free["logprobs"][name][:count]


def test_the_end_of_the_text_is_reported(address: str, opened: Opened, monkeypatch: pytest.MonkeyPatch):
    (first,) = ids_of(opened, complete(address, max_tokens=1, logprobs=0)["logprobs"]["tokens"])
    monkeypatch.setattr(opened.model.generation_config, "eos_token_id", first)
    done = complete(address, max_tokens=5, logprobs=0)
    assert done["text"] == "" and done["finish_reason"] == "stop" and len(done["logprobs"]["tokens"]) == 1


def test_chats(address: str, opened: Opened):
    client = openai.OpenAI(base_url=f"{address}/v1", api_key="any", max_retries=0)
    options = {"model": "tiny-chat", "messages": HELLO, "max_tokens": 12, "temperature": 0}
    done = client.chat.completions.create(**options, logprobs=True, top_logprobs=20).choices[0]
    ids = chat_tokens(opened.tokenizer, HELLO)
    start = len(ids)
    content = done.logprobs.content
    ids += ids_of(opened, [entry.token for entry in content])
    rows = expected(opened, ids)[start - 1 : -1]
    assert len(content) == 12 and done.logprobs.refusal is None
    for entry, token, row in zip(content, ids[start:], rows, strict=True):
        assert entry.logprob == pytest.approx(row[token].item(), **TOLERANCE)
        assert [top.logprob for top in entry.top_logprobs] == pytest.approx(row.topk(20).values.tolist(), **TOLERANCE)
        assert entry.top_logprobs[0].token == entry.token and entry.bytes == spelling(opened.tokenizer, token)[1]
    chunks = client.chat.completions.create(**options, logprobs=True, stream=True)
    parts = [chunk.choices[0].logprobs for chunk in chunks]
    streamed = [entry for part in parts if part for entry in part.content]
    assert [entry.logprob for entry in streamed] == [entry.logprob for entry in content]
    assert all(entry.top_logprobs == [] for entry in streamed)
    assert client.chat.completions.create(**options).choices[0].logprobs is None


@pytest.mark.parametrize(("architecture", "sizes"), [("llama", [16, 16, 16, 2]), ("mamba", [50])])
def test_long_prompts_are_read_in_chunks(
    opened: Opened, monkeypatch: pytest.MonkeyPatch, architecture: str, sizes: list[int]
):
    model, read = tiny_model(architecture), []
    monkeypatch.setattr(likelihood, "ROWS", 16)
    ids = tokens(1, 50)
    model.register_forward_pre_hook(lambda _, __, given: read.append(given["input_ids"].shape[1]), with_kwargs=True)
    found = Scorer(opened.tokenizer, 1).prompt(model, ids, list(range(50)), lambda: False)
    assert read == sizes
    with torch.no_grad():
        rows = model(input_ids=ids).logits[0].log_softmax(-1)
    assert [t.logprob for t in found[1:]] == pytest.approx(
        rows[:-1].gather(1, ids[0, 1:, None])[:, 0].tolist(), **TOLERANCE
    )


def test_infinity_is_no_json_and_nan_an_error(opened: Opened):
    scorer = Scorer(opened.tokenizer, 1)
    scorer(torch.tensor([[5]]), torch.tensor([[0.0, -float("inf")]]))  # type: ignore[arg-type]
    assert scorer.chosen(1, 0).logprob == -9999
    scorer(torch.tensor([[5]]), torch.tensor([[0.0, float("nan")]]))  # type: ignore[arg-type]
    with pytest.raises(Exception, match="not finite"):
        scorer.chosen(1, 0)


def test_the_ordinary_loop_reports_the_same(address: str, monkeypatch: pytest.MonkeyPatch):
    fast = complete(address, logprobs=2)
    with monkeypatch.context() as patch, pytest.warns(UserWarning, match="without the fast path: a reason"):
        patch.setattr(loop, "unsupported", lambda *_, **__: "a reason")
        slow = complete(address, logprobs=2)
    assert slow["text"] == fast["text"]
    assert slow["logprobs"]["token_logprobs"] == pytest.approx(fast["logprobs"]["token_logprobs"], **TOLERANCE)


def test_spelling_where_spaces_are_part_of_tokens():
    """As in vocabularies of SentencePiece, whose decoder drops the space that a text begins with."""
    words = ["<unk>", "<s>", "\u2581", "\u2581Hi", "lo", "<0xE2>", "<0x98>", "<0x83>"]
    backend = Tokenizer(
        models.BPE({word: i for i, word in enumerate(words)}, [], unk_token="<unk>", byte_fallback=True)
    )
    steps = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence(steps)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", bos_token="<s>")
    assert spelling(tokenizer, 1) == ("<s>", [60, 115, 62])
    assert spelling(tokenizer, 3) == (" Hi", [32, 72, 105])
    assert spelling(tokenizer, 4) == ("lo", [108, 111])
    assert spelling(tokenizer, 5) == (r"bytes:\xe2", [0xE2])


PAIRS = [
    ("once upon", " a time"),
    ("The", " gulls"),
    ("a\N{SNOWMAN}", "h\N{LATIN SMALL LETTER E WITH ACUTE}"),
    ("x" * 300, "y"),
]


def of_the_harness(opened: Opened, pairs: list[tuple[str, str]]) -> list[tuple[float, bool]]:
    """Log-likelihoods of the second texts after the first ones, by the model itself."""
    found = []
    for context, continuation in pairs:
        ids, start = opened.tokenizer(context + continuation).input_ids, len(opened.tokenizer(context).input_ids)
        rows, said = expected(opened, ids)[start - 1 : -1], torch.tensor(ids[start:])
        found.append((rows.gather(1, said[:, None]).sum().item(), bool((rows.argmax(-1) == said).all())))
    return found


@pytest.mark.parametrize("tokenized", [True, False])
def test_what_the_harness_asks(address: str, opened: Opened, tokenized: bool):
    """The JSON of lm-evaluation-harness's `local-completions`, and what it makes of the answer."""
    pairs = [*PAIRS, ("once", complete(address, prompt="once", max_tokens=2)["text"])]
    ids = [opened.tokenizer(one + two).input_ids for one, two in pairs]
    prompt = ids if tokenized else [one + two for one, two in pairs]
    body = {"prompt": prompt, "temperature": 0, "max_tokens": 1, "logprobs": 1, "seed": 1234, "echo": True}
    choices = post(address, {"model": "tiny-chat", **body}).json()["choices"]
    for choice, (context, _), (value, greedy) in zip(choices, pairs, of_the_harness(opened, pairs), strict=True):
        start = len(opened.tokenizer(context).input_ids)
        own, top = (choice["logprobs"][name][start:-1] for name in ("token_logprobs", "top_logprobs"))
        assert sum(own) == pytest.approx(value, abs=1e-4)
        assert all(a == max(b.values()) for a, b in zip(own, top, strict=True)) == greedy


@pytest.mark.parametrize(("tokenized", "batch"), [(True, 1), (True, 3), (False, 1), (False, 3)])
def test_the_harness_as_a_client(address: str, opened: Opened, chat_dir: Path, tokenized: bool, batch: int):
    pytest.importorskip("tenacity")
    pytest.importorskip("tiktoken")
    api = pytest.importorskip("lm_eval.models.openai_completions")
    hf = pytest.importorskip("lm_eval.models.huggingface")
    instance = pytest.importorskip("lm_eval.api.instance").Instance
    client = api.LocalCompletionsAPI(
        model="tiny-chat",
        base_url=f"{address}/v1/completions",
        tokenizer=str(chat_dir),
        tokenizer_backend="huggingface",
        custom_prefix_token_id=2,
        tokenized_requests=tokenized,
        batch_size=batch,
        max_length=2048,
    )
    own = hf.HFLM(pretrained=opened.model, tokenizer=opened.tokenizer, batch_size=1, max_length=2047, prefix_token_id=2)
    asked = [instance("loglikelihood", {}, pair, i) for i, pair in enumerate(PAIRS)]
    got, wanted = client.loglikelihood(asked), own.loglikelihood(asked)
    assert [value for value, _ in got] == pytest.approx([value for value, _ in wanted], abs=1e-4)
    assert [greedy for _, greedy in got] == [greedy for _, greedy in wanted]
    rolling = [instance("loglikelihood_rolling", {}, ("the keeper counted gulls",), 0)]
    assert client.loglikelihood_rolling(rolling) == pytest.approx(own.loglikelihood_rolling(rolling), abs=1e-4)
    until = [instance("generate_until", {}, ("once upon", {"until": ["Q", "\n\n"], "max_gen_toks": 12}), 0)]
    assert client.generate_until(until) == [complete(address, max_tokens=12, stop=["Q", "\n\n"])["text"]]
