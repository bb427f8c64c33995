"""Writes files that are whole or not there, flushes them to the disk, and computes digests of them.

Knows files and bytes. Does not know what a file holds.
"""

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def aside_of(path: Path, *, concurrent: bool = False) -> Path:
    """Return where a file or folder is written before it gets its name.

    Args:
        concurrent: several processes may write the same path at once; each then has a name of its own.
    """
    process = f".{os.getpid()}" if concurrent else ""
    return path.with_name(f".{path.name}{process}.writing")


@contextmanager
def written_whole(path: str | os.PathLike[str], *, concurrent: bool = False) -> Iterator[Path]:
    """Give a path to write a file to, which takes its name in one step when the block ends without an error.

    So at any instant the file is what it was before or what it is to be. After an error nothing is left.

    Args:
        concurrent: see `aside_of`.
    """
    path = Path(path)
    aside = aside_of(path, concurrent=concurrent)
    try:
        yield aside
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


def write_text_whole(path: str | os.PathLike[str], text: str, *, concurrent: bool = False) -> None:
    """Write a text file that appears under its name only when it is whole."""
    with written_whole(path, concurrent=concurrent) as aside:
        aside.write_text(text, encoding="utf-8")


def flush_to_disk(path: str | os.PathLike[str]) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def cut_half_line(path: Path) -> None:
    """Cut a last line that a killed process left half written, so that what is appended begins on a line of its own."""
    if not path.exists():
        return
    with path.open("rb+") as file:
        content = file.read()
        file.truncate(content.rfind(b"\n") + 1)


def digest_of_file(path: str | os.PathLike[str]) -> str:
    """Compute the SHA-256 of a file's bytes."""
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
