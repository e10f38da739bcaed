"""Texts that begin and end when they like, read together: continuous batching by captured steps.

Every text is written by a thread of its own, in the loop that it would have alone (`loop`), with its own policy. What
they share is the step: a `Text` is `Steps` whose `begin` only says which token comes next. Who is the last to wait for
logits makes the step for all, and one after the other goes on with those of his row: together they would only wait for
Python. So a batch has no plan: a text takes part from its second token on, and its row is free when it ends. Its prompt
is read while the others wait.

There are captures for 1, 2, 4, ... sequences. The cache moves to larger ones when a text needs the place or the length,
and to smaller ones when three quarters of the rows are empty.
"""

from __future__ import annotations

import contextlib
import threading
from collections import deque
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from rankgate.decoding.begun import Begun, Step
from rankgate.decoding.capture import Capture
from rankgate.decoding.steps import CAPACITY, Steps
from rankgate.errors import RankgateError


class Batch:
    """At most `most` texts of one model at once, which must not change meanwhile; more wait for a place."""

    def __init__(self, most: int) -> None:
        self.most = most
        self.lock = threading.Condition()
        self.ready: deque[Text] = deque()  # their logits are there, and they wait for their turn
        self.working: Text | None = None  # whose turn it is
        self.rows: list[Text | None] = []
        self.buffers: list[Tensor] = []  # keys and values, alternating: (rows, heads, capacity, width)
        self.capacity = 0
        self.captures: dict[int, Capture] = {}  # by number of sequences
        self.step: Step | None = None  # bound to the buffers
        self.begun: Begun | None = None
        self.logits: Tensor | None = None  # (rows, vocabulary) after the last step

    @property
    def texts(self) -> list[Text]:
        """Those that take part."""
        return [text for text in self.rows if text is not None]

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """While this lasts nobody else reads the model."""
        with self.lock:
            self._finish()
            yield

    def begin(self, text: Text, token: Tensor) -> None:
        """The next token (1, 1) of a text."""
        with self.lock:
            if text not in self.rows:
                self._join(text)
            text.token, text.asks = token, True
            text.length += 1
            if len(self.texts) == 1:
                self._begin_step()

    def result(self, text: Text) -> Tensor:
        """Logits (1, vocabulary) after that token. Raises RankgateError if the step failed."""
        self._end_turn(text)
        with self.lock:
            text.waits = True
            queued = text.asks  # or else its step was begun when it was alone
            self._step_if_all_wait()
        if queued:
            text.turn.acquire()
        with self.lock:
            text.waits = False
            if text.failure is not None:
                raise RankgateError(f"the step failed: {text.failure}") from text.failure
            self._finish()
            assert self.logits is not None
            return self.logits[text.row : text.row + 1]

    def _end_turn(self, text: Text) -> None:
        with self.lock:
            if self.working is text:
                self._pass_on()

    def _pass_on(self) -> None:
        self.working = self.ready.popleft() if self.ready else None
        if self.working is not None:
            self.working.turn.release()

    def leave(self, text: Text) -> None:
        """A text ends; the others go on."""
        self._end_turn(text)
        with self.lock:
            if text in self.rows:
                self.rows[self.rows.index(text)] = None
                if self.texts:
                    self._step_if_all_wait()
                elif self.begun is not None:
                    self.begun.cancel()
                    self.begun = None
                self.lock.notify_all()

    def _join(self, text: Text) -> None:
        while True:
            self._finish()
            count = len(self.texts)
            if count < self.most and (count < len(self.rows) or text.capture(_power(count + 1)) is not None):
                break
            self.lock.wait()
        if None in self.rows:
            self.rows[self.rows.index(None)] = text
        else:
            self.rows.append(text)

    def _step_if_all_wait(self) -> None:
        """Not before: threads that work on what came before would take processors from the step's."""
        texts = self.texts
        if all(text.asks and text.waits for text in texts):
            self._begin_step()
            self._finish()
            self.ready.extend(texts)
            self._pass_on()

    def _begin_step(self) -> None:
        texts = self.texts
        self._finish()
        try:
            self._make_room()
            tokens = [torch.zeros_like(texts[0].token) if text is None else text.token for text in self.rows]
            at = [[0 if text is None else text.length - 1] for text in self.rows]
            assert self.step is not None
            self.begun = self.step(torch.cat(tokens), torch.tensor(at, device=tokens[0].device))
        except Exception as error:
            self.buffers = []  # the next text makes room anew
            for text in texts:
                text.failure = error
        for text in texts:
            text.asks = False

    def _finish(self) -> None:
        if self.begun is not None:
            begun, self.begun = self.begun, None
            self.logits = begun.result().clone()

    def _make_room(self) -> None:
        """Have a row for each text, and capacity for its length."""
        texts = self.texts
        rows, longest = _power(len(texts)), max(text.length for text in texts)
        held = self.buffers[0].shape[0] if self.buffers else 0
        if rows <= held < 4 * rows and len(self.rows) <= held and longest <= self.capacity:
            for row, text in enumerate(self.rows):
                if text is not None and text.row < 0:
                    self._move(text, self.buffers, row)
            self.rows += [None] * (held - len(self.rows))
            return
        capacity = max(CAPACITY, _power(longest))
        new = [old.new_zeros((rows, len(old), capacity, old.shape[2])) for old in texts[0].buffers]
        for row, text in enumerate(texts):
            self._move(text, new, row)
        capture = texts[0].capture(rows)
        if capture is None:
            raise RankgateError(f"a step of {rows} sequences cannot be captured")
        self.buffers, self.capacity = new, capacity
        self.rows = [*texts, *[None] * (rows - len(texts))]
        self.step = capture.bind(new, texts[0].threads)

    def _move(self, text: Text, buffers: list[Tensor], row: int) -> None:
        """Keys and values of a text into a row of buffers, all but those of its next token."""
        count = text.length - 1
        for new, old in zip(buffers, text.buffers, strict=True):
            new[row, :, :count] = old[:, :count]
        text.buffers, text.row = [buffer[row] for buffer in buffers], row


