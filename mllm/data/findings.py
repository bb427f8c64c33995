"""Collects what a reader comes upon in one pass: samples, and findings about what cannot be used.

Knows places in files. Does not know formats.
"""

import csv
import errno
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

from mllm.data.manifest import Sample

MAX_SHOWN = 20
"""Findings that one message holds; the rest are counted."""
MAX_SHOWN_CHARACTERS = 600
"""Of one finding: a row may hold megabytes, and what is wrong with it may quote it."""
ODD = (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RecursionError, csv.Error, OSError)
"""What taking a row apart may raise when it is not of the form a reader expects: values of another type, keys and
places that are not there, numbers beyond what can be counted, names that no file can have."""
_NAMES = (errno.ENAMETOOLONG, errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.EINVAL, errno.EILSEQ)


@dataclass(frozen=True, slots=True)
class Finding:
    """Says something about one place of the data; without a line number it is about the whole file."""

    path: str
    line_number: int | None
    message: str
    is_of_file: bool = False
    """Whether it is about the whole file, and so about no row."""

    def __str__(self) -> str:
        location = self.path if self.line_number is None else f"{self.path}:{self.line_number}"
        return f"{location}: {self.message}"


@dataclass
class Listing:
    """Holds everything that a reader came upon in one pass.

    samples: all that can be used, those with files that are missing included.
    problems: what cannot be used at all; missing: files that are named and not there; incomplete: ids of the samples
    that need one of them; untranscribed: clips nobody wrote a transcript for, fit for inference only.
    """

    samples: list[Sample] = field(default_factory=list)
    problems: list[Finding] = field(default_factory=list)
    missing: list[Finding] = field(default_factory=list)
    incomplete: set[str] = field(default_factory=set)
    untranscribed: list[str] = field(default_factory=list)

    @property
    def whole(self) -> list[Sample]:
        """Return the samples all of whose files are there."""
        return [sample for sample in self.samples if sample.id not in self.incomplete]

    def note(
        self, path: str | os.PathLike[str], line_number: int | None, message: str, *, is_of_file: bool = False
    ) -> None:
        """Note something that cannot be used, as one line that is not too long to be read."""
        shown = " ".join(message.split())
        if len(shown) > MAX_SHOWN_CHARACTERS:
            shown = f"{shown[:MAX_SHOWN_CHARACTERS]}..."
        self.problems.append(Finding(os.fspath(path), line_number, shown, is_of_file))

    @contextmanager
    def noting(
        self, path: str | os.PathLike[str], line_number: int | None = None, what: str = "", *, is_whole: bool = False
    ) -> Iterator[None]:
        """Turn whatever an odd row raises into one finding: the only place where readers forgive anything.

        Wraps the reading of one row, or of a file that is one whole, and nothing else.

        Args:
            what: which row it is, where no line number says so.
            is_whole: a whole file or folder is read, so one that is not there is an error and no finding.
        """
        try:
            yield
        except ODD as error:
            if isinstance(error, OSError) and (is_whole or error.errno not in _NAMES):  # a full disk is no row's fault
                raise
            message = f"{what}: {_said(error)}" if what else _said(error)
            self.note(path, line_number, message, is_of_file=line_number is None and not what)


class ManyLines(ValueError):
    """Says what is wrong in many places, line by line; a terminal shows the lines as they are."""


class BadRows(ManyLines):
    """Names rows that cannot be used, a line for each; the message is cut after `MAX_SHOWN`."""

    def __init__(self, findings: Sequence[Finding]) -> None:
        super().__init__("\n".join(first(findings)))


def first(findings: Iterable[Finding]) -> list[str]:
    """Return the first findings as lines, and how many there are beside them."""
    return first_lines([str(finding) for finding in findings])


def first_lines(lines: Sequence[str]) -> list[str]:
    """Return the first lines, and how many there are beside them."""
    return list(lines) if len(lines) <= MAX_SHOWN else [*lines[:MAX_SHOWN], f"and {len(lines) - MAX_SHOWN} more"]


def renumbered(sample: Sample, times_seen: dict[str, int]) -> Sample:
    """Return the sample with "#2", "#3" and so on after its id from the second time on that the id is seen.

    Args:
        times_seen: ids so far; the sample's is counted.

    Raises:
        ValueError: another sample bears that name already.
    """
    times = times_seen[sample.id] = times_seen.get(sample.id, 0) + 1
    if times == 1:
        return sample
    new_id = f"{sample.id}#{times}"
    if new_id in times_seen:
        raise ValueError(f"the id {new_id!r} is needed for a second sample {sample.id!r}, but it is taken")
    return replace(sample, id=new_id)


def text_at(row: dict[str, Any], key: str) -> str:
    """Return a text of a row.

    Raises:
        ValueError: it is something else; the key is named.
        KeyError: it is not there.
    """
    value = row[key]
    if not isinstance(value, str):
        raise ValueError(f"{key}: must be a string, got {shown_type(value)}")
    return value


def shown_type(value: object) -> str:
    """Return what a value is, in the words of JSON."""
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number" if isinstance(value, int | float) else type(value).__name__)


def _said(error: BaseException) -> str:
    """Return what an error of an odd row says; errors of Python itself are named, since their texts say little
    alone.
    """
    if isinstance(error, KeyError):
        return f"{error} is missing"
    if isinstance(error, RecursionError):
        return "nested too deeply"
    if isinstance(error, OSError):
        return error.strerror or type(error).__name__
    if isinstance(error, ValueError | csv.Error):
        return str(error)
    return f"not of the form that is expected ({type(error).__name__}: {error})"
