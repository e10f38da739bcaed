"""Prompts in every form that OpenAI's API takes, and values that ask for nothing."""

from __future__ import annotations

import json
from collections.abc import Iterator

import httpx2
import pytest
from server import LONG, metrics, post, serving

from rankgate.hub.opening import Opened

SHORT = {**LONG, "max_tokens": 6}
CHAT = {"model": "tiny-chat", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 6, "temperature": 0}
ON_CHAT = "/v1/chat/completions"


@pytest.fixture(scope="module")
def address(opened: Opened) -> Iterator[str]:
    with serving(opened, body=200_000) as address:
        yield address


def texts(address: str, prompt: object, **options: object) -> list[str]:
    response = post(address, {**SHORT, "prompt": prompt, **options})
    assert response.status_code == 200, response.text
    choices = response.json()["choices"]
    assert [choice["index"] for choice in choices] == list(range(len(choices)))
    return [choice["text"] for choice in choices]


def test_texts_and_ids_one_and_several(address: str, opened: Opened):
    words = ["once upon", "a", "time"]
    alone = [texts(address, word)[0] for word in words]
    assert len({*alone}) == 3
    ids = [opened.tokenizer(word).input_ids for word in words]
    assert texts(address, words) == texts(address, ids) == alone
    assert (
        texts(address, ids[0]) == texts(address, [words[0]]) == texts(address, [float(i) for i in ids[0]]) == alone[:1]
    )
    used = post(address, {**SHORT, "prompt": words}).json()["usage"]
    count = sum(map(len, ids))
    assert used == {"prompt_tokens": count, "completion_tokens": 18, "total_tokens": count + 18}


def test_several_are_streamed_one_after_another(address: str):
    body = {**SHORT, "prompt": ["once upon", "a"], "stream": True, "stream_options": {"include_usage": True}}
    lines = [line.removeprefix("data: ") for line in post(address, body).text.splitlines() if line]
    chunks = [json.loads(line) for line in lines[:-1]]
    assert lines[-1] == "[DONE]" and chunks[-1]["usage"]["completion_tokens"] == 12
    choices = [chunk["choices"][0] for chunk in chunks[:-1]]
    said = ["".join(c["text"] for c in choices if c["index"] == i) for i in (0, 1)]
    assert said == texts(address, body["prompt"])
    assert [c["index"] for c in choices if c["finish_reason"]] == [0, 1]


NONE = [
    "",
    [],
    [""],
    ["a", ""],
    [[]],
    [260],
    [-1],
    [5, 260],
    [[5], [260]],
    [1.5],
    [True],
    ["a", 5],
    [5, "a"],
    [None],
    5,
    {},
]
TOO_MANY = [["a"] * 2049, ["a", "b" * 4000], [[5] * 4000]]


@pytest.mark.parametrize("prompt", [*NONE, *TOO_MANY], ids=lambda prompt: str(prompt)[:20])
def test_prompts_that_are_none(address: str, prompt: object):
    response = post(address, {**SHORT, "prompt": prompt})
    error = response.json()["error"]
    assert response.status_code == 400 and error["param"] == "prompt" and "\n" not in error["message"]


def test_as_many_prompts_as_may_be(address: str):
    assert len(texts(address, [[5]] * 2048, max_tokens=0, echo=True)) == 2048


@pytest.mark.parametrize("path", ["/v1/completions", ON_CHAT])
def test_integers_may_be_written_with_a_point(address: str, path: str):
    body = SHORT if path != ON_CHAT else CHAT
    found = post(address, {**body, "max_tokens": 5.0, "seed": 3.0, "top_k": -1.0}, path=path)
    assert found.status_code == 200 and found.json()["usage"]["completion_tokens"] == 5
    for name, value in {"max_tokens": 16.5, "seed": 0.5, "top_k": 1.5, "max_tokens": True}.items():  # noqa: F601
        refused = post(address, {**body, name: value}, path=path)
        assert refused.status_code == 400 and refused.json()["error"]["param"] == name


NEUTRAL = {
    "n": 1,
    "top_k": -1,
    "min_p": 0,
    "repetition_penalty": 1,
    "logit_bias": None,
    "stop": None,
    "user": "me",
    "frequency_penalty": 0.0,
    "stream_options": None,
    "ignore_eos": False,
    "skip_special_tokens": True,
    "add_special_tokens": True,
    "length_penalty": 1.0,
    "use_beam_search": False,
    "early_stopping": False,
    "include_stop_str_in_output": False,
    "spaces_between_special_tokens": True,
    "min_tokens": 0,
    "stop_token_ids": [],
}


def test_what_asks_for_nothing_changes_nothing(address: str):
    bare = post(address, SHORT).json()["choices"]
    own = {"best_of": 1, "suffix": "", "echo": False, "logprobs": None}
    assert post(address, {**SHORT, **NEUTRAL, **own}).json()["choices"] == bare
    assert post(address, {**SHORT, "logprobs": False}).json()["choices"] == bare
    chat = post(address, CHAT, path=ON_CHAT).json()["choices"]
    own = {"tool_choice": "auto", "tools": [], "logprobs": False, "top_logprobs": 0}
    assert post(address, {**CHAT, **NEUTRAL, **own}, path=ON_CHAT).json()["choices"] == chat
    developer = [{"role": "developer", "content": "Hello"}]
    assert post(address, {**CHAT, "messages": developer}, path=ON_CHAT).status_code == 200
    refused = post(address, {**CHAT, "reasoning_effort": "low"}, path=ON_CHAT)
    assert refused.json()["error"]["param"] == "reasoning_effort"


def test_what_narrows_the_choice_does(address: str):
    greedy = texts(address, "a", max_tokens=20)
    for narrow in ({"top_k": 1}, {"min_p": 1.0}):
        assert texts(address, "a", max_tokens=20, temperature=1.5, **narrow) == greedy
    wide = texts(address, "a", max_tokens=20, temperature=1.5, seed=1)
    assert wide == texts(address, "a", max_tokens=20, temperature=1.5, seed=1, top_k=0, min_p=0.0) != greedy
    (text,) = texts(address, "aaaa", max_tokens=100)
    (penalised,) = texts(address, "aaaa", max_tokens=100, repetition_penalty=2.0)
    assert len({*penalised}) > len({*text})


def test_times_are_measured(opened: Opened):
    with serving(opened) as address:
        assert post(address, {**SHORT, "prompt": ["a", "b"]}).status_code == 200
        found = metrics(address)
        assert found["rankgate_request_queue_time_seconds_count",] == 1
        assert found["rankgate_time_to_first_token_seconds_count",] == 1
        assert found["rankgate_inter_token_latency_seconds_count",] == 10
        assert found["rankgate_answers_total", "length"] == 2 and found["rankgate_new_tokens_total",] == 12
        first, queued = (
            found[f"rankgate_{name}_seconds_sum",] for name in ("time_to_first_token", "request_queue_time")
        )
        between, all_ = (found[f"rankgate_{name}_seconds_sum",] for name in ("inter_token_latency", "answer"))
        assert 0 < queued < first and first + between < all_
        assert httpx2.get(f"{address}/metrics").status_code == 200
