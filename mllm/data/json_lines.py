"""Reads lines of JSON files: numbered, bounded, and strictly.

Knows JSON and UTF-8. Does not know what a row means.
"""

import json
import os
from collections.abc import Iterator
from typing import Any

from mllm.utils.strict_json import read_json

MAX_LINE_BYTES = 8 * 2**20
"""A longer line is refused unread, so that a file without line breaks cannot fill the memory."""


def numbered_lines(path: str | os.PathLike[str]) -> Iterator[tuple[int, bytes]]:
    """Number the lines from 1 and leave blank ones out; an over-long line comes cut, one byte above the limit.

    A byte order mark is taken away.

    Raises:
        OSError: the file cannot be read.
    """
    with open(path, "rb") as file:
        line_number = 0
        while line := file.readline(MAX_LINE_BYTES + 1):
            line_number += 1
            rest = line
            while len(rest) > MAX_LINE_BYTES and not rest.endswith(b"\n"):
                rest = file.readline(MAX_LINE_BYTES + 1)
            if line_number == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")
            if line.strip() or len(line) > MAX_LINE_BYTES:
                yield line_number, line


def text_of(line: bytes) -> str:
    """Return the text of a line that `numbered_lines` gave.

    Raises:
        ValueError: too long, or not UTF-8.
    """
    if len(line) > MAX_LINE_BYTES:
        raise ValueError(f"the line is longer than {MAX_LINE_BYTES} bytes")
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8: byte {error.start + 1} of the line is 0x{line[error.start]:02x}") from error


def read_object(line: bytes) -> Any:
    """Read the JSON value of a line, as strictly as `mllm.utils.strict_json`.

    Raises:
        ValueError: too long, not UTF-8, or what is not read there.
    """
    return read_json(text_of(line))


def unwritable(row: object) -> str | None:
    """Say why a row could not be written as a line of JSON in UTF-8, or None."""
    try:
        json.dumps(row, ensure_ascii=False, allow_nan=False).encode("utf-8")
    except UnicodeEncodeError:
        return "not Unicode text: it holds half of a surrogate pair"
    except RecursionError:
        return "nested too deeply"
    except (TypeError, ValueError) as error:
        return f"cannot be written as JSON: {error}"
    return None
