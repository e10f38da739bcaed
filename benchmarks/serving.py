"""Whether the server holds under a mixed load: results/serving.json.

    python benchmarks/serving.py

SmolLM2-135M in int4 behind `rankgate serve`, 200 requests at concurrency 16: whole and streamed chats of 16 tokens,
clients that go away, malformed JSON, prompts that are too long, wrong keys. Every answer at temperature 0 has to be
what the same request got alone, every other status the right one. The resident set before, after a warm-up of short
questions one by one, and after every 50 requests. About 5 minutes.

The model generates on one thread: as many as there are cores wait for each other, spinning, whenever clients run.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from frame import MODEL, SEED, Content, Row, parser, record, source, start

from rankgate.cli import parser as cli
from rankgate.reporting.tables import markdown

if TYPE_CHECKING:
    import httpx2

REQUESTS, CONCURRENCY, TOKENS = 200, 16, 16
PARTS = 4  # after each of which memory is looked at
MIX = {"whole": 80, "streamed": 80, "disconnects": 10, "malformed": 10, "too long": 10, "wrong key": 10}
QUESTIONS = [f"What is special about {what}?" for what in ("Oslo", "rain", "tea", "the number 7", "moss", "a fugue")]
KEY = "only-for-this-benchmark"
CHAT = "/v1/chat/completions"


def main() -> None:
    start(parser(__doc__))
    settings = {"model": MODEL, "method": "int4", "requests": REQUESTS, "concurrency": CONCURRENCY, "mix": MIX}
    record("serving", {**settings, "new_tokens": TOKENS, "threads": 1}, measured())


def measured() -> Iterator[Row]:
    assert sum(MIX.values()) == REQUESTS
    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder) / "smollm2-int4"
        if cli.main(["convert", MODEL, "-o", str(made), "--method", "int4"]):
            raise SystemExit("convert failed")
        with serving(made, Path(folder) / "log") as address:
            yield asyncio.run(load(address, made.name))


@contextmanager
def serving(directory: Path, log: Path) -> Iterator[str]:
    """The address of a server in a process of its own, which has to stop when it is told to, without complaints."""
    command = [sys.executable, "-m", "rankgate.cli", "serve", str(directory), "--port", "0", "--device", "cpu"]
    environment = {**os.environ, "RANKGATE_API_KEY": KEY, "NUMBA_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
    with log.open("w") as errors:
        process = subprocess.Popen(command, stderr=errors, env=environment)
        try:
            while "is served at" not in log.read_text():
                if process.poll() is not None:
                    raise SystemExit(log.read_text())
                time.sleep(0.1)
            yield next(word for word in log.read_text().split() if word.startswith("http")).removesuffix("/v1,")
            process.send_signal(signal.SIGTERM)
            check(process.wait(60) == -signal.SIGTERM, "stopped by SIGTERM")
            check("Traceback" not in log.read_text(), log.read_text())
        finally:
            process.kill()


def check(holds: bool, what: object) -> None:
    if not holds:
        raise RuntimeError(f"not so: {what}")


async def load(address: str, model: str) -> Row:
    import httpx2

    async with httpx2.AsyncClient(base_url=address, timeout=300, headers={"Authorization": f"Bearer {KEY}"}) as client:
        requests = Requests(client, model)
        for question in QUESTIONS:  # alone, which warms up as well
            requests.alone[question] = await requests.whole(question)
        kinds = [kind for kind, count in MIX.items() for _ in range(count)]
        random.Random(SEED).shuffle(kinds)
        before, start = await metrics(client), time.perf_counter()
        places = asyncio.Semaphore(CONCURRENCY)

        async def one(i: int, kind: str) -> None:
            async with places:
                await getattr(requests, kind.replace(" ", "_"))(QUESTIONS[i % len(QUESTIONS)])

        resident = [before["process_resident_memory_bytes"]]
        for part in range(0, REQUESTS, REQUESTS // PARTS):
            await asyncio.gather(*(one(i, kinds[i]) for i in range(part, part + REQUESTS // PARTS)))
            while (after := await metrics(client))["rankgate_unfinished"]:
                await asyncio.sleep(0.1)
            resident.append(after["process_resident_memory_bytes"])
        seconds = time.perf_counter() - start
    reasons = ("stop", "length", "cancelled", "timeout", "error")
    answers = {
        r: after.get(f"rankgate_answers_total {r}", 0) - before.get(f"rankgate_answers_total {r}", 0) for r in reasons
    }
    check(answers["stop"] + answers["length"] >= MIX["whole"] + MIX["streamed"], answers)
    check(answers["timeout"] == answers["error"] == 0, answers)
    return {
        "statuses": dict(sorted(requests.statuses.items())),
        "answers_by_end": answers,
        "new_tokens": after["rankgate_new_tokens_total"] - before["rankgate_new_tokens_total"],
        "seconds": seconds,
        "resident_bytes": resident,
    }


class Requests:
    """One of each kind; each checks what it gets."""

    def __init__(self, client: httpx2.AsyncClient, model: str) -> None:
        self.client, self.model = client, model
        self.alone: dict[str, str] = {}  # answers by question
        self.statuses: Counter[str] = Counter()

    def body(self, question: str, **options: Any) -> dict[str, Any]:
        messages = [{"role": "user", "content": question}]
        return {"model": self.model, "messages": messages, "max_tokens": TOKENS, "temperature": 0, **options}

    def expect(self, kind: str, response: httpx2.Response, status: int) -> None:
        self.statuses[f"{kind}: {response.status_code}"] += 1
        check(response.status_code == status, f"{kind}: {response.status_code} instead of {status}")

    async def whole(self, question: str) -> str:
        response = await self.client.post(CHAT, json=self.body(question))
        self.expect("whole", response, 200)
        text: str = response.json()["choices"][0]["message"]["content"]
        check(self.alone.get(question, text) == text, f"the same answer as alone, to {question}")
        return text

    async def streamed(self, question: str) -> None:
        body = self.body(question, stream=True, stream_options={"include_usage": True})
        async with self.client.stream("POST", CHAT, json=body) as response:
            self.expect("streamed", response, 200)
            *events, done = [event async for event in events_of(response)]
        *chunks, last = map(json.loads, events)
        choices = [chunk["choices"][0] for chunk in chunks]
        check(done == "[DONE]" and last["choices"] == [] and last["usage"]["completion_tokens"] <= TOKENS, "the end")
        check(choices[0]["delta"] == {"role": "assistant", "content": ""}, "the role comes first")
        check([bool(choice["finish_reason"]) for choice in choices] == [False] * (len(choices) - 1) + [True], "order")
        text = "".join(choice["delta"].get("content", "") for choice in choices)
        check(text == self.alone[question], f"the same answer as alone, in order, to {question}")

    async def disconnects(self, question: str) -> None:
        async with self.client.stream("POST", CHAT, json=self.body(question, stream=True, max_tokens=500)) as response:
            self.expect("disconnects", response, 200)
            async for _ in events_of(response):
                break

    async def malformed(self, question: str) -> None:
        headers = {"Content-Type": "application/json"}
        body = json.dumps(self.body(question))[:-5].encode()
        self.expect("malformed", await self.client.post(CHAT, content=body, headers=headers), 400)

    async def too_long(self, question: str) -> None:
        response = await self.client.post(CHAT, json=self.body(question * 3000))
        self.expect("too long", response, 400)
        check(response.json()["error"]["code"] == "context_length_exceeded", response.text)

    async def wrong_key(self, question: str) -> None:
        headers = {"Authorization": "Bearer guessed"}
        self.expect("wrong key", await self.client.post(CHAT, json=self.body(question), headers=headers), 401)


async def events_of(response: httpx2.Response) -> AsyncIterator[str]:
    async for line in response.aiter_lines():
        if line:
            yield line.removeprefix("data: ")


async def metrics(client: httpx2.AsyncClient) -> dict[str, float]:
    from prometheus_client.parser import text_string_to_metric_families

    families = text_string_to_metric_families((await client.get("/metrics")).text)
    return {" ".join([s.name, *s.labels.values()]): s.value for family in families for s in family.samples}


def section(content: Content) -> str:
    settings, (result,) = content["settings"], content["results"]
    ends = ", ".join(f"{int(count)} {end}" for end, count in result["answers_by_end"].items())
    memory = ", ".join(f"{value / 1e6:,.0f}" for value in result["resident_bytes"])
    mix = ", ".join(f"{count} {kind}" for kind, count in settings["mix"].items())
    rows = [(*status.split(": "), str(count)) for status, count in result["statuses"].items()]
    return f"""## Serving

{settings["requests"]} requests at concurrency {settings["concurrency"]} to SmolLM2-135M in {settings["method"]}
({mix}), of {settings["new_tokens"]} new tokens each, checked for status, order of the stream and text; the table also
counts the questions asked alone before, whose answers these must equal. Ends of the answers: {ends}.
Resident memory of the server in MB after a warm-up and after every quarter of the requests: {memory}. {source(content)}

{markdown(("request", "status", "answers"), rows)}
"""


if __name__ == "__main__":
    main()
