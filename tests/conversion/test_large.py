"""Models whose second moments are too large for memory."""

import os
import tempfile

import pytest
import torch
from conftest import calibrated, tiny_model

from rankgate import LRQConfig, RankgateError, convert_
from rankgate.common.files import in_file
from rankgate.conversion import calibration


def test_moments_in_files_are_the_same(monkeypatch, tmp_path):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    model = tiny_model("llama")
    expected = calibrated(model, sensitivity=True)
    monkeypatch.setattr(calibration, "IN_MEMORY", 0)
    stats = calibrated(model, sensitivity=True)
    for group, other in zip(stats.groups, expected.groups, strict=True):
        assert torch.equal(group.C, other.C)
        assert not any(tmp_path.iterdir())  # nobody has to remove anything
    stats.save(tmp_path / "stats")
    convert_(model, LRQConfig(rank=8), stats, consume=True)
    ids = torch.arange(5, 20)[None]
    with torch.no_grad():
        other = tiny_model("llama")
        convert_(other, LRQConfig(rank=8), expected)
        assert torch.equal(model(ids).logits, other(ids).logits)


def test_a_disk_that_is_full_is_said(monkeypatch):
    def full(*_):
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(RankgateError, match=r"no room for 0\.0 GB in .*set TMPDIR"):
        in_file((4, 4), torch.float32)
