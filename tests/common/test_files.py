import pytest

from rankgate.common.files import atomic_path, check_writable
from rankgate.errors import RankgateError


def test_a_failure_leaves_nothing_and_keeps_what_was_there(tmp_path):
    target = tmp_path / "out"
    target.write_text("old")
    with pytest.raises(KeyError), atomic_path(target) as temporary:
        temporary.write_text("half")
        raise KeyError
    assert target.read_text() == "old" and list(tmp_path.iterdir()) == [target]
    with atomic_path(target) as temporary:
        temporary.write_text("new")
    assert target.read_text() == "new" and list(tmp_path.iterdir()) == [target]


def test_a_directory_is_replaced_only_if_empty(tmp_path):
    target = tmp_path / "deep" / "out"
    for content in ("first", "second"):
        if content == "second":
            (target / "file").unlink()
        with atomic_path(target) as temporary:
            temporary.mkdir()
            (temporary / "file").write_text(content)
        assert (target / "file").read_text() == content
    with pytest.raises(RankgateError, match="not empty"), atomic_path(target):
        pytest.fail("must be refused before anything is written")


def test_unwritable_places_are_refused(tmp_path):
    (tmp_path / "file").write_text("")
    for check in (check_writable, lambda path: atomic_path(path).__enter__()):
        with pytest.raises(RankgateError, match="cannot write"):
            check(tmp_path / "file" / "out")
    check_writable(tmp_path / "new" / "out")
    assert not (tmp_path / "new").exists()
