"""`rankgate serve`: one model behind OpenAI's completions API, over HTTP.

transformers' own server does not fit: it opens models itself, by name and without Rankgate's layers or loop, ignores
parameters that it does not support, and has no key and no bound on bodies, queue or time; its parts are private, and
differ between the versions that Rankgate supports. This one is uvicorn, pydantic and Starlette, FastAPI's foundation.
FastAPI itself would parse a body before its size and the key are looked at; told not to, it adds nothing.

    loop      one event loop: reads requests, encodes prompts (in threads), writes answers
    engine    one thread generates, for one request at a time; the others wait for their turn in `Engine.jobs`

A request that takes too long, waiting included, ends with status 504, or in a stream that has begun with an error event
and no [DONE]. A client that goes away ends its request, wherever it is (499 in the metrics).
"""

from __future__ import annotations

import asyncio
import ipaddress
import json
import os
import secrets
import socket
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import uvicorn
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from rankgate.common.terminal import say
from rankgate.errors import RankgateError
from rankgate.hub.opening import Opened
from rankgate.serving.answer import Answered
from rankgate.serving.engine import Ending, Engine, Job, QueueFull, Said
from rankgate.serving.replies import Reply
from rankgate.serving.requests import ApiError, ChatRequest, CompletionRequest

KEY_VARIABLE = "RANKGATE_API_KEY"
STALLED = 5  # seconds that clients have to read the error that ends their answer
GONE = 499  # what nobody will read is logged as, after nginx
FAILURES = {
    "timeout": ApiError(504, "the answer took too long", code="timeout", headers={"x-should-retry": "false"}),
    "error": ApiError(500, "the model failed; see the server's log", code="internal_error"),
    "shutdown": ApiError(503, "the server is stopping", code="shutdown"),
}


@dataclass(frozen=True)
class Limits:
    """context: tokens of prompt and answer together; body: bytes; parallel: answers at once; queue: waiting requests.

    seconds: of one request; grace: seconds that unfinished requests have when the server is told to stop.
    """

    context: int
    body: int
    parallel: int
    queue: int
    seconds: float
    grace: int


def read_key(file: str | None) -> str | None:
    """The key in `file`, else in the environment; None: no key is needed. Raises RankgateError if it is empty."""
    if file is None:
        key = os.environ.get(KEY_VARIABLE)
    else:
        try:
            key = Path(file).read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise RankgateError(f"cannot read the key in {file}: {error}") from error
    if key is not None and not key:
        raise RankgateError(f"the key in {file or KEY_VARIABLE} is empty; write one, or leave it out")
    return key


def served_name(name: str) -> str:
    """What clients call the model: of a path the last part, which says nothing about the machine."""
    return Path(name).resolve().name if Path(name).exists() else name


class Http(uvicorn.Server):
    """uvicorn, told to stop: it takes nothing new, and what is not through after `grace` seconds ends with an error."""

    def __init__(self, app: ASGIApp, engine: Engine, grace: int) -> None:
        self.engine, self.grace = engine, grace
        options: dict[str, Any] = {"access_log": False, "server_header": False, "ws": "none", "lifespan": "off"}
        last = grace + STALLED  # then connections are cut off
        super().__init__(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=last, **options))

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        asyncio.get_running_loop().call_later(self.grace, self.engine.give_up, Ending("shutdown"))
        await super().shutdown(sockets)


