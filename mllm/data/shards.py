"""Reads WebDataset's tars: members of one name but for the suffix are one sample, and media stay where they are.

    000017.jpg  000017.json     a conversation in a form of `processing/requests.py`, or a caption
    000018.wav  000018.txt      what is said

Knows members and where they lie. Does not decode media, unpack tars or unpickle anything.
"""

import os
import tarfile
from collections.abc import Callable, Iterator
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

from mllm.data.conversations import FORMS, MEDIA_KEYS, ConversationReader, paths_of
from mllm.data.findings import Listing, renumbered
from mllm.data.json_files import stated_id
from mllm.data.json_lines import MAX_LINE_BYTES, read_object
from mllm.data.manifest import Sample
from mllm.data.source_files import relative_to
from mllm.media.containers import AUDIO_SUFFIXES, IMAGE_SUFFIXES, VIDEO_SUFFIXES
from mllm.media.packed import packed_path

_MEDIUM = {
    suffix.removeprefix("."): medium
    for medium, suffixes in (("image", IMAGE_SUFFIXES), ("audio", AUDIO_SUFFIXES), ("video", VIDEO_SUFFIXES))
    for suffix in suffixes
}
_PICKLES = ("pyd", "pkl", "pickle", "pth", "pt")
_TEXTS = ("txt", "caption", "text", "transcript")


def read_webdataset(source: Path, root: Path) -> Listing:
    """Read a tar, or all tars of a folder in the order of their names; only headers and texts are read.

    Raises:
        FileNotFoundError: there is none.
    """
    files = [source] if not source.is_dir() else sorted(source.rglob("*.tar"))
    if not files:
        raise FileNotFoundError(f"{source} holds no .tar")
    listing = Listing()
    reader = ConversationReader(root, tuple(FORMS))
    for file in files:
        with listing.noting(file):
            for key, make in tar_samples(file, relative_to(root, file), reader):
                with listing.noting(file, None, key):
                    listing.samples.append(renumbered(make(), reader.times_seen))
    reader.log(source)
    return listing


def tar_samples(file: Path, relative: str, reader: ConversationReader) -> Iterator[tuple[str, Callable[[], Sample]]]:
    """Yield the name of each sample of a tar, in its order, and what reads the texts of the sample and makes it.

    Args:
        relative: the path of the tar below the reader's root.

    Raises:
        ValueError: it is no tar, or a compressed one; what is made raises one where its members are not those of one
            sample.
        OSError: it cannot be read.
    """
    with open(file, "rb") as stream:
        for key, group in groupby(_members(stream), key=lambda member: _split(member.name)[0]):
            yield key, partial(_sample_of, key, list(group), stream, relative, reader)


def _sample_of(
    key: str, members: list[tarfile.TarInfo], stream: Any, relative: str, reader: ConversationReader
) -> Sample:
    """Make the sample of members of one name; its media are named by where they lie."""
    row, media = _taken(members, stream, relative, reader)
    return reader.sample_of(row, stated_id(row, key), media)


def _members(stream: Any) -> Iterator[tarfile.TarInfo]:
    """Yield the files of a tar in its order; hidden ones, which systems leave, and folders are passed over.

    Raises:
        ValueError: it is no tar, or a compressed one; or one that is cut, behind the members before that.
    """
    try:
        with tarfile.open(fileobj=stream, mode="r:") as tar:
            for member in tar:
                tar.members = []  # pyright: ignore[reportAttributeAccessIssue] (it keeps all of them otherwise)
                if not member.isdir() and not os.path.basename(member.name).startswith((".", "__")):
                    yield member
            _check_end(stream, tar.offset)
    except tarfile.TarError as error:
        raise ValueError(f"not a tar that is not compressed: {error}") from error


def _check_end(stream: Any, offset: int) -> None:
    """Check that a tar ends where its members do, which `tarfile` takes for granted behind the first of them.

    The end of a tar is two blocks of zeros (POSIX.1-2017, pax, ustar Interchange Format). Python's tarfile, the
    webdataset library on it, and GNU tar write both, and zeros up to 10,240 bytes or what `tar -b` says, which readers
    do not need. One is taken for the end, as GNU tar does.

    Raises:
        ValueError: it is cut, or something else stands there.
    """
    block = os.pread(stream.fileno(), tarfile.BLOCKSIZE, offset)
    if len(block) < tarfile.BLOCKSIZE:
        size = os.fstat(stream.fileno()).st_size
        raise ValueError(f"the tar is cut at byte {size}: the blocks of zeros are missing that end a tar")
    if any(block):
        raise ValueError(f"the tar is damaged at byte {offset}: neither a member nor the end of the tar is there")


def _split(name: str) -> tuple[str, str]:
    """Return the name of a member's sample, and its suffix: all that follows the first dot of the last part."""
    folder, _, base = name.rpartition("/")
    stem, _, suffix = base.partition(".")
    return (f"{folder}/{stem}" if folder else stem), suffix.lower()


def _taken(
    members: list[tarfile.TarInfo], stream: Any, relative: str, reader: ConversationReader
) -> tuple[dict[str, Any], dict[str, list[str]]]:
    """Return the row of a sample, and the paths of its media in the order that the row names them, or that of
    the tar.
    """
    row: dict[str, Any] = {}
    media: dict[str, list[tuple[str, str]]] = {}
    seen: set[str] = set()
    for member in members:
        suffix = _split(member.name)[1]
        last = suffix.rpartition(".")[2]
        if suffix in seen:
            raise ValueError(f"there are two members with the suffix {suffix}")
        seen.add(suffix)
        if not member.isreg() or member.issparse():
            raise ValueError(f"{member.name} is a link or has holes, and is not read")
        if last in _PICKLES:
            raise ValueError(f"{member.name} is a pickle, which could run code; it is not read")
        if last in _MEDIUM:
            path = packed_path(relative, member.offset_data, member.size)
            media.setdefault(_MEDIUM[last], []).append((os.path.basename(member.name), path))
        elif last == "json":
            row |= _object(_content(stream, member), member.name)
        elif last in _TEXTS:
            row.setdefault("caption", _content(stream, member).decode("utf-8-sig").strip())
        else:
            reader.unread[f".{suffix}"] += 1
    paths = {medium: _in_order(medium, files, row) for medium, files in media.items()}
    for medium in paths:
        for key in MEDIA_KEYS[medium]:
            row.pop(key, None)
    return row, paths


def _in_order(medium: str, members: list[tuple[str, str]], row: dict[str, Any]) -> list[str]:
    """Return the paths of media; where the row names files, those it names."""
    named = [os.path.basename(path) for path in paths_of(row, medium)]
    by_name = dict(members)
    if set(named) <= set(by_name):
        return [by_name[name] for name in named] or [path for _, path in members]
    if len(named) != len(members):
        raise ValueError(f"it names {', '.join(named)}, and beside it stand {', '.join(by_name)}")
    return [path for _, path in members]


def _content(stream: Any, member: tarfile.TarInfo) -> bytes:
    if member.size > MAX_LINE_BYTES:
        raise ValueError(f"{member.name} is longer than {MAX_LINE_BYTES} bytes")
    # `pread` leaves the position alone, from which tarfile goes on to the next header.
    return os.pread(stream.fileno(), member.size, member.offset_data)


def _object(content: bytes, name: str) -> dict[str, Any]:
    row = read_object(content.removeprefix(b"\xef\xbb\xbf"))
    if not isinstance(row, dict):
        raise ValueError(f"{name} must hold an object")
    return row
