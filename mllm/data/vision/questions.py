"""Turns questions of benchmarks into samples; holds what readers of benchmarks share: files, prompts, findings.

Knows JSON, JSON lines and our samples. Does not know any benchmark.

A question that a server judges has no answer: its sample ends with the question, and `meta.unanswered` says so.
"""

import re
from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mllm.data.findings import Listing, renumbered
from mllm.data.json_files import json_lines
from mllm.data.manifest import Sample, parse_row

SHORT = "Answer the question using a single word or phrase."
CHOOSE = "Answer with the option's letter from the given choices directly."
UNSURE = "When the provided information is insufficient, respond with 'Unanswerable'."
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
_NUMBERED = re.compile(r"<image ([1-9]\d*)>")


@dataclass(frozen=True)
class Question:
    """Holds a question about images: their paths under the root, what is asked, and all answers that count as right.

    Images stand before the text; or in it, where it holds `<image 1>`, `<image 2>`, ..., and those it does not name
    are left out.
    """

    id: str
    images: Sequence[str]
    text: str
    answers: Sequence[str]
    kind: str | None = None
    meta: Mapping[str, Any] = field(default_factory=dict)


Location = tuple[Path, int | None]
Maker = Callable[[], Question | None]


class Questions:
    """Gathers samples of one benchmark; what cannot be used becomes a problem with its place, and the rest goes on."""

    def __init__(self, task: str, root: Path) -> None:
        self.task = task
        self.root = root
        self.listing = Listing()
        self._times_seen: dict[str, int] = {}

    def add(self, location: Location, make: Maker, what: str = "") -> None:
        """Add what `make` gives; None is left out. What an odd row raises is noted, see `Listing.noting`.

        Args:
            what: which row it is, where the place has no line.
        """
        with self.listing.noting(*location, what):
            question = make()
            if question is not None:
                self.listing.samples.append(self._sample(question))

    def add_all(self, file: Path, rows: Sequence[Any], make: Callable[[Any], Question | None]) -> None:
        """Add every row of a file that is one list."""
        for number, row in enumerate(rows):
            # Bound as a default, since a lambda would otherwise see the last row of the loop.
            self.add((file, None), lambda row=row: make(row), what=f"entry {number}")

    def add_lines(self, file: Path, make: Callable[[Any], Question | None]) -> None:
        """Add every row of a file of JSON lines."""
        for number, row in json_lines(file, self.listing):
            self.add((file, number), lambda row=row: make(row))

    def index(self, file: Path, notes: Sequence[Any], key: Callable[[Any], Hashable]) -> dict[Any, Any]:
        """Return the entries of a file by a key; an odd one is noted."""
        by_key = {}
        for number, note in enumerate(notes):
            with self.listing.noting(file, None, f"entry {number}"):
                by_key[key(note)] = note
        return by_key

    def _sample(self, question: Question) -> Sample:
        messages: list[dict[str, Any]] = [{"role": "user", "content": _parts_of(question)}]
        meta = dict(question.meta)
        if question.answers:
            said = Counter(answer for answer in question.answers if answer.strip())
            if not said:
                raise ValueError(f"all answers to {question.id!r} are empty")
            # Of several annotators the answer most gave; of equals the first. All of them go to `meta.answers`.
            messages.append({"role": "assistant", "content": said.most_common(1)[0][0]})
        else:
            meta["unanswered"] = True
        if len(question.answers) > 1:
            meta["answers"] = list(question.answers)
        row = {"id": question.id, "task": self.task, "meta": meta, "messages": messages}
        kind = {} if question.kind is None else {"kind": question.kind}
        sample = parse_row(row | kind, self.root, where=f"question {question.id!r}")
        return renumbered(sample, self._times_seen)


def _parts_of(question: Question) -> list[dict[str, str]]:
    pieces = _NUMBERED.split(question.text)  # texts and, at odd positions, the numbers between them
    if len(pieces) == 1:
        images = [{"type": "image", "path": image} for image in question.images]
        return [*images, {"type": "text", "text": f"\n{question.text}"}]
    parts = []
    for index, piece in enumerate(pieces):
        if index % 2 == 0:
            parts += [{"type": "text", "text": piece}] if piece else []
        elif int(piece) > len(question.images):
            raise ValueError(f"<image {piece}> is asked about; there are {len(question.images)}")
        else:
            parts.append({"type": "image", "path": question.images[int(piece) - 1]})
    return parts


def find_file(source: Path, names: Sequence[str], *, named: str | None = None, what: str = "questions") -> Path:
    """Find the file of questions or answers: what is named, the source itself, or the first of `names` in its folder.

    Raises:
        FileNotFoundError: none of them is there.
    """
    if named is not None:
        return Path(named)
    if what == "questions" and source.is_file():
        return source
    folder = source if source.is_dir() else source.parent
    file = first_file(folder, names)
    if file is None:
        raise FileNotFoundError(f"{folder} holds no file of {what}; looked for {', '.join(names)}")
    return file


def first_file(folder: Path, names: Sequence[str]) -> Path | None:
    """Return the first of the files that is there."""
    return next((folder / name for name in names if (folder / name).exists()), None)


def folder_of(root: Path, names: Sequence[str], *, named: str | None) -> str:
    """Return the folder of images, relative to the root, with a slash behind it: what is named, or the first that is
    there.

    Where none is, the first is taken, and every image is said to be missing there.
    """
    if named is not None:
        return f"{named.rstrip('/')}/" if named not in ("", ".") else ""
    folder = next((name for name in names if (root / name).is_dir()), names[0])
    return f"{folder}/" if folder else ""


def texts_of(values: Any) -> list[str]:
    """Return a list of texts as it is, once it is known to be one.

    Raises:
        ValueError: it is something else.
    """
    if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
        raise ValueError(f"must be a list of strings, got {values!r}")
    return values


def with_options(question: str, options: Sequence[str], *, hint: str | None = None) -> str:
    """Lay out hint, question and lettered options on lines of their own, and how to answer."""
    lines = [*([hint] if hint else []), question]
    lines += [f"{letter}. {option}" for letter, option in zip(LETTERS[: len(options)], options, strict=True)]
    return "\n".join([*lines, CHOOSE])


def letter_at(index: Any, options: Sequence[Any]) -> str:
    """Return the letter of the option that an annotation names by its place, counted from 0.

    Raises:
        ValueError: no whole number, or a place beyond the options.
    """
    is_number = isinstance(index, int) and not isinstance(index, bool)
    if not is_number or not 0 <= index < min(len(options), len(LETTERS)):
        raise ValueError(f"answer must be the place of one of {len(options)} options, from 0; got {index!r}")
    return LETTERS[index]


def letter_among(letter: Any, options: Sequence[Any]) -> str:
    """Return the letter of the option that an annotation names by it.

    Raises:
        ValueError: it is that of no option.
    """
    if not isinstance(letter, str) or letter not in tuple(LETTERS[: len(options)]):
        raise ValueError(f"answer must be one of {', '.join(LETTERS[: len(options)]) or 'no options'}, got {letter!r}")
    return letter
