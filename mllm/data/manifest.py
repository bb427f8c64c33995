"""Reads and writes the manifest: chat samples with media paths, one JSON object per line.

    {"id": "a1", "task": "avsr", "messages": [
        {"role": "user", "content": [{"type": "video", "path": "a1.mp4"}, {"type": "text", "text": "Transcribe."}]},
        {"role": "assistant", "content": "hello there"}]}

`kind` (a str) and `meta` (an object) are optional; `content` is a list of parts or a plain string. The last message is
the assistant's, unless `meta` holds `"unanswered": true`, as of test sets that a server judges. UTF-8 with or
without a byte order mark, any line ending, blank lines allowed. Everything else is refused with file, line and key.

Knows the row format. Does not open or look up media (`media.paths` does); does not know budgets, tokenizers, batches.
"""

import json
import os
import reprlib
from collections.abc import Hashable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from sys import intern
from typing import Any, Literal, cast

from mllm.budget import MEDIA
from mllm.data.json_lines import numbered_lines, read_object, unwritable
from mllm.data.prompts import Medium
from mllm.media.paths import path_problem
from mllm.utils.files import written_whole

ROLES = ("system", "user", "assistant")

Role = Literal["system", "user", "assistant"]


@dataclass(frozen=True, slots=True)
class Text:
    """Holds a piece of text inside a message."""

    text: str


@dataclass(frozen=True, slots=True)
class Media:
    """Names an image, audio or video file at its place inside a message; `path` is relative to the sample's root."""

    medium: Medium
    path: str


Part = Text | Media
MAX_SHARED_CHARACTERS = 40
"""Of texts that are no longer, such as answers and prompts, equal ones are one object."""
_NO_META: Mapping[str, Any] = {}
Key = tuple[str | int, ...]


@dataclass(frozen=True, slots=True)
class Message:
    """Holds one turn: who speaks, and the parts in order."""

    role: Role
    parts: tuple[Part, ...]

    @property
    def text(self) -> str:
        """Return all text of the turn, media left out."""
        return "".join(part.text for part in self.parts if isinstance(part, Text))


@dataclass(frozen=True, slots=True)
class Sample:
    """Holds one conversation; the last message is the assistant's unless nobody here knows the answer.

    `task` groups samples in reports ("avsr", "vqa"), `kind` groups them further ("colour", "count"), `meta` is carried
    along untouched. `root` is the folder that the media paths are relative to and cannot leave.
    """

    id: str
    messages: tuple[Message, ...]
    task: str
    kind: str | None = None
    meta: Mapping[str, Any] = field(default_factory=dict, hash=False)
    root: Path = Path()

    @property
    def media(self) -> tuple[Media, ...]:
        """Return every media part, in order of appearance."""
        return tuple(part for message in self.messages for part in message.parts if isinstance(part, Media))

    @property
    def media_key(self) -> Hashable:
        """Return a key that is equal for samples that hold the same files; samples without media are like no other."""
        return (str(self.root), self.media) if self.media else (str(self.root), self.id)


@dataclass(frozen=True, slots=True)
class ManifestLine:
    """Holds one line of a manifest: the sample, or what is wrong with the line."""

    line_number: int
    sample: Sample | None
    problems: tuple[str, ...]


def read_manifest(path: str | os.PathLike[str], root: str | os.PathLike[str]) -> list[Sample]:
    """Read a manifest; media files are neither opened nor looked up (`media.resolve_media` and `data.check` do).

    Args:
        path: the JSONL file.
        root: folder that media paths are relative to.

    Raises:
        ValueError: at the first bad line: `file:line: key: what was got, what is allowed`; or there is no sample.
        OSError: the manifest itself cannot be read.
    """
    samples = []
    for row in scan_manifest(path, root):
        if row.sample is None:
            raise ValueError("\n".join(f"{os.fspath(path)}:{row.line_number}: {problem}" for problem in row.problems))
        samples.append(row.sample)
    if not samples:
        raise ValueError(f"{os.fspath(path)}: the manifest holds no sample")
    return samples


def scan_manifest(path: str | os.PathLike[str], root: str | os.PathLike[str]) -> Iterator[ManifestLine]:
    """Yield every non-blank line as a `ManifestLine`, the bad ones with all their problems; never raises for
    content.
    """
    root_path = Path(root)
    first_line_of: dict[str, int] = {}
    for line_number, line in numbered_lines(path):
        sample, problems = _inspect_line(line, root_path)
        if sample is not None and sample.id in first_line_of:
            problems = [f"id: {sample.id!r} was already used on line {first_line_of[sample.id]}"]
        elif sample is not None:
            first_line_of[sample.id] = line_number
        # A line that repeats an id is bad itself, and does not take the id from the first.
        yield ManifestLine(line_number, None if problems else sample, tuple(problems))


