"""The team of threads: every chunk once and rows in order, whoever calls, however many threads there are."""

import itertools
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from rankgate.ops.cpu import atomic, processors, team
from rankgate.ops.cpu.compile import Kernel


@Kernel
def count(arguments: int, chunk: int) -> None:
    """Arguments: addresses of a counter for each chunk, of a clock, and of the times at which chunks were done."""
    atomic.add(atomic.load(arguments) + 8 * chunk, 1)
    now = atomic.add(atomic.load(arguments + 8), 1)
    atomic.store(atomic.load(arguments + 16) + 8 * chunk, now)


@Kernel
def stop(arguments: int, chunk: int) -> None:
    """The first of two chunks waits for the second, which then lasts as if its thread had been stopped."""
    if chunk == 1:
        atomic.store(arguments, 1)
        for _ in range(20 * team.LATE):
            atomic.pause()
    while chunk == 0 and not atomic.load(arguments):
        atomic.pause()


class Work:
    """A program of rows with so many chunks, and what it has done."""

    def __init__(self, chunks):
        self.chunks = chunks
        self.clock = np.zeros(1, np.int64)
        self.counts = [np.zeros(c + 1, np.int64) for c in chunks]
        self.times = [np.zeros(c + 1, np.int64) for c in chunks]
        parts = zip(self.counts, self.times, strict=True)
        self.arguments = [np.array([c.ctypes.data, self.clock.ctypes.data, t.ctypes.data], np.int64) for c, t in parts]
        rows = [team.row(count, a, c) for a, c in zip(self.arguments, chunks, strict=True)]
        self.program = np.array(rows, np.int64)

    def check(self, times):
        assert self.clock[0] == times * sum(self.chunks)
        ends = []
        for chunks, counts, done in zip(self.chunks, self.counts, self.times, strict=True):
            assert (counts[:chunks] == times).all()
            assert counts[chunks] == 0
            ends.append((done[:chunks].min(), done[:chunks].max()) if chunks else None)
        ends = [e for e in ends if e is not None]
        assert all(before[1] < after[0] for before, after in itertools.pairwise(ends))


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("chunks", [[1], [5], [1, 1, 7, 1, 2, 2, 1], [0, 3, 0], [2] * 50, [1000]])
def test_every_chunk_once_and_rows_in_order(threads, chunks):
    work = Work(chunks)
    for _ in range(20):
        team.run(work.program, threads)
    work.check(20)


def test_a_leader_that_has_waited_long_works_alone_for_some_time(monkeypatch):
    monkeypatch.setattr(team, "SHORTEST", 1000.0)
    monkeypatch.setattr(team, "MEMORY", 1.0)
    monkeypatch.setattr(team, "_team", team._Team())
    work, words = Work([2, 3]), np.zeros(1, np.int64)
    while not team._team.alone_until:  # until it is the follower that does the second chunk
        words[0] = 0
        team.run(np.array([team.row(stop, words, 2)], np.int64), 2)
    monkeypatch.setattr(team, "_lead", None)
    team.run(work.program, 2)
    work.check(1)
    team._team.end()


def test_an_empty_program():
    team.run(np.empty((0, team.ROW), np.int64), 2)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_what_was_begun_goes_on_without_the_leader_and_others_work_alone_meanwhile(threads):
    work, other = Work([1, 3, 1, 1, 5, 1]), Work([2, 1, 4])
    until = time.monotonic() + 30
    for count in range(1, 21):
        begun = team.start(work.program, threads)
        assert begun or threads == 1 or time.perf_counter() < team._team.alone_until
        team.run(other.program, threads)
        while count == 20 and begun and work.clock[0] < 20 * sum(work.chunks):
            assert time.monotonic() < until
            time.sleep(0.001)
        if begun:
            team.finish()
        work.check(count)
    other.check(20)


