"""The server, asked by the official client and by clients that make mistakes."""

from __future__ import annotations

import json
import socket
from concurrent.futures import ThreadPoolExecutor

import httpx2
import openai
import pytest
import torch
from server import LONG, begun, metrics, post, serving, wait_for

from rankgate.decoding.loop import fast_generate
from rankgate.hub.opening import Opened
from rankgate.serving import answer as answering
from rankgate.serving.answer import chat_tokens

HELLO = [{"role": "user", "content": "Hello"}]


@pytest.fixture(scope="module")
def client(address: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{address}/v1", api_key="any", max_retries=0)


def greedy(opened: Opened, prompt: list[int], tokens: int) -> str:
    ids = torch.tensor([prompt])
    out = fast_generate(opened.model, ids, max_new_tokens=tokens, do_sample=False, pad_token_id=1)
    return str(opened.tokenizer.decode(out[0, len(prompt) :], skip_special_tokens=True))


def test_models_are_listed(client: openai.OpenAI):
    assert [model.id for model in client.models.list()] == ["tiny-chat"]
    assert client.models.retrieve("tiny-chat").id == "tiny-chat"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt-5")


def test_chat_says_what_generate_says(client: openai.OpenAI, opened: Opened):
    prompt = chat_tokens(opened.tokenizer, HELLO)
    options = {"model": "tiny-chat", "messages": HELLO, "max_tokens": 40, "temperature": 0}
    whole = client.chat.completions.create(**options)
    assert whole.choices[0].message.role == "assistant"
    assert whole.choices[0].message.content == greedy(opened, prompt, 40)
    assert whole.choices[0].finish_reason == "length"
    assert (whole.usage.prompt_tokens, whole.usage.completion_tokens) == (len(prompt), 40)
    chunks = list(client.chat.completions.create(**options, stream=True, stream_options={"include_usage": True}))
    assert chunks[0].choices[0].delta.role == "assistant"
    texts = [chunk.choices[0].delta.content or "" for chunk in chunks[:-1]]
    assert "".join(texts) == whole.choices[0].message.content and sum(map(bool, texts)) > 5
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-1]] == [None] * (len(chunks) - 2) + ["length"]
    assert chunks[-1].choices == [] and chunks[-1].usage == whole.usage
    assert len({chunk.id for chunk in chunks}) == 1
    without = list(client.chat.completions.create(**options, stream=True))
    assert len(without) == len(chunks) - 1 and all(chunk.usage is None for chunk in without)


def test_completions_say_what_generate_says(client: openai.OpenAI, opened: Opened):
    options = {"model": "tiny-chat", "prompt": "once upon", "temperature": 0}
    whole = client.completions.create(**options)
    assert whole.choices[0].text == greedy(opened, opened.tokenizer("once upon").input_ids, 16)
    assert whole.usage.completion_tokens == 16 and whole.choices[0].finish_reason == "length"
    chunks = list(client.completions.create(**options, stream=True))
    assert "".join(chunk.choices[0].text for chunk in chunks) == whole.choices[0].text


def test_messages_may_come_in_parts(client: openai.OpenAI):
    def say(content: object) -> str:
        messages = [{"role": "system", "content": "Be brief"}, {"role": "user", "content": content}]
        options = {"max_completion_tokens": 9, "max_tokens": 3, "temperature": 0}
        done = client.chat.completions.create(model="tiny-chat", messages=messages, **options)  # type: ignore[arg-type]
        assert done.usage.completion_tokens == 9
        return done.choices[0].message.content

    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    assert say(parts) == say("one\ntwo") != say("onetwo")


def test_a_stop_text_ends_the_answer_before_it(client: openai.OpenAI):
    options = {"model": "tiny-chat", "prompt": "once upon", "temperature": 0, "max_tokens": 200}
    text = client.completions.create(**options).choices[0].text
    word = text[20:23]
    for stop in (word, ["never in there at all", word]):
        done = client.completions.create(**options, stop=stop)
        assert done.choices[0].text == text[: text.index(word)] and done.choices[0].finish_reason == "stop"
        assert done.usage.completion_tokens < 200
        chunks = list(client.completions.create(**options, stop=stop, stream=True))
        assert "".join(chunk.choices[0].text for chunk in chunks) == done.choices[0].text
        assert chunks[-1].choices[0].finish_reason == "stop"
    almost = client.completions.create(**options, stop=text[-1:] + "\N{SNOWMAN}")
    assert almost.choices[0].text == text and almost.choices[0].finish_reason == "length"


