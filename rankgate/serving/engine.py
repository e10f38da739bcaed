"""One model on one thread: requests of an event loop get their answers from it one after another, and can give up."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector

from rankgate.hub.opening import Opened
from rankgate.serving.answer import Sampling, answer

SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)  # upper ends of the histograms' buckets
WARM_UP = Sampling(tokens=3)
log = logging.getLogger(__name__)


class QueueFull(Exception):
    """As many requests wait as may."""


@dataclass(frozen=True)
class Ending:
    """reason: stop or length; or, without a whole answer, cancelled, timeout, shutdown or error."""

    reason: str
    tokens: int = 0

    @property
    def complete(self) -> bool:
        return self.reason in {"stop", "length"}


class Job:
    """An answer on its way. `events` are pieces of text, then one Ending. All but `given_up` is the event loop's."""

    def __init__(self, engine: Engine, prompt: Sequence[int], sampling: Sampling) -> None:
        self.engine, self.prompt, self.sampling = engine, prompt, sampling
        self.events: asyncio.Queue[str | Ending] = asyncio.Queue()
        self.given_up = threading.Event()
        self.started = time.perf_counter()
        timer = asyncio.get_running_loop().call_later(engine.seconds, self.end, Ending("timeout"))
        self.watchers: list[asyncio.TimerHandle | asyncio.Task[None]] = [timer]  # they may end it, and end with it

    def piece(self, text: str) -> None:
        self.events.put_nowait(text)

    def cancel(self) -> None:
        """Nobody waits for the answer any more."""
        self.end(Ending("cancelled"))

    def end(self, ending: Ending) -> None:
        """The first ending counts; the thread goes on to the next job after at most one more token."""
        if self not in self.engine.jobs:
            return
        self.engine.jobs.remove(self)
        for watcher in self.watchers:
            watcher.cancel()
        self.given_up.set()
        self.engine.metrics.answered(self, ending)
        self.events.put_nowait(ending)


class Metrics:
    """What Prometheus may ask for."""

    def __init__(self, jobs: set[Job]) -> None:
        self.registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        self.responses = Counter(
            "rankgate_responses", "HTTP responses by path and status", ["path", "status"], registry=registry
        )
        self.answers = Counter("rankgate_answers", "Answers by how they ended", ["reason"], registry=registry)
        self.prompt_tokens = Counter("rankgate_prompt_tokens", "Tokens of answered prompts", registry=registry)
        self.new_tokens = Counter("rankgate_new_tokens", "Tokens of whole answers", registry=registry)
        self.running = Gauge("rankgate_running", "Answers being generated", registry=registry)
        unfinished = Gauge("rankgate_unfinished", "Answers waiting or being generated", registry=registry)
        unfinished.set_function(lambda: len(jobs))
        self.seconds = Histogram(
            "rankgate_answer_seconds", "From request to whole answer", buckets=SECONDS, registry=registry
        )

    def answered(self, job: Job, ending: Ending) -> None:
        self.answers.labels(ending.reason).inc()
        if ending.complete:
            self.prompt_tokens.inc(len(job.prompt))
            self.new_tokens.inc(ending.tokens)
            self.seconds.observe(time.perf_counter() - job.started)


class Engine:
    """The thread that generates. queue: requests that may wait; seconds: the longest that one takes, waiting included.

    `submit` and `jobs` belong to the event loop.
    """

    def __init__(self, opened: Opened, queue: int, seconds: float) -> None:
        self.opened, self.queue, self.seconds = opened, queue, seconds
        self.jobs: set[Job] = set()
        self.metrics = Metrics(self.jobs)
        self.thread = ThreadPoolExecutor(1, thread_name_prefix="generate")

    def warm_up(self) -> None:
        """Compile what the first answer would wait for, on the thread that will need it."""
        self.thread.submit(answer, self.opened, [0], WARM_UP, lambda _: None, lambda: False).result()

    def submit(self, prompt: Sequence[int], sampling: Sampling) -> Job:
        """Put a request at the end of the queue. Raises QueueFull."""
        if len(self.jobs) > self.queue:
            raise QueueFull
        job = Job(self, prompt, sampling)
        self.jobs.add(job)
        self.thread.submit(self._run, job, asyncio.get_running_loop())
        return job

    def _run(self, job: Job, loop: asyncio.AbstractEventLoop) -> None:
        if job.given_up.is_set():
            return

        def emit(text: str) -> None:
            loop.call_soon_threadsafe(job.piece, text)

        with self.metrics.running.track_inprogress():
            try:
                ending = Ending(*answer(self.opened, job.prompt, job.sampling, emit, job.given_up.is_set))
            except Exception:
                log.exception("generation failed")
                ending = Ending("error")
        loop.call_soon_threadsafe(job.end, ending)

    def give_up(self, ending: Ending) -> None:
        """End what is unfinished."""
        for job in list(self.jobs):
            job.end(ending)

    def close(self) -> None:
        """Wait for the thread, when there is no event loop any more."""
        for job in self.jobs:
            job.given_up.set()
        self.thread.shutdown()
