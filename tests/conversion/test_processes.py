"""Processes that calibrate together find what one finds alone."""

import os
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file

from rankgate.conversion.calibration import Stats
from rankgate.hub.opening import open_any

COUNT = 2
CALIBRATED = ("--calibration-tokens", "320", "--context", "64", "--device", "cpu")  # five windows


def convert(model: Path, out: Path, *options: str, processes: int) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m"]
    if processes > 1:
        command += ["torch.distributed.run", "--standalone", "--nproc-per-node", str(processes), "-m"]
    command += ["rankgate.cli", "convert", str(model), "-o", str(out), *CALIBRATED, *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, env=environment)


def test_two_processes_calibrate_as_one(model_dir: Path, tmp_path: Path):
    found = []
    for count in (1, COUNT):
        out, stats = tmp_path / f"out{count}", tmp_path / f"stats{count}"
        done = convert(model_dir, out, "--method", "lrq", "--rank", "16", "--stats", str(stats), processes=count)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("written to") == done.stderr.count("calibrating on") == 1
        found.append((Stats.load(stats), load_file(out / "model.safetensors")))
    (one, alone), (two, together) = found
    assert one.tokens == two.tokens and torch.equal(one.hashes, two.hashes)
    for a, b in zip(one.groups, two.groups, strict=True):
        assert a.members == b.members and a.tokens == b.tokens
        torch.testing.assert_close(a.C, b.C, rtol=1e-4, atol=1e-5)
        assert a.sample.shape == b.sample.shape
    assert alone.keys() == together.keys()
    assert open_any(str(tmp_path / "out2")).model.device.type == "cpu"


def test_only_the_first_process_writes_what_needs_no_statistics(model_dir: Path, tmp_path: Path):
    done = convert(model_dir, tmp_path / "out", "--method", "int8", processes=COUNT)
    assert done.returncode == 0 and done.stdout.count("written to") == 1, done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_too_few_windows_are_refused(model_dir: Path, tmp_path: Path):
    done = convert(model_dir, tmp_path / "out", "--calibration-tokens", "64", processes=COUNT)
    assert done.returncode != 0 and "1 windows of text are too few for 2 processes" in done.stderr
    assert not list(tmp_path.iterdir())
