"""Files appear under their names only when they are whole."""

import hashlib
from pathlib import Path

import pytest

from mllm.utils.files import cut_half_line, digest_of_file, write_text_whole, written_whole


@pytest.mark.parametrize("concurrent", [False, True])
def test_a_file_that_fails_half_way_leaves_what_was_there(tmp_path: Path, concurrent: bool) -> None:
    file = tmp_path / "a.json"
    write_text_whole(file, "before", concurrent=concurrent)

    def fail() -> None:
        with written_whole(file, concurrent=concurrent) as aside:
            aside.write_text("half")
            assert file.read_text() == "before"
            raise RuntimeError("half way")

    with pytest.raises(RuntimeError, match="half way"):
        fail()
    assert file.read_text() == "before"
    with written_whole(file, concurrent=concurrent) as aside:
        aside.write_text("after")
    assert file.read_text() == "after"
    assert list(tmp_path.iterdir()) == [file]


def test_a_half_written_line_is_cut(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    cut_half_line(file)
    assert not file.exists()
    for written, kept in (("{}\n{", "{}\n"), ("{}\n", "{}\n"), ("{", "")):
        file.write_text(written)
        cut_half_line(file)
        assert file.read_text() == kept


def test_the_digest_is_that_of_the_bytes(tmp_path: Path) -> None:
    file = tmp_path / "a"
    file.write_bytes(b"abc" * 1000)
    assert digest_of_file(file) == hashlib.sha256(b"abc" * 1000).hexdigest()