def test_what_was_begun_ends_early(monkeypatch):
    """With the row that is being done, which here needs the leader; the next program is not the worse for it."""
    monkeypatch.setattr(team, "_team", team._Team())
    work, words = Work([3, 1, 2]), np.zeros(1, np.int64)
    program = np.concatenate([[team.row(stop, words, 2)], work.program])
    assert team.start(program, 2)
    team.finish(early=True)
    assert not work.clock[0]
    team.run(work.program, 2)
    work.check(1)
    team._team.end()


def test_followers_sleep_and_wake():
    work = Work([2, 1, 4])
    team.run(work.program, 2)
    until = time.monotonic() + 30
    while len(team._team.asleep) < 1:
        assert time.monotonic() < until
        time.sleep(0.01)
    team.run(work.program, 2)
    work.check(2)


def test_many_python_threads_at_once():
    works = [Work([1, 9, 1, 1, 4]) for _ in range(6)]
    threads = [
        threading.Thread(target=lambda w=w: [team.run(w.program, 2) for _ in range(300)], daemon=True) for w in works
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for work in works:
        work.check(300)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
@pytest.mark.filterwarnings("ignore:.*fork")
def test_a_forked_child_has_its_own_team():
    work = Work([3, 1, 5])
    team.run(work.program, 2)
    child = os.fork()
    if child == 0:
        try:
            team.run(work.program, 2)
            work.check(2)
            os._exit(0)
        except BaseException:
            os._exit(1)
    until = time.monotonic() + 60
    while os.waitpid(child, os.WNOHANG)[0] == 0:
        if time.monotonic() > until:
            os.kill(child, signal.SIGKILL)
            pytest.fail("the child hangs")
        time.sleep(0.05)
    team.run(work.program, 2)
    work.check(2)


def test_a_process_ends_with_its_team():
    here = Path(__file__)
    code = f"import sys; sys.path.insert(0, {str(here.parent)!r}); from {here.stem} import *; "
    code += "w = Work([4, 1, 4]); team.run(w.program, 3); w.check(1); print('done')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100, check=True)
    assert done.stdout == "done\n"


@pytest.mark.parametrize(
    ("files", "groups", "expected"),
    [
        ({}, "0::/\n", None),
        ({"cpu.max": "max 100000\n"}, "0::/\n", None),
        ({"cpu.max": "150000 100000\n"}, "0::/\n", 1.5),
        ({"cpu.max": "400000 100000\n", "a/b/cpu.max": "200000 100000\n"}, "0::/a/b\n", 2),
        ({"a/cpu.max": "100000 100000\n", "a/b/cpu.max": "max 100000\n"}, "0::/a/b\n", 1),
        ({"cpu.max": "300000 100000\n"}, "0::/not/seen/here\n", 3),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, "3:cpu,cpuacct:/\n0::/\n", None),
        ({"cpu/x/cpu.cfs_quota_us": "250000\n", "cpu/x/cpu.cfs_period_us": "100000\n"}, "3:cpu:/x\n", 2.5),
        ({"cpu,cpuacct/cpu.cfs_quota_us": "1\n", "cpu,cpuacct/cpu.cfs_period_us": "2\n"}, "3:cpu,cpuacct:/x\n", 0.5),
        ({"cpuset/cpu.cfs_quota_us": "1\n", "cpuset/cpu.cfs_period_us": "2\n"}, "3:cpuset:/\n", None),
    ],
)
def test_what_control_groups_allow(tmp_path, files, groups, expected):
    for name, text in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    assert processors.quota(tmp_path, groups) == expected


def test_the_size(monkeypatch):
    monkeypatch.setattr(team.torch, "get_num_threads", lambda: 4)
    try:
        for given, expected in (("3", 3), ("9", 4), ("1", 1)):
            monkeypatch.setenv("NUMBA_NUM_THREADS", given)
            processors.processors.cache_clear()
            assert team.size() == expected
    finally:
        processors.processors.cache_clear()
