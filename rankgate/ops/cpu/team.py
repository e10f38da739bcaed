"""The threads of `ops.cpu`, and how they share work: the only way in which kernels here run in parallel.

A *program* is an int64 array of rows: address of a `Kernel`, address of its arguments, number of chunks, and an address
and bytes, of what a row of one chunk reads, or for one of several chunks, of the first chunk of the next matrix. Rows
run one after the other, the chunks of a row in any order and at the same time. The thread that calls `run` leads;
followers are threads of Python that sit in native code and wait for the next program by spinning, for some 100 µs, and
then asleep.

Threads take chunks one by one: one word holds the number of the row since the team began, its chunks and how many
of them are taken, and to take the next one is one compare-and-swap. A row ends when its chunks are through, whoever did
them. So a thread that the system has stopped holds nobody up unless it is in the middle of a chunk, and what it read
before cannot fit the word when it goes on. Who ends a row begins the next one; rows of one chunk (a norm, a
rotation) it does at once, without a word to the others, who meanwhile fetch the next matrix into their caches: memory
is what a token takes longest for. Therefore the others take chunks from the first one on, and who began the row does
the last one.

A leader may also `start` a program, see to something else, and `finish` it: one thread alone gets most of what the
memory gives.

Where other work takes a processor, a leader may wait some ms for a chunk again and again; so after two long waits in a
short time it works alone for a while, and for longer if that does not help.

Between operations of torch, whose threads spin for a while after each, its own threads take the followers' part
(`run_between`).

One program runs at a time. A thread that finds the team busy works its program off alone. A forked child has no
threads but the one that forked, and gets its own team at its first program.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import os
import threading
import time
from collections import deque
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import torch

from rankgate.ops.cpu.atomic import add, call, load, pause, replace, store
from rankgate.ops.cpu.compile import Kernel, jit
from rankgate.ops.cpu.processors import processors
from rankgate.ops.cpu.vector import LINE, ask

ROW = 5  # words of a row
MOST_CHUNKS = 0xFFFF  # of a row
SPINS = 20_000  # pauses, of some 20 to 60 ns, before a follower sleeps
# byte offsets in a team's control block; what is written often has a cache line of its own
WORD, DONE, PLACE, END, MATRIX, SHARE, FINISHED, QUIT = 0, 64, 128, 136, 144, 152, 192, 256
BLOCK = 320
LATE = 10_000  # pauses that no chunk takes: the system has stopped a follower in the middle of one
OFTEN, MEMORY = 1.5, 0.9  # such waits, of which the ones before count less and less
SHORTEST, LONGEST = 0.02, 0.64  # seconds alone after that
FETCHED = 256 << 10  # bytes of the next matrix, at most: what a cache has room for
ARGUMENTS = 768  # bytes, that most rows have not more of
ASKED = 32 << 10  # bytes of what a row of one chunk reads, at most
SMALLEST_CHUNK, LARGEST_CHUNK = 24 << 10, 512 << 10  # bytes of a matrix


@jit
def _ask(row: int, end: int) -> None:
    """Ask for what the rows of one chunk from `row` on read, and for the arguments of the one after them.

    All of it has been driven out of the caches since the last token.
    """
    while row < end:
        arguments, address = load(row + 8), load(row + 24)
        for offset in range(0, ARGUMENTS, LINE):
            ask(arguments + offset)
        if load(row + 16) > 1:
            return
        for offset in range(0, min(load(row + 32), ASKED), LINE):
            ask(address + offset)
        row += 8 * ROW


@jit
def _first_shared(row: int, end: int) -> int:
    """Do the rows of one chunk from `row` on; the first other one."""
    while row < end:
        chunks = load(row + 16)
        if chunks > 1:
            return row
        if chunks == 1:
            call(load(row), load(row + 8), 0)
        row += 8 * ROW
    return end


@jit
def _publish(control: int, row: int, reserved: int) -> int:
    """Let everybody take chunks of `row`, but for the last if that is reserved; all of the rows before are through."""
    chunks = load(row + 16) - reserved
    store(control + DONE, -reserved)
    store(control + PLACE, row)
    store(control + MATRIX, load(row + 24))
    store(control + SHARE, load(row + 32))
    number = (load(control + WORD) >> 32) + 1
    store(control + WORD, ((number & 0x7FFFFFFF) << 32) | (chunks << 16))
    _ask(row + 8 * ROW, load(control + END))
    return chunks


@jit
def _do(control: int, row: int, chunk: int, chunks: int) -> None:
    """Do a chunk; whoever does the last one of a row goes on to the next."""
    call(load(row), load(row + 8), chunk)
    while add(control + DONE, 1) + 1 == chunks:
        end = load(control + END)
        row = _first_shared(row + 8 * ROW, end)
        if row == end:
            store(control + FINISHED, 1)
            return
        chunks = _publish(control, row, 1)
        call(load(row), load(row + 8), chunks)


@jit
def _take(control: int) -> bool:
    """Do one chunk, if there is one."""
    word = load(control + WORD)
    taken, chunks = word & MOST_CHUNKS, (word >> 16) & MOST_CHUNKS
    if taken >= chunks:
        return False
    if replace(control + WORD, word, word + 1):
        _do(control, load(control + PLACE), taken, chunks)
    return True


@jit
def _fetch(control: int, number: int, fetched: int) -> int:
    """Wait by fetching two lines of the next matrix, from the chunk of this number on; how many bytes are there."""
    share = load(control + SHARE)
    if fetched >= min(share, FETCHED):
        pause()
        return fetched
    address = load(control + MATRIX) + number * share + fetched
    ask(address)
    ask(address + LINE)
    return fetched + 2 * LINE


@jit
def _open(control: int, row: int, end: int) -> bool:
    """Begin a program, whether there is something in it for several threads."""
    row = _first_shared(row, end)
    if row < end:
        store(control + END, end)
        store(control + FINISHED, 0)
        _publish(control, row, 0)
    return row < end


@jit
def _lead(control: int) -> int:
    """Take part until the program is through; the longest time that the leader waited, in pauses."""
    longest = waited = fetched = 0
    while not load(control + FINISHED):
        if _take(control):
            waited = fetched = 0
        else:
            fetched = _fetch(control, 0, fetched)
            waited += 1
            longest = max(longest, waited)
    return longest


@Kernel
def _join(control: int, _: int) -> None:
    """The same, for a thread of somebody else's."""
    _lead(control)


