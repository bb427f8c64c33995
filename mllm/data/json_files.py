"""Reads the rows of JSON files, whole or by lines; what is no row becomes a finding.

Knows JSON and places. Does not know what a row means.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from mllm.data.findings import Listing, shown_type
from mllm.data.json_lines import numbered_lines, read_object

_HEAD_BYTES = 4096


def json_of(path: Path) -> Any:
    """Read a JSON file; ValueError where it is none."""
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not a JSON file in UTF-8: {error}") from error


def json_list(path: Path, key: str | None = None) -> list[Any]:
    """Return the rows of a JSON file that is a list, or holds one under a key.

    Raises:
        ValueError: it is something else.
    """
    return list_in(json_of(path), path, key)


def list_in(content: Any, path: Path, key: str | None = None) -> list[Any]:
    """Return the rows of what `json_of` read from a file: itself, or what stands under a key.

    Raises:
        ValueError: it is something else.
    """
    if key is not None and not isinstance(content, dict):
        raise ValueError(f"{path}: must be an object with {key}, got {shown_type(content)}")
    rows = content if key is None else content.get(key)
    if not isinstance(rows, list):
        raise ValueError(f"{path}: {key or 'the file'} must be a list, got {shown_type(rows)}")
    return rows


def json_lines(path: Path, listing: Listing) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield numbered rows; a line that is no JSON object is noted."""
    for number, content in numbered_lines(path):
        row = None
        with listing.noting(path, number):
            row = read_object(content)
            if not isinstance(row, dict):
                raise ValueError(f"must be an object, got {shown_type(row)}")
        if isinstance(row, dict):
            yield number, row


class Entry(NamedTuple):
    """Holds an object of a file: its line, where the file has lines; its number, of the line or in the list; and
    itself.
    """

    line_number: int | None
    number: int
    row: dict[str, Any]

    @property
    def what(self) -> str:
        """Say which one it is, where no line says so."""
        return "" if self.line_number is not None else f"entry {self.number}"

    def id_of(self, path: Path) -> str:
        """Return the id that the row states, or one made of the file's name and the number where it states none.

        Raises:
            ValueError: an id that is neither a text nor a whole number.
        """
        return stated_id(self.row, f"{path.stem}-{self.number}")


def stated_id(row: Mapping[str, Any], default: str) -> str:
    """Return the id that a row states, or the one that was made up where it states none.

    Raises:
        ValueError: an id that is neither a text nor a whole number.
    """
    stated = row.get("id")
    if stated is None:
        return default
    # A boolean is a whole number for Python, and no id for people.
    if isinstance(stated, bool) or not isinstance(stated, str | int):
        raise ValueError(f"id: must be a string or a whole number, got {shown_type(stated)}")
    return str(stated)


def json_rows(path: Path, listing: Listing) -> Iterator[Entry]:
    """Yield the objects of a JSON list or of JSON lines, whichever the file is.

    Raises:
        ValueError: a file that begins like a list and is none.
        OSError: the file cannot be read.
    """
    # Suffixes say nothing: lists are called .jsonl and lines .json. Lines are read one by one, a list at once.
    if not _begins_as_list(path):
        yield from (Entry(number, number, row) for number, row in json_lines(path, listing))
        return
    for number, row in enumerate(json_list(path)):
        if isinstance(row, dict):
            yield Entry(None, number, row)
        else:
            listing.note(path, None, f"entry {number}: must be an object, got {shown_type(row)}")


def _begins_as_list(path: Path) -> bool:
    """Tell whether the first character behind a byte order mark and blanks opens a list; what follows it is not
    read.
    """
    with open(path, "rb") as file:
        head = file.read(_HEAD_BYTES).removeprefix(b"\xef\xbb\xbf")
        while head and not head.strip():
            head = file.read(_HEAD_BYTES)
    return head.lstrip().startswith(b"[")
