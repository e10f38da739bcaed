"""One model, and a thread for each answer on its way: requests of an event loop get theirs, and can give up.

The answers share the steps of the model (`Batch`); what does not fit into one waits for its turn.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector

from rankgate.decoding.batch import Batch
from rankgate.hub.opening import Opened
from rankgate.serving.answer import Answered, Sampling, answer
from rankgate.serving.stream import Piece

SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)  # upper ends of the histograms' buckets
WAITED = (0.001, 0.005, 0.01, 0.025, *SECONDS)
BETWEEN = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)
WARM_UP = Sampling(tokens=3)
log = logging.getLogger(__name__)


class QueueFull(Exception):
    """As many requests wait as may."""


@dataclass(frozen=True)
class Said:
    """Of the answer to prompt number `index`: a piece, or how it ended."""

    index: int
    what: Piece | Answered


@dataclass(frozen=True)
class Ending:
    """reason: complete; or, before all prompts were answered, cancelled, timeout, shutdown or error."""

    reason: str

    @property
    def complete(self) -> bool:
        return self.reason == "complete"


class Job:
    """Answers on their way, one prompt's after another's. `events` are what is said, then one Ending.

    All but `given_up` is the event loop's.
    """

    def __init__(self, engine: Engine, prompts: Sequence[Sequence[int]], sampling: Sampling) -> None:
        self.engine, self.prompts, self.sampling = engine, prompts, sampling
        self.events: asyncio.Queue[Said | Ending] = asyncio.Queue()
        self.given_up = threading.Event()
        self.started = time.perf_counter()
        timer = asyncio.get_running_loop().call_later(engine.seconds, self.end, Ending("timeout"))
        self.watchers: list[asyncio.TimerHandle | asyncio.Task[None]] = [timer]  # they may end it, and end with it

    def say(self, said: Said) -> None:
        if self not in self.engine.jobs:
            return
        if isinstance(said.what, Answered):
            self.engine.metrics.answered(len(self.prompts[said.index]), said.what)
        self.events.put_nowait(said)

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
        self.engine.metrics.ended(ending, time.perf_counter() - self.started)
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

        def histogram(name: str, said: str, buckets: Sequence[float]) -> Histogram:
            return Histogram(f"rankgate_{name}_seconds", said, buckets=buckets, registry=registry)

        self.seconds = histogram("answer", "From request to whole answer, of all its prompts", SECONDS)
        self.queue_time = histogram("request_queue_time", "From request to its turn", WAITED)
        self.first_token = histogram("time_to_first_token", "From request to first new token", WAITED)
        self.between = histogram("inter_token_latency", "From a new token to the next one of its answer", BETWEEN)

    def answered(self, prompt_tokens: int, answered: Answered) -> None:
        """A whole answer to one prompt."""
        self.answers.labels(answered.reason).inc()
        self.prompt_tokens.inc(prompt_tokens)
        self.new_tokens.inc(len(answered.times))

    def ended(self, ending: Ending, seconds: float) -> None:
        """A request that took so many seconds."""
        if ending.complete:
            self.seconds.observe(seconds)
        else:
            self.answers.labels(ending.reason).inc()


class Engine:
    """The threads that generate. parallel: answers at once; queue: requests that may wait for that; seconds: the
    longest that one takes, waiting included.

    `submit` and `jobs` belong to the event loop.
    """

    def __init__(self, opened: Opened, parallel: int, queue: int, seconds: float) -> None:
        self.opened, self.parallel, self.queue, self.seconds = opened, parallel, queue, seconds
        self.jobs: set[Job] = set()
        self.metrics = Metrics(self.jobs)
        self.batch = Batch(parallel)
        self.threads = ThreadPoolExecutor(parallel, thread_name_prefix="generate")

    def warm_up(self) -> None:
        """Compile what the first answer would wait for."""
        answer(self.opened, [0], WARM_UP, lambda _: None, lambda: False, self.batch)

    def submit(self, prompts: Sequence[Sequence[int]], sampling: Sampling) -> Job:
        """Put a request at the end of the queue. Raises QueueFull."""
        if len(self.jobs) >= self.parallel + self.queue:
            raise QueueFull
        job = Job(self, prompts, sampling)
        self.jobs.add(job)
        self.threads.submit(self._run, job, asyncio.get_running_loop())
        return job

    def _run(self, job: Job, loop: asyncio.AbstractEventLoop) -> None:
        if job.given_up.is_set():
            return
        self.metrics.queue_time.observe(time.perf_counter() - job.started)
        ending = Ending("complete")
        with self.metrics.running.track_inprogress():
            try:
                for index in range(len(job.prompts)):
                    self._answer(job, index, loop)
                    if job.given_up.is_set():
                        return
            except Exception:
                log.exception("generation failed")
                ending = Ending("error")
        loop.call_soon_threadsafe(job.end, ending)

    def _answer(self, job: Job, index: int, loop: asyncio.AbstractEventLoop) -> None:
        def say(what: Piece | Answered) -> None:
            loop.call_soon_threadsafe(job.say, Said(index, what))

        answered = answer(self.opened, job.prompts[index], job.sampling, say, job.given_up.is_set, self.batch)
        if index == 0 and answered.times:
            self.metrics.first_token.observe(answered.times[0] - job.started)
        for one, two in pairwise(answered.times):
            self.metrics.between.observe(two - one)
        say(answered)

    def give_up(self, ending: Ending) -> None:
        """End what is unfinished."""
        for job in list(self.jobs):
            job.end(ending)

    def close(self) -> None:
        """Wait for the threads, when there is no event loop any more."""
        for job in self.jobs:
            job.given_up.set()
        self.threads.shutdown()