def test_the_end_of_the_text_is_a_stop(client: openai.OpenAI, opened: Opened, monkeypatch: pytest.MonkeyPatch):
    prompt = opened.tokenizer("once upon").input_ids
    out = fast_generate(opened.model, torch.tensor([prompt]), max_new_tokens=30, do_sample=False, pad_token_id=1)
    new = out[0, len(prompt) :].tolist()
    end = next(i for i in range(4, 30) if new[i] not in new[:i])
    monkeypatch.setattr(opened.model.generation_config, "eos_token_id", [3, new[end]])
    for limit in (30, end + 1):
        options = {"model": "tiny-chat", "prompt": "once upon", "temperature": 0, "max_tokens": limit}
        done = client.completions.create(**options)
        assert (done.choices[0].finish_reason, done.usage.completion_tokens) == ("stop", end + 1)


def test_seeds_make_samples_repeatable(client: openai.OpenAI):
    def sample(**options: float) -> str:
        done = client.completions.create(model="tiny-chat", prompt="a", max_tokens=40, **options)  # type: ignore[arg-type]
        return done.choices[0].text

    assert sample(seed=1, temperature=1.5) == sample(seed=1, temperature=1.5)
    assert len({sample(seed=1), sample(seed=2), sample(seed=1, temperature=2), sample(), sample()}) == 5
    assert sample(top_p=0) == sample(temperature=0) == sample(temperature=1e-9)


BAD = {
    "n": 2,
    "logprobs": 6,
    "presence_penalty": 0.5,
    "logit_bias": {"5": 1},
    "suffix": "b",
    "top_k": 2.5,
    "min_p": 1.5,
    "repetition_penalty": 0,
    "ignore_eos": True,
    "temperature": 2.5,
    "top_p": -0.1,
    "seed": 1 << 70,
    "max_tokens": 0,
    "stop": [""],
    "prompt": "",
    "stream": "yes",
    "stream_options": {"include_everything": True},
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_not_supported_is_named(address: str, name: str):
    response = post(address, {"model": "tiny-chat", "prompt": "a", name: BAD[name]})
    assert response.status_code == 400
    assert response.json()["error"]["param"] == name and name in response.json()["error"]["message"]


BAD_CHAT = {
    "tools": [{"type": "function"}],
    "response_format": {"type": "json_object"},
    "messages": [],
    "max_completion_tokens": -1,
    "top_logprobs": 2,
    "max_tokens": 16.5,
}


@pytest.mark.parametrize("name", BAD_CHAT)
def test_what_is_not_supported_is_named_in_chats(address: str, name: str):
    response = post(
        address, {"model": "tiny-chat", "messages": HELLO, name: BAD_CHAT[name]}, path="/v1/chat/completions"
    )
    assert response.status_code == 400 and response.json()["error"]["param"] == name


@pytest.mark.parametrize(
    "message",
    [
        {"role": "tool", "content": "x"},
        {"role": "user"},
        {"role": "user", "content": None},
        {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]},
        {"role": "user", "content": "x", "name": "someone"},
        "Hello",
    ],
)
def test_messages_that_are_none(address: str, message: object):
    response = post(address, {"model": "tiny-chat", "messages": [message]}, path="/v1/chat/completions")
    assert response.status_code == 400 and response.json()["error"]["param"] == "messages"


def test_what_asks_for_nothing_is_accepted(address: str):
    neutral = {"n": 1, "logprobs": None, "presence_penalty": 0.0, "logit_bias": {}, "user": "me", "stop": None}
    assert post(address, {**LONG, "max_tokens": 2, **neutral}).status_code == 200
    said = {"role": "assistant", "content": "Hi", "refusal": None, "tool_calls": None, "annotations": []}
    chat = {"model": "tiny-chat", "messages": [*HELLO, said, *HELLO], "max_tokens": 2, "tools": [], "top_p": None}
    assert post(address, chat, path="/v1/chat/completions").status_code == 200


