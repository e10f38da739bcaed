import pytest

from rankgate.errors import RankgateError
from rankgate.hub import texts


@pytest.mark.parametrize("kind", texts.KINDS)
def test_parts_share_no_paragraph(kind):
    both = [texts.load_text(f"{kind}:{part}") for part in texts.PARTS]
    calibration, held_out = ({paragraph.strip() for paragraph in text.split("\n\n")} for text in both)
    assert not calibration & held_out - {""}
    assert min(map(len, both)) > 20_000


@pytest.mark.parametrize("part", texts.PARTS)
def test_default_text_is_of_all_kinds_from_its_beginning(part):
    beginning = texts.load_text(f"mixed:{part}")[: 60 * texts.PIECE]
    for kind in texts.KINDS:
        paragraphs = {text for text in texts.load_text(f"{kind}:{part}").split("\n\n") if len(text) > 100}
        own = sum(len(text) for text in paragraphs if text in beginning)
        assert 0.15 < own / len(beginning) < 0.6


def test_older_default_text_is_what_it_was():
    from pydoc_data.topics import topics

    assert texts.load_text("pydoc:calibration") == "\n\n".join(topics[name] for name in sorted(topics)[::2])


def test_bad_files_are_named(tmp_path):
    (tmp_path / "latin").write_bytes(b"caf\xe9 au lait")
    (tmp_path / "empty").write_text(" \n")
    for name, message in (("latin", "not UTF-8"), ("empty", "is empty"), ("missing", "no text file")):
        with pytest.raises(RankgateError, match=message):
            texts.load_text(str(tmp_path / name))
    with pytest.raises(RankgateError, match="cannot read"):
        texts.load_text(str(tmp_path))
