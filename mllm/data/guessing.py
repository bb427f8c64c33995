"""Guesses which format data are in, for the message that says they are not in the one that was named.

Knows how the first row of each format looks. Does not read data.
"""

import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mllm.config.data import TABLE_FORMATS, Format
from mllm.media.containers import AUDIO_SUFFIXES, VIDEO_SUFFIXES

HEAD_BYTES = 1 << 20
"""Of a file that are looked at."""
_ID = re.compile(r'\s*"?[^,"]*"?,"?[^,"]+\.\w+"?,"?\d+"?,"?[\d ]*"?')
_SUFFIXES: dict[str, Format] = {".parquet": "parquet", ".arrow": "datasets", ".tar": "webdataset"}
_OF_TABLES = (*TABLE_FORMATS, "parquet", "datasets")


def guess_format(source: Path) -> Format | None:
    """Return the format that a file or folder seems to be in; None where nothing speaks for one.

    Raises:
        OSError: it cannot be read.
    """
    if source.is_dir():
        return _of_folder(source)
    if source.suffix in _SUFFIXES:
        return _SUFFIXES[source.suffix]
    with open(source, "rb") as file:
        head = file.read(HEAD_BYTES)
    if head.startswith(b"PAR1"):
        return "parquet"
    if head[257:262] == b"ustar":
        return "webdataset"
    text = head.decode("utf-8-sig", errors="ignore")  # the head may end in the midst of a character
    row = _first_row(text)
    return _of_lines(text) if row is None else _of_row(row)


def wrong_format(source: Path, named: Format) -> str | None:
    """Return what to say of data in which there is no row of the named format, or None where no other one is seen.

    Raises:
        OSError: it cannot be read.
    """
    seen = guess_format(source) if source.exists() else None
    if seen is None or seen == named or (seen in ("parquet", "datasets") and named in (seen, *_OF_TABLES)):
        return None
    return f"it holds nothing of format {named}, and looks like format {seen} (data.reader.format, or --format)"


@contextmanager
def naming_format(source: str | os.PathLike[str], named: Format) -> Iterator[None]:
    """Say which format data seem to have where a folder is read as a file, or a file as a folder.

    Raises:
        ValueError: that, inside the block, of data that look like another format.
    """
    try:
        yield
    except (IsADirectoryError, NotADirectoryError) as error:
        if hint := wrong_format(Path(source), named):
            raise ValueError(f"{os.fspath(source)}: {hint}") from error
        raise


def _of_folder(source: Path) -> Format | None:
    for folder, folders, files in os.walk(source):
        folders.sort()
        for name in sorted(files):
            suffix = os.path.splitext(name)[1].lower()
            if suffix in _SUFFIXES:
                return _SUFFIXES[suffix]
            if suffix in VIDEO_SUFFIXES + AUDIO_SUFFIXES:
                text = Path(folder, name).with_suffix(".txt")
                is_lrs = suffix == ".mp4" and text.is_file() and text.read_bytes()[:5] == b"Text:"
                return "lrs" if is_lrs else "clips"
    return None


def _first_row(text: str) -> dict[str, Any] | None:
    """Return the first object of a JSON list or of JSON lines, also of a file that is longer than what was read."""
    start = text.lstrip().removeprefix("[").lstrip()
    if not start.startswith("{"):
        return None
    try:
        row, _ = json.JSONDecoder().raw_decode(start)
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) else None


def _of_row(row: dict[str, Any]) -> Format | None:
    if isinstance(row.get("messages"), list):
        return "manifest" if {"id", "task"} <= row.keys() <= {"id", "task", "kind", "meta", "messages"} else "messages"
    if "query" in row and "response" in row:
        return "messages"
    if isinstance(row.get("conversations"), list):
        others = {"images", "videos", "audios", "video", "audio", "system", "tools"} & row.keys()
        return "sharegpt" if others else "llava"
    return "sharegpt" if isinstance(row.get("conversation"), list) else None


def _of_lines(text: str) -> Format | None:
    lines = [line for line in text.splitlines() if line.strip()][:2]
    if not lines:
        return None
    # The first line of a list of fairseq is a folder; rows begin with the second.
    if len(lines) == 2 and lines[1].count("\t") >= 1 and lines[1].rsplit("\t", 1)[1].strip().isdecimal():
        return "fairseq"
    match = _ID.match(lines[0])
    if match is None:
        return None
    return "omni_csv" if lines[0][match.end() :].startswith(",") else "auto_avsr"