@pytest.mark.parametrize("body", [b"", b"{", b"nonsense", b'{"prompt": "\xff"}', b'{"prompt": "\\ud800"}', b"[" * 9000])
def test_bodies_that_are_not_json(address: str, body: bytes):
    response = httpx2.post(f"{address}/v1/completions", content=body, headers={"Content-Type": "application/json"})
    assert response.status_code == 400 and response.json()["error"]["code"] == "invalid_json"


def test_bodies_that_are_not_requests(address: str):
    for body in ([], 5, "text"):
        assert post(address, body).status_code == 400
    assert post(address, {"prompt": "a"}).json()["error"]["param"] == "model"
    assert httpx2.post(f"{address}/v1/completions", content=b"{}").status_code == 415
    wrong = post(address, {**LONG, "model": "gpt-5"})
    assert wrong.status_code == 404 and wrong.json()["error"]["code"] == "model_not_found"


def test_paths_and_methods_that_are_not_there(address: str):
    assert httpx2.get(f"{address}/v2").json()["error"]["message"] == "Not Found"
    assert httpx2.get(f"{address}/v1/completions").status_code == 405


def test_prompts_and_bodies_that_are_too_long(address: str, opened: Opened):
    for body in ({**LONG, "prompt": "a" * 5000}, {**LONG, "prompt": "a" * 3990, "max_tokens": 11}):
        response = post(address, body)
        assert response.status_code == 400 and response.json()["error"]["code"] == "context_length_exceeded"
    assert post(address, {**LONG, "prompt": "a" * 3990, "max_tokens": 10}).json()["usage"]["total_tokens"] == 4000
    long = [{"role": "user", "content": "a" * 5000}]
    response = post(address, {"model": "tiny-chat", "messages": long}, path="/v1/chat/completions")
    assert response.json()["error"]["code"] == "context_length_exceeded"
    assert post(address, {**LONG, "prompt": "a" * 30_000}).status_code == 413
    pieces = (b" " * 1000 for _ in range(30))
    header = {"Content-Type": "application/json"}
    assert httpx2.post(f"{address}/v1/completions", content=pieces, headers=header).status_code == 413
    with serving(opened, context=20) as short:
        assert post(short, {**LONG, "max_tokens": 20}).json()["error"]["code"] == "context_length_exceeded"
        chat = [{"role": "user", "content": ""}]  # without max_tokens: as many as fit
        done = post(short, {"model": "tiny-chat", "messages": chat}, path="/v1/chat/completions").json()
        assert done["usage"]["total_tokens"] == 20


def test_a_tokenizer_without_a_chat_template(address: str, opened: Opened, monkeypatch: pytest.MonkeyPatch):
    chat = {"model": "tiny-chat", "messages": HELLO, "max_tokens": 2}
    monkeypatch.setattr(opened.tokenizer, "chat_template", "{{ raise_exception('only saints') }}")
    response = post(address, chat, path="/v1/chat/completions")
    assert response.status_code == 400 and "only saints" in response.json()["error"]["message"]
    monkeypatch.setattr(opened.tokenizer, "chat_template", None)
    response = post(address, chat, path="/v1/chat/completions")
    assert response.status_code == 400 and "no chat template" in response.json()["error"]["message"]
    assert post(address, {**LONG, "max_tokens": 2}).status_code == 200


def test_a_key_opens(opened: Opened):
    with serving(opened, key="sésame") as address:
        for headers in ({}, {"Authorization": "Bearer other"}, {"Authorization": "sesame"}):
            response = post(address, {**LONG, "max_tokens": 2}, **headers)
            assert response.status_code == 401 and response.json()["error"]["code"] == "invalid_api_key"
            assert httpx2.get(f"{address}/v1/models", headers=headers).status_code == 401
        right = {"Authorization": "Bearer sésame".encode()}
        response = httpx2.post(f"{address}/v1/completions", json={**LONG, "max_tokens": 2}, headers=right, timeout=60)  # type: ignore[arg-type]
        assert response.status_code == 200
        assert httpx2.get(f"{address}/health").json() == {"status": "ok"}


def test_twenty_requests_at_eight(address: str, client: openai.OpenAI):
    def ask(i: int) -> str:
        options = {"model": "tiny-chat", "prompt": f"number {i}", "max_tokens": 30, "temperature": 0}
        if i % 2:
            return client.completions.create(**options).choices[0].text
        return "".join(chunk.choices[0].text for chunk in client.completions.create(**options, stream=True))

    before = metrics(address)["rankgate_answers_total", "length"]
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(ask, range(20)))
    assert answers == [ask(i) for i in range(20)]
    after = metrics(address)
    assert after["rankgate_answers_total", "length"] == before + 40 and after["rankgate_unfinished",] == 0


