"""Parts that are made once."""

import pytest
import torch
from safetensors import SafetensorError

from rankgate import RankgateError
from rankgate.common import kept


class Stopped(BaseException):
    """As by Ctrl-C."""


def work(directory, key="key", parts=3, stop=None, error=Stopped):
    made = []

    def make(i):
        made.append(i)
        return {"x": torch.full((2, 4), float(i)).T}

    with kept.kept_in(directory, key) as (part, _):
        found = []
        for i in range(parts):
            if i == stop:
                raise error("stop")
            found.append(part(f"part {i}", lambda i=i: make(i))["x"].clone())
    return made, torch.stack(found)


def test_parts_are_made_once(tmp_path):
    with pytest.raises(Stopped):
        work(tmp_path / "w", stop=2)
    made, found = work(tmp_path / "w")
    assert made == [2] and torch.equal(found, torch.arange(3.0)[:, None, None].expand(3, 4, 2))
    assert not any(tmp_path.iterdir())


def test_another_key_begins_anew(tmp_path):
    with pytest.raises(Stopped):
        work(tmp_path / "w", stop=2)
    assert work(tmp_path / "w", key="other")[0] == [0, 1, 2]


def test_a_part_without_its_end_is_made_again(tmp_path):
    with pytest.raises(Stopped):
        work(tmp_path / "w", stop=2)
    path = tmp_path / "w" / "part 1.safetensors"
    path.write_bytes(path.read_bytes()[:-3])
    assert work(tmp_path / "w")[0] == [1, 2]


def test_bad_input_leaves_nothing(tmp_path):
    with pytest.raises(RankgateError, match="stop"):
        work(tmp_path / "w", stop=1, error=RankgateError)
    assert not any(tmp_path.iterdir())


def test_a_full_disk_leaves_what_is_done(tmp_path, monkeypatch):
    def full(*_):
        raise SafetensorError("no space left")

    with pytest.raises(Stopped):
        work(tmp_path / "w", stop=2)
    with monkeypatch.context() as patch, pytest.raises(RankgateError, match=r"cannot write .*part 2.*make room"):
        patch.setattr(kept, "save_file", full)
        work(tmp_path / "w")
    assert work(tmp_path / "w")[0] == [2]


def test_what_somebody_else_wrote_is_left_alone(tmp_path):
    (tmp_path / "w").mkdir()
    (tmp_path / "w" / "diary").write_text("mine")
    with pytest.raises(RankgateError, match="in the way"):
        work(tmp_path / "w")
    assert (tmp_path / "w" / "diary").read_text() == "mine"