class Server:
    """The endpoints, around one engine."""

    def __init__(self, opened: Opened, limits: Limits, key: str | None) -> None:
        self.opened, self.limits, self.key = opened, limits, key
        self.name = served_name(opened.name)
        self.engine = Engine(opened, limits.parallel, limits.queue, limits.seconds)
        self.http = Http(self.app(), self.engine, limits.grace)

    def run(self, listener: socket.socket) -> None:
        """Serve until SIGTERM or SIGINT, which then have their usual effect."""
        self.engine.warm_up()
        host, port = listener.getsockname()[:2]
        shown = f"[{host}]" if ":" in host else host
        say(f"{self.name} is served at http://{shown}:{port}/v1" + (", for those with the key" if self.key else ""))
        if self.key is None and not ipaddress.ip_address(host).is_loopback:
            say(f"everyone who reaches this address can use the model; set {KEY_VARIABLE} to change that")
        try:
            self.http.run([listener])
        finally:
            self.engine.close()

    def app(self) -> ASGIApp:
        routes = [
            Route("/v1/chat/completions", self.chat, methods=["POST"]),
            Route("/v1/completions", self.completions, methods=["POST"]),
            Route("/v1/models", self.models),
            Route("/v1/models/{name:path}", self.model),
            Route("/health", self.health),
            Route("/metrics", self.metrics),
        ]
        handlers: dict[Any, Any] = {
            ApiError: lambda _, error: failure(error),
            HTTPException: lambda _, error: failure(ApiError(error.status_code, error.detail, headers=error.headers)),
            ClientDisconnect: lambda *_: Response(status_code=GONE),
            Exception: lambda *_: failure(FAILURES["error"]),
        }
        app = Starlette(routes=routes, exception_handlers=handlers)
        return Counted(app, [route.path for route in routes], self.engine.metrics.responses.labels)

    async def health(self, _: Request) -> Response:
        return JSONResponse({"status": "ok"})

    async def metrics(self, _: Request) -> Response:
        return Response(generate_latest(self.engine.metrics.registry), media_type=CONTENT_TYPE_LATEST)

    async def models(self, request: Request) -> Response:
        self.check_key(request)
        return JSONResponse({"object": "list", "data": [self.card()]})

    async def model(self, request: Request) -> Response:
        self.check_key(request)
        self.check_model(request.path_params["name"])
        return JSONResponse(self.card())

    async def chat(self, request: Request) -> Response:
        return await self.complete(request, ChatRequest)

    async def completions(self, request: Request) -> Response:
        return await self.complete(request, CompletionRequest)

    def card(self) -> dict[str, Any]:
        return {"id": self.name, "object": "model", "created": 0, "owned_by": "rankgate"}

    def check_key(self, request: Request) -> None:
        given = request.headers.get("authorization", "").encode("latin-1")
        if self.key is not None and not secrets.compare_digest(given, f"Bearer {self.key}".encode()):
            headers = {"WWW-Authenticate": "Bearer"}
            raise ApiError(401, "the API key is missing or wrong", code="invalid_api_key", headers=headers)

    def check_model(self, name: str) -> None:
        if name != self.name:
            raise ApiError(404, f"the only model here is {self.name!r}", code="model_not_found", param="model")

    async def body(self, request: Request) -> bytes:
        """Raises ApiError for a body that is too large, too slow, or not said to be JSON."""
        if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            raise ApiError(415, "send JSON, with the header Content-Type: application/json")  # which browsers ask for
        limit, body = self.limits.body, b""
        too_large = ApiError(413, f"the body has more than {limit:,} bytes", code="body_too_large")
        length = request.headers.get("content-length", "0")
        if length.isdecimal() and int(length) > limit:
            raise too_large
        try:
            async with asyncio.timeout(self.limits.seconds):
                async for piece in request.stream():
                    body += piece
                    if len(body) > limit:
                        raise too_large
        except TimeoutError:
            raise ApiError(408, "the body took too long", code="timeout") from None
        return body

    async def complete(self, request: Request, kind: type[ChatRequest] | type[CompletionRequest]) -> Response:
        self.check_key(request)
        call = kind.parse(await self.body(request))
        self.check_model(call.model)
        prompts = await asyncio.to_thread(call.prompts, self.opened)
        lengths = [len(prompt) for prompt in prompts]
        sampling = call.sampling(max(lengths), self.limits.context)
        try:
            job = self.engine.submit(prompts, sampling)
        except QueueFull:
            message, headers = f"{self.limits.queue} requests wait already; try again later", {"Retry-After": "1"}
            raise ApiError(429, message, code="queue_full", headers=headers) from None
        job.watchers.append(asyncio.create_task(cancel_when_gone(request, job)))
        reply, said = Reply(self.name, call.chat, lengths, sampling.top is not None), []
        event = await job.events.get()  # what goes wrong before it still has a status of its own
        if call.stream and isinstance(event, Said):
            chunks = stream(job, event, reply, usage=call.stream_options.include_usage)
            return StreamingResponse(chunks, media_type="text/event-stream")
        while isinstance(event, Said):
            said.append(event)
            event = await job.events.get()
        if event.complete:
            return JSONResponse(reply.whole(said))
        return failure(FAILURES[event.reason]) if event.reason in FAILURES else Response(status_code=GONE)


async def cancel_when_gone(request: Request, job: Job) -> None:
    """Runs beside the answer; its request has been read, so that all there is to receive is its end."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
    job.cancel()


async def stream(job: Job, event: Said | Ending, reply: Reply, *, usage: bool) -> AsyncIterator[str]:
    """Server-sent events: the answers that begin with `event`, in chunks."""
    ends = []
    try:
        for chunk in reply.opening():
            yield sent(chunk)
        while isinstance(event, Said):
            yield sent(reply.chunk(event))
            if isinstance(event.what, Answered):
                ends.append(event)
            event = await job.events.get()
        if event.complete:
            if usage:
                yield sent(reply.usage(ends))
            yield "data: [DONE]\n\n"
        elif event.reason in FAILURES:
            yield sent(FAILURES[event.reason].body)
    finally:
        job.cancel()


def sent(content: dict[str, Any]) -> str:
    return f"data: {json.dumps(content)}\n\n"


def failure(error: ApiError) -> Response:
    return JSONResponse(error.body, error.status, error.headers)


class Counted:
    """Counts what an application answers, also when that is an unexpected error."""

    def __init__(self, app: ASGIApp, paths: list[str], labels: Callable[[str, int], Any]) -> None:
        self.app, self.paths, self.labels = app, paths, labels

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def counting(message: Message) -> None:
            if message["type"] == "http.response.start":
                path = scope["path"] if scope["path"] in self.paths else "other"
                self.labels(path, message["status"]).inc()
            await send(message)

        await self.app(scope, receive, counting)


def listen(host: str, port: int) -> socket.socket:
    """Port 0 takes a free one. Raises RankgateError."""
    try:
        return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except (OSError, OverflowError) as error:
        raise RankgateError(f"cannot listen at {host}, port {port}: {error}; choose another --port") from error
