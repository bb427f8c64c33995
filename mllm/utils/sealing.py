"""Seals a folder with a manifest: sizes and digests of its files, plain facts beside them, and a digest of itself.

Knows files, bytes and JSON. Does not know what a file holds.

    manifest.json    {"files": {"config.json": {"bytes": ..., "sha256": ...}, ...}, "sha256": ..., more facts}

Formats of tensors notice a file that is cut, but not a bit that flipped: of mutated safetensors files every seventh
loads with other contents. A digest notices both, and that of the manifest itself tells a damaged one from another one.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path, PurePosixPath
from typing import Any

from mllm.utils.files import digest_of_file, flush_to_disk, write_text_whole

MANIFEST = "manifest.json"
_DIGEST, _FILES = "sha256", "files"
_is_checking = ContextVar("is_checking", default=True)


@contextmanager
def unchecked() -> Iterator[None]:
    """Load models in the block without computing digests of their files, which are read twice for it otherwise.

    For weights of hundreds of gigabytes that `mllm check` has found whole before. Checkpoints that a training goes on
    from are checked all the same.
    """
    token = _is_checking.set(False)
    try:
        yield
    finally:
        _is_checking.reset(token)


def is_checking() -> bool:
    """Tell whether models are loaded with a check of their digests; see `unchecked`."""
    return _is_checking.get()


def seal_folder(folder: Path, names: Iterable[str], facts: Mapping[str, Any] | None = None) -> None:
    """Write the manifest of files that are complete, once they and it are on the disk.

    Args:
        names: of the files, relative to the folder.
        facts: plain values kept beside them, under other keys than `files` and `sha256`.

    Raises:
        OSError: a file cannot be read, or the manifest not be written.
    """
    files = {}
    for name in sorted(names):
        flush_to_disk(folder / name)
        files[name] = _size_and_digest(folder / name)
    _write_manifest(folder, {**(facts or {}), _FILES: files})


def renew_seal(folder: Path, names: Iterable[str]) -> None:
    """Take the digests of some files of a sealed folder anew, which were replaced.

    Raises:
        ValueError: its manifest is not whole.
    """
    manifest = read_manifest(folder)
    manifest[_FILES] |= {name: _size_and_digest(folder / name) for name in names}
    _write_manifest(folder, manifest)


def _write_manifest(folder: Path, manifest: Mapping[str, Any]) -> None:
    content = json.loads(json.dumps(manifest))  # as it is read back, so that the digest is of what a reader sees
    write_text_whole(folder / MANIFEST, json.dumps({**content, _DIGEST: _digest(content)}, indent=1))
    flush_to_disk(folder / MANIFEST)
    flush_to_disk(folder)


def files_below(folder: Path) -> list[str]:
    """List the files of a folder and of the folders in it by their paths from there, but for its manifest."""
    paths = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    return sorted(name for name in paths if name != MANIFEST)


def read_manifest(folder: Path) -> dict[str, Any]:
    """Read a manifest that is itself whole: its facts, and `files` by name.

    Raises:
        ValueError: there is none, or it is not the one that was written.
    """
    path = folder / MANIFEST
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{folder} is incomplete: {MANIFEST} cannot be read ({error})") from error
    if not isinstance(content, dict) or content.pop(_DIGEST, None) != _digest(content):
        raise ValueError(f"{folder} is damaged: {MANIFEST} is not what was written, or older than digests of itself")
    return content


def check_files(folder: Path, files: Mapping[str, Mapping[str, Any]]) -> None:
    """Read every byte of a sealed folder's files and compare them with what was written.

    Args:
        files: of `read_manifest`.

    Raises:
        ValueError: the first file that is missing or has other contents.
    """
    for name, sealed in files.items():
        if problem := _problem(folder, name, sealed):
            raise ValueError(f"{folder} is {problem}")


def check_before_load(folder: Path) -> None:
    """Check a folder that is loaded from, where it is sealed; what has no manifest was made elsewhere or before.

    Raises:
        ValueError: it is incomplete or damaged; the file is named.
    """
    if is_checking() and (folder / MANIFEST).exists():
        try:
            check_files(folder, read_manifest(folder)[_FILES])
        except ValueError as error:
            raise ValueError(f"{error}; `mllm check {folder}` lists all that is wrong") from error


def find_problems(folder: Path) -> list[str]:
    """List everything that is wrong with a sealed folder; nothing for one that is as it was written."""
    try:
        files = read_manifest(folder)[_FILES]
    except ValueError as error:
        return [str(error)]
    problems = (_problem(folder, name, sealed) for name, sealed in files.items())
    return [f"{folder} is {problem}" for problem in problems if problem]


def _problem(folder: Path, name: str, sealed: Mapping[str, Any]) -> str:
    path, parts = folder / name, PurePosixPath(name)
    if parts.is_absolute() or ".." in parts.parts:
        return f"damaged: {MANIFEST} names {name!r}, which is no file in it"
    if not path.is_file():
        return f"incomplete: {name} is missing"
    now = _size_and_digest(path)
    if now == sealed:
        return ""
    return (
        f"damaged: {name} has {now['bytes']} bytes and SHA-256 {now['sha256'][:12]}..., "
        f"written were {sealed['bytes']} and {sealed['sha256'][:12]}..."
    )


def _size_and_digest(path: Path) -> dict[str, Any]:
    return {"bytes": os.stat(path).st_size, "sha256": digest_of_file(path)}


def _digest(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