def test_who_goes_away_makes_room(opened: Opened):
    with serving(opened) as address:
        with begun(address), pytest.raises(httpx2.TimeoutException):
            httpx2.post(f"{address}/v1/completions", json={**LONG, "prompt": "waits"}, timeout=0.2)
        assert post(address, {**LONG, "max_tokens": 3}).json()["usage"]["completion_tokens"] == 3
        with pytest.raises(httpx2.TimeoutException):
            httpx2.post(f"{address}/v1/completions", json=LONG, timeout=0.2)
        wait_for(lambda: metrics(address)["rankgate_unfinished",] == metrics(address)["rankgate_running",] == 0)
        found = metrics(address)
        assert found["rankgate_answers_total", "cancelled"] == 3
        assert found["rankgate_new_tokens_total",] == 3
        assert found["rankgate_responses_total", "/v1/completions", "499"] == 2


def test_a_full_queue_refuses(opened: Opened):
    with serving(opened, parallel=1, queue=1) as address, ThreadPoolExecutor(1) as pool:
        with begun(address):
            waiting = pool.submit(post, address, {**LONG, "max_tokens": 5})
            wait_for(lambda: metrics(address)["rankgate_unfinished",] == 2)
            refused = post(address, {**LONG, "max_tokens": 5})
            assert refused.status_code == 429 and refused.json()["error"]["code"] == "queue_full"
            assert int(refused.headers["Retry-After"]) > 0
        assert waiting.result().status_code == 200


def test_time_is_limited(opened: Opened):
    with serving(opened, seconds=0.3) as address:
        response = post(address, LONG)
        assert response.status_code == 504 and response.json()["error"]["code"] == "timeout"
        with begun(address) as lines:
            events = [line for line in lines if line]
        assert json.loads(events[-1].removeprefix("data: "))["error"]["code"] == "timeout"
        client = openai.OpenAI(base_url=f"{address}/v1", api_key="any")
        with pytest.raises(openai.APIError, match="too long"):
            list(client.completions.create(**LONG, stream=True))
        wait_for(lambda: metrics(address)["rankgate_running",] == 0)
        assert metrics(address)["rankgate_answers_total", "timeout"] == 3


def test_slow_bodies_are_given_up(opened: Opened):
    with serving(opened, seconds=0.2) as address:
        host, port = address.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), timeout=30) as connection:
            head = f"POST /v1/completions HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
            connection.sendall(f"{head}Content-Length: 100\r\n\r\n{{".encode())
            assert b" 408 " in connection.recv(1000).splitlines()[0]


def test_a_failing_model_is_not_explained_to_clients(
    opened: Opened, address: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    def fails(*_: object, **__: object) -> None:
        raise RuntimeError("secret detail")

    with monkeypatch.context() as patch:
        patch.setattr(answering, "fast_generate", fails)
        for stream in (False, True):
            response = post(address, {**LONG, "stream": stream})
            assert response.status_code == 500 and response.json()["error"]["type"] == "server_error"
            assert "secret" not in response.text and "Traceback" not in response.text
        patch.setattr(opened.tokenizer, "_encode_plus", fails)
        assert post(address, LONG).json()["error"]["code"] == "internal_error"
    assert "secret detail" in caplog.text
    assert post(address, {**LONG, "max_tokens": 2}).status_code == 200


def test_metrics_count(opened: Opened):
    with serving(opened) as address:
        used = post(address, {**LONG, "max_tokens": 7}).json()["usage"]
        post(address, {})
        httpx2.get(f"{address}/no/such/path")
        found = metrics(address)
        assert found["rankgate_new_tokens_total",] == 7
        assert found["rankgate_prompt_tokens_total",] == used["prompt_tokens"]
        assert found["rankgate_responses_total", "/v1/completions", "200"] == 1
        assert found["rankgate_responses_total", "/v1/completions", "400"] == 1
        assert found["rankgate_responses_total", "other", "404"] == 1
        assert found["rankgate_answer_seconds_count",] == 1
        assert found["process_resident_memory_bytes",] > 1e6