def write_manifest(path: str | os.PathLike[str], samples: Iterable[Sample]) -> None:
    """Write samples as a manifest that `read_manifest` gives back equal (roots are not stored).

    The file appears under its name only when it is whole.

    Raises:
        ValueError: a sample that `read_manifest` would refuse, or an id used twice.
    """
    ids: set[str] = set()
    with written_whole(path) as aside, open(aside, "w", encoding="utf-8", newline="\n") as file:
        for sample in samples:
            row = _row_of(sample)
            # Looked through as if it had been read: what is written here must be readable wherever it goes.
            problems = _Inspector().row_problems(row)
            if sample.id in ids:
                problems.append("id: used twice")
            if problems:
                raise ValueError(f"sample {sample.id!r}: " + "; ".join(problems))
            ids.add(sample.id)
            file.write(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n")


def rerooted(sample: Sample, folder: Path) -> Sample:
    """Return the sample with its paths relative to a folder above its root, which is its root then.

    Raises:
        ValueError: the folder is not above the root, or is called what no path may be.
    """
    # Links stay as they are: a root that is one may be moved together with what it leads to.
    between = Path(os.path.abspath(sample.root)).relative_to(os.path.abspath(folder)).as_posix()
    prefix = "" if between == "." else f"{between}/"
    if prefix and (problem := path_problem(between)):
        raise ValueError(f"the folder {between!r}: {problem}; name another folder with --root")

    def moved(part: Part) -> Part:
        return Media(part.medium, prefix + part.path) if isinstance(part, Media) else part

    messages = tuple(Message(message.role, tuple(map(moved, message.parts))) for message in sample.messages)
    return replace(sample, messages=messages, root=folder)


def parse_row(row: dict[str, Any], root: str | os.PathLike[str], *, where: str = "row") -> Sample:
    """Turn one decoded JSON object into a `Sample`.

    Raises:
        ValueError: every problem of the row, each line beginning with `where`.
    """
    problems = _Inspector().row_problems(row)
    if not problems and (problem := unwritable(row)):
        problems = [problem]
    if problems:
        raise ValueError("\n".join(f"{where}: {problem}" for problem in problems))
    return _build_sample(row, Path(root))


def _inspect_line(line: bytes, root: Path) -> tuple[Sample | None, list[str]]:
    try:
        row = read_object(line)
    except ValueError as error:
        return None, [str(error)]
    problems = _Inspector().row_problems(row)
    return (None, problems) if problems else (_build_sample(row, root), [])


class _Inspector:
    """Collects every problem of one row; each names its key.

    A key travels as a tuple and becomes text only where there is a problem: most rows have none.
    """

    def __init__(self) -> None:
        self.problems: list[str] = []

    def row_problems(self, row: object) -> list[str]:
        if not isinstance(row, dict):
            return [f"a row must be a JSON object, got {_type_name(row)}"]
        self._keys((), row, required=("id", "messages", "task"), optional=("kind", "meta"))
        for key in ("id", "task", "kind"):
            if key in row:
                self._text((key,), row[key], empty_allowed=False)
        if "meta" in row and not isinstance(row["meta"], dict):
            self._add(("meta",), f"must be an object, got {_type_name(row['meta'])}")
        if "messages" in row:
            meta = row.get("meta")
            self._messages(row["messages"], is_open=isinstance(meta, dict) and meta.get("unanswered") is True)
        return self.problems

    def _messages(self, messages: object, *, is_open: bool) -> None:
        if not isinstance(messages, list | tuple) or not messages:
            self._add(("messages",), f"must be a list of at least one message, got {_type_name(messages)}")
            return
        for index, message in enumerate(messages):
            self._message(("messages", index), message, is_first=index == 0)
        last = messages[-1]
        if isinstance(last, dict) and last.get("role") in (("system",) if is_open else ("system", "user")):
            self._add(("messages",), f"the last message must be the assistant's, got role {last['role']!r}")

    def _message(self, key: Key, message: object, *, is_first: bool) -> None:
        if not isinstance(message, dict):
            self._add(key, f"must be an object, got {_type_name(message)}")
            return
        self._keys(key, message, required=("role", "content"))
        role = message.get("role")
        if "role" in message and role not in ROLES:
            self._add((*key, "role"), f"must be one of {', '.join(ROLES)}, got {reprlib.repr(role)}")
        if role == "system" and not is_first:
            self._add((*key, "role"), "only the first message may be the system's")
        if "content" in message:
            self._content((*key, "content"), message["content"], role)

    def _content(self, key: Key, content: object, role: object) -> None:
        if isinstance(content, str):
            self._text(key, content, empty_allowed=role != "assistant")
            return
        if not isinstance(content, list | tuple) or not content:
            self._add(key, f"must be a string or a list of at least one part, got {_type_name(content)}")
            return
        for index, part in enumerate(content):
            self._part((*key, index), part, role)
        if role == "assistant" and not any(_has_text(part) for part in content):
            self._add(key, "the assistant's answer must not be empty")

    def _part(self, key: Key, part: object, role: object) -> None:
        if not isinstance(part, dict):
            self._add(key, f"must be an object, got {_type_name(part)}")
            return
        kind = part.get("type")
        if kind == "text":
            self._keys(key, part, required=("type", "text"))
            if "text" in part:
                self._text((*key, "text"), part["text"], empty_allowed=True)
        elif kind in MEDIA:
            self._keys(key, part, required=("type", "path"))
            if role in ("system", "assistant"):
                self._add(key, f"media may stand only in a user's message, got {kind!r} in the {role}'s")
            if "path" in part:
                self._path((*key, "path"), part["path"])
        else:
            self._add((*key, "type"), f"must be one of text, {', '.join(MEDIA)}, got {reprlib.repr(kind)}")

    def _path(self, key: Key, path: object) -> None:
        if not isinstance(path, str):
            self._add(key, f"must be a string, got {_type_name(path)}")
        elif problem := path_problem(path):
            self._add(key, f"{problem}, got {_shown(path)}")

    def _text(self, key: Key, value: object, *, empty_allowed: bool) -> None:
        if not isinstance(value, str):
            self._add(key, f"must be a string, got {_type_name(value)}")
        elif "\0" in value:
            self._add(key, "must not hold the character NUL")
        elif not empty_allowed and not value.strip():
            self._add(key, "must not be empty")

    def _keys(
        self, parent: Key, value: dict[str, object], *, required: tuple[str, ...], optional: tuple[str, ...] = ()
    ) -> None:
        for key in required:
            if key not in value:
                self._add((*parent, key), "is missing")
        allowed = required + optional
        for key in value:
            if key not in allowed:
                self._add((*parent, key), f"unknown key; allowed are {', '.join(allowed)}")

    def _add(self, key: Key, problem: str) -> None:
        name = "".join(f"[{step}]" if isinstance(step, int) else f".{_shown(step)}" for step in key)
        self.problems.append(f"{name.removeprefix('.')}: {problem}")


def _has_text(part: object) -> bool:
    return isinstance(part, dict) and isinstance(part.get("text"), str) and part["text"].strip() != ""


def _shown(text: str) -> str:
    """Show a string of the file in a message: quoted unless it is a plain word, and cut, so that none fills the
    report.
    """
    return text if text.isidentifier() and len(text) <= 40 else repr(text if len(text) <= 200 else text[:200] + "...")


def _type_name(value: object) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", type(None): "null"}
    if isinstance(value, list | str) and not value:
        return f"{names[type(value)]} that is empty"
    return names.get(type(value), "a number" if isinstance(value, int | float) else type(value).__name__)


def _build_sample(row: dict[str, Any], root: Path) -> Sample:
    # Of a million rows nearly all say the same roles, tasks, kinds and short answers, which are kept once.
    messages = tuple(Message(cast(Role, intern(one["role"])), _parts_of(one["content"])) for one in row["messages"])
    kind = row.get("kind")
    return Sample(
        row["id"],
        messages,
        intern(row["task"]),
        None if kind is None else intern(kind),
        row.get("meta") or _NO_META,
        root,
    )


def _parts_of(content: str | list[dict[str, str]]) -> tuple[Part, ...]:
    if isinstance(content, str):
        return (_text_of(content),)
    return tuple(
        _text_of(part["text"]) if part["type"] == "text" else Media(cast(Medium, intern(part["type"])), part["path"])
        for part in content
    )


def _text_of(text: str) -> Text:
    return _short_text(text) if len(text) <= MAX_SHARED_CHARACTERS else Text(text)


@lru_cache(maxsize=4096)
def _short_text(text: str) -> Text:
    return Text(text)


def _row_of(sample: Sample) -> dict[str, Any]:
    messages = [
        {"role": message.role, "content": [_row_part(part) for part in message.parts]} for message in sample.messages
    ]
    row: dict[str, Any] = {"id": sample.id, "task": sample.task}
    if sample.kind is not None:
        row["kind"] = sample.kind
    if sample.meta:
        row["meta"] = dict(sample.meta)
    return row | {"messages": messages}


def _row_part(part: Part) -> dict[str, str]:
    if isinstance(part, Text):
        return {"type": "text", "text": part.text}
    return {"type": part.medium, "path": part.path}