@jit
def _follow(control: int, number: int) -> bool:
    """Take part until there is nothing to do for some time; whether the team goes on."""
    waited = fetched = 0
    while waited < SPINS:
        if load(control + QUIT):
            return False
        if _take(control):
            waited = fetched = 0
        else:
            fetched = _fetch(control, number, fetched)
            waited += 1
    return True


@jit
def _alone(row: int, end: int) -> None:
    while row < end:
        for chunk in range(load(row + 16)):
            call(load(row), load(row + 8), chunk)
        row += 8 * ROW


_born = os.getpid()


class _Team:
    """Those who work on one program at a time."""

    def __init__(self) -> None:
        self.begin()

    def begin(self) -> None:
        """Without followers: at first, and in a forked child."""
        self.busy = threading.Lock()
        self.forked = os.getpid() != _born  # GNU's OpenMP does not survive that
        self.followers: list[threading.Thread] = []
        self.asleep: deque[threading.Lock] = deque()
        self.alone_until, self.pause, self.waits = 0.0, SHORTEST, 0.0
        self._block = np.zeros(BLOCK // 8 + 8, np.int64)
        self.control = -(-self._block.ctypes.data // 64) * 64
        self._word(FINISHED)[0] = 1

    def start(self, row: int, end: int, threads: int) -> bool:
        """Begin a program, whether there is something left of it for `finish`."""
        late = time.perf_counter() < self.alone_until
        if threads < 2 or late or not self.busy.acquire(blocking=False):
            _alone(row, end)
            return False
        if len(self.followers) != threads - 1:
            self._hire(threads - 1)
        if _open(self.control, row, end):
            self._wake()
            return True
        self.busy.release()
        return False

    def finish(self, *, early: bool = False) -> None:
        """Work off what was begun, or on `early` no more than the row that is being done."""
        if early:
            self._word(END)[0] = 0
        try:
            late = _lead(self.control) > LATE
        finally:
            self.busy.release()
        self.waits = MEMORY * self.waits + late
        if self.waits > OFTEN:
            self.alone_until = time.perf_counter() + self.pause
            self.pause, self.waits = min(2 * self.pause, LONGEST), 1.0
        elif not late:
            self.pause = max(self.pause / 1.1, SHORTEST)

    def run_by(self, openmp: Callable[..., None], row: int, end: int, threads: int) -> None:
        """Work off a program by the threads of `openmp`."""
        if threads < 2 or not self.busy.acquire(blocking=False):
            _alone(row, end)
            return
        if _open(self.control, row, end):
            openmp(_join.address, self.control, threads, 0)
        self.busy.release()

    def _word(self, offset: int) -> np.ndarray:
        """A word of the control block."""
        return self._block[(self.control - self._block.ctypes.data + offset) // 8 :][:1]

    def _hire(self, followers: int) -> None:
        self._dismiss()
        self._word(QUIT)[0] = 1
        _follow(self.control, 0)  # is compiled before the threads begin
        self._word(QUIT)[0] = 0
        work = [threading.Thread(target=self._work, args=(n,), daemon=True, name="rankgate") for n in range(followers)]
        for thread in work:
            thread.start()
        self.followers = work

    def _work(self, number: int) -> None:
        bed = threading.Lock()
        bed.acquire()
        while _follow(self.control, number):
            self.asleep.append(bed)
            if not self._word(FINISHED)[0]:  # a program that may have been begun before this one could be woken
                with contextlib.suppress(ValueError):
                    self.asleep.remove(bed)
                    continue
            bed.acquire()

    def _wake(self) -> None:
        while self.asleep:
            self.asleep.popleft().release()

    def _dismiss(self) -> None:
        if self.followers:
            self._word(QUIT)[0] = 1
        for thread in self.followers:
            while thread.is_alive():
                self._wake()
                thread.join(0.001)
        self.followers = []

    def end(self) -> None:
        """Before the interpreter does, whose memory followers would go on to read."""
        if self.busy.acquire(timeout=1):
            self._dismiss()


_team = _Team()
atexit.register(_team.end)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_team.begin)


def run(program: np.ndarray, threads: int | None = None) -> None:
    """Work off `program` (rows × ROW, int64), with all arguments in place, by so many threads: by default `size()`."""
    if start(program, threads):
        finish()


def start(program: np.ndarray, threads: int | None = None) -> bool:
    """Begin such a program, which followers go on with; whether `finish` is to be called for it, by any thread.

    Until then other programs are worked off by the thread that asks for them.
    """
    begin = program.ctypes.data
    return _team.start(begin, begin + program.nbytes, size() if threads is None else threads)


def finish(*, early: bool = False) -> None:
    """Take part in the program that was begun until it is through; on `early`, until the row at work is."""
    _team.finish(early=early)


def run_between(program: np.ndarray) -> None:
    """The same between operations of torch, by its threads: they and followers would fight for the processors."""
    openmp = None if _team.forked else _openmp()
    if openmp is None:
        run(program)
    else:
        begin = program.ctypes.data
        _team.run_by(openmp, begin, begin + program.nbytes, size())


@cache
def _openmp() -> Callable[..., None] | None:
    """GNU's OpenMP as torch has loaded it: function, argument, threads, flags. None where torch has another one."""
    try:
        loaded = {line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines() if "libgomp" in line}
        path = next((path for path in sorted(loaded) if "/torch" in path), None)
        parallel = None if path is None else ctypes.CDLL(path).GOMP_parallel
    except (OSError, AttributeError):
        return None
    if parallel is not None:
        parallel.argtypes, parallel.restype = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint], None
    return parallel


def row(kernel: Kernel, arguments: np.ndarray, chunks: int, matrix: int = 0, share: int = 0) -> list[int]:
    """A row of a program; `arguments` are int64 words, to be kept as long as the program is used.

    matrix, share: where the kernel reads memory front to back, its address and the bytes of a chunk.
    """
    assert chunks <= MOST_CHUNKS
    return [kernel.address, arguments.ctypes.data, chunks, matrix, share]


def program(rows: list[list[int]]) -> np.ndarray:
    """A program of such rows, those of several chunks each with the matrix of the next."""
    made = np.array(rows, np.int64)
    following = 0, 0
    for line in reversed([line for line in made if line[2] > 1]):
        own = line[3], line[4]
        line[3:] = following
        following = own if own[0] else following
    return made


def chunk_rows(m: int, row_bytes: int, multiple: int) -> int:
    """Rows of a chunk of a matrix (m rows of so many bytes): long streams, and still a few chunks for each thread."""
    share = min(max(m * row_bytes // (2 * size()), SMALLEST_CHUNK), LARGEST_CHUNK)
    return max(-(-share // row_bytes // multiple) * multiple, -(-m // MOST_CHUNKS // multiple) * multiple)


def size() -> int:
    """Threads of a program: NUMBA_NUM_THREADS, or the processors of this process; never more than torch's."""
    return min(processors(), torch.get_num_threads())