class Text(Steps):
    """One text of a batch."""

    def __init__(self, batch: Batch, model: PreTrainedModel, input_ids: Tensor, kwargs: dict[str, Any]) -> None:
        super().__init__(model, input_ids, kwargs)
        self.batch, self.kwargs = batch, kwargs
        self.token = input_ids[:, :1]
        self.asks = self.waits = False  # for a step
        self.turn = threading.Semaphore(0)
        self.failure: Exception | None = None
        self.row = -1
        self.buffers: list[Tensor] = []  # keys and values, alternating: (heads, capacity, width)

    def prompt(self) -> Tensor:
        with self.batch.alone(), self._all_threads():
            logits = super().prompt()
            self.buffers = [buffer[0] for buffer in self._reserved(self.length)]
            return logits

    @contextlib.contextmanager
    def _all_threads(self) -> Iterator[None]:
        """Let torch have them while this lasts, and then, in this thread, one: its others wait by spinning."""
        if self.token.is_cuda:
            yield
            return
        torch.set_num_threads(self.threads)
        try:
            yield
        finally:
            torch.set_num_threads(1)

    def begin(self, token: Tensor) -> Begun:
        if self.row < 0:
            with self.batch.alone():
                captured = self.capture(1) is not None
            if not captured:
                return Begun(lambda: self._next_alone(token))
        self.batch.begin(self, token)
        return Begun(lambda: self.batch.result(self), lambda: self.batch.leave(self))

    def _next_alone(self, token: Tensor) -> Tensor:
        """By the model's own forward, where a step cannot be captured."""
        with self.batch.alone(), self._all_threads():
            return self.next(token)

    def capture(self, sequences: int) -> Capture | None:
        """Of a step of so many sequences. Made by a trial on sequences of two tokens."""
        if sequences in self.batch.captures:
            return self.batch.captures[sequences]
        shape = sequences, 1
        known = self._known()
        if shape not in known:
            ids = torch.zeros(sequences, 2, dtype=torch.int64, device=self.token.device)
            cache = DynamicCache(config=self.model.config)
            kwargs = {**self.kwargs, "past_key_values": cache, "attention_mask": torch.ones_like(ids)}
            if kwargs.get("position_ids") is not None:
                kwargs["position_ids"] = torch.arange(2, device=ids.device).expand_as(ids)
            with self._all_threads():
                trial = Steps(self.model, ids, kwargs)
                trial.prompt()
                trial.next(ids[:, :1])
            known = self._known()
        found = known.get(shape)
        if found is not None:
            self.batch.captures[sequences] = found
        return found


def _power(count: int) -> int:
    """The least power of two that is no less."""
    return 1 << (count - 1).bit_length()
