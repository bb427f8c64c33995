"""Files appear under their names only when they are whole."""

import hashlib
import re
import resource
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from mllm.checkpoints.tensor_files import write_tensors
from mllm.utils.files import (
    WriteError,
    append_text,
    cut_half_line,
    digest_of_file,
    new_folder,
    write_text_whole,
    writing,
    written_whole,
)


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


@pytest.fixture
def small_files() -> Iterator[None]:
    """No file of this process may grow beyond 1,000 bytes: the kernel refuses, as it does where a disk is full."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)


WRITES: dict[str, Callable[[Path], object]] = {
    "a text": lambda path: write_text_whole(path, "x" * 5_000),
    "an appended text": lambda path: append_text(path, "x" * 5_000, flush=True),
    "tensors": lambda path: write_tensors({"w": torch.zeros(1_250)}, path),
}


@pytest.mark.usefixtures("small_files")
@pytest.mark.parametrize("what", WRITES)
def test_a_write_that_the_disk_refuses_says_where_how_much_and_what_is_free(tmp_path: Path, what: str) -> None:
    path = tmp_path / "new" if what == "tensors" else tmp_path / "a.json"
    with pytest.raises(WriteError) as caught:
        WRITES[what](path)
    assert caught.value.filename == str(path)
    words = r"File too large; 5,000 bytes are needed and [\d,]+ are free, and this process may write files of 1,000 "
    assert re.match(words, caught.value.strerror or "")
    if what != "an appended text":
        assert list(tmp_path.iterdir()) == []


def test_other_errors_of_a_block_that_writes_stay_what_they_are(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"missing\.wav"), writing(tmp_path / "a"):
        (tmp_path / "missing.wav").read_bytes()
    with pytest.raises(PermissionError, match="elsewhere"), writing(tmp_path / "a"):
        raise PermissionError(13, "Permission denied", "/elsewhere")


def fail_half_way(path: Path) -> None:
    with new_folder(path) as folder:
        (folder / "inner").mkdir()
        (folder / "inner" / "file").write_text("half")
        raise RuntimeError("half way")


def test_a_folder_whose_writing_fails_is_as_it_was(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    for name in ("there", "new"):
        with pytest.raises(RuntimeError, match="half way"):
            fail_half_way(tmp_path / name)
    assert list(tmp_path.rglob("*")) == [tmp_path / "there"]
    with new_folder(tmp_path / "new") as folder:
        (folder / "file").write_text("whole")
    with pytest.raises(ValueError, match="new is in use; name a new or an empty folder"), new_folder(tmp_path / "new"):
        pass
