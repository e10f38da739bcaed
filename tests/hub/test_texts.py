import pytest

from rankgate.errors import RankgateError
from rankgate.hub import texts


def test_default_parts_share_no_paragraph_and_are_long_enough():
    calibration, held_out = texts.load_text(texts.CALIBRATION), texts.load_text(texts.HELD_OUT)
    assert not set(calibration.split("\n\n")) & set(held_out.split("\n\n")) - {""}
    assert min(len(calibration), len(held_out)) > 100_000


def test_bad_files_are_named(tmp_path):
    (tmp_path / "latin").write_bytes(b"caf\xe9 au lait")
    (tmp_path / "empty").write_text(" \n")
    for name, message in (("latin", "not UTF-8"), ("empty", "is empty"), ("missing", "no text file")):
        with pytest.raises(RankgateError, match=message):
            texts.load_text(str(tmp_path / name))
    with pytest.raises(RankgateError, match="cannot read"):
        texts.load_text(str(tmp_path))
