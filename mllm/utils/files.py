"""Writes files that are whole or not there, flushes them to the disk, and computes digests of them.

Knows files and bytes. Does not know what a file holds.
"""

import errno
import hashlib
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

# What a full, small or read-only disk answers to a write; anything else that fails while writing is another matter.
_REFUSED_WRITES = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO, errno.EACCES, errno.EPERM}
_OS_ERROR = re.compile(r"\(os error (\d+)\)")


class WriteError(OSError):
    """Says that something could not be written: its path, the bytes that are needed, the bytes that are free."""


@contextmanager
def writing(path: str | os.PathLike[str], num_bytes: int | None = None) -> Iterator[None]:
    """Let a write that the disk refuses say what was to be written and what is free, whichever library writes.

    Args:
        path: the file or folder that is written in the block.
        num_bytes: how many bytes it takes, where that is known before it is written.

    Raises:
        WriteError: in place of what a refused write raises; every other error passes as it is.
    """
    path = Path(path)
    try:
        yield
    except WriteError:
        raise
    except Exception as error:
        number = _error_number(error)
        elsewhere = isinstance(error, OSError) and error.filename is not None and not _is_near(error.filename, path)
        if number not in _REFUSED_WRITES or elsewhere:
            raise
        raise WriteError(number, _refusal(number, path, num_bytes), str(path)) from error


def _error_number(error: Exception) -> int:
    """Return what the system said, which libraries that are not written in Python put in their text; 0 for nothing."""
    if isinstance(error, OSError):
        return error.errno or 0
    match = _OS_ERROR.search(str(error))
    return int(match[1]) if match else 0


def _is_near(filename: object, path: Path) -> bool:
    """Tell whether an error is about the file itself, what stands in for it until it is whole, or what is in it."""
    return isinstance(filename, str) and Path(filename).absolute().is_relative_to(path.absolute().parent)


def _refusal(number: int, path: Path, num_bytes: int | None) -> str:
    there = next(folder for folder in (path, *path.absolute().parents) if folder.exists())
    need = "an unknown number of bytes is" if num_bytes is None else f"{num_bytes:,} bytes are"
    words = f"{os.strerror(number)}; {need} needed and {shutil.disk_usage(there).free:,} are free"
    if number == errno.EFBIG:
        import resource

        words += f", and this process may write files of {resource.getrlimit(resource.RLIMIT_FSIZE)[0]:,} (ulimit -f)"
    return words


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

    Raises:
        WriteError: see `writing`.
    """
    path = Path(path)
    aside = aside_of(path, concurrent=concurrent)
    try:
        with writing(path):
            yield aside
            os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


@contextmanager
def folder_aside(aside: Path, path: str | os.PathLike[str], *, num_bytes: int | None = None) -> Iterator[Path]:
    """Give an empty folder to fill, whose files the block then puts in place; nothing of it is left afterwards.

    Args:
        aside: the folder; what a kill has left there is removed.
        path: what is written, for the message; see `writing`.
        num_bytes: how many bytes it takes, where that is known.

    Raises:
        WriteError: see `writing`.
    """
    try:
        with writing(path, num_bytes):
            shutil.rmtree(aside, ignore_errors=True)
            aside.mkdir(parents=True)
            yield aside
    finally:
        shutil.rmtree(aside, ignore_errors=True)


@contextmanager
def new_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Make a folder for the block to fill; after an error it is as it was, not there or empty, so the same line works
    again.

    Raises:
        ValueError: it holds something already, or is no folder.
        WriteError: see `writing`.
    """
    path = Path(path)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise ValueError(f"{path} is in use; name a new or an empty folder, so that no file of another model stays")
    was_there = path.is_dir()
    try:
        with writing(path):
            path.mkdir(parents=True, exist_ok=True)
            yield path
    except BaseException:
        for entry in path.iterdir() if path.is_dir() else ():
            shutil.rmtree(entry, ignore_errors=True) if entry.is_dir() else entry.unlink(missing_ok=True)
        if not was_there and path.is_dir():
            path.rmdir()
        raise


def write_text_whole(path: str | os.PathLike[str], text: str, *, concurrent: bool = False) -> None:
    """Write a text file that appears under its name only when it is whole.

    Raises:
        WriteError: see `writing`.
    """
    content = text.encode("utf-8")
    with written_whole(path, concurrent=concurrent) as aside, writing(path, len(content)):
        aside.write_bytes(content)


def append_text(path: str | os.PathLike[str], text: str, *, flush: bool = False) -> None:
    """Append to a text file.

    Args:
        flush: wait until it is on the disk.

    Raises:
        WriteError: see `writing`.
    """
    with writing(path, len(text.encode())), open(path, "a", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        if flush:
            os.fsync(file.fileno())


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
