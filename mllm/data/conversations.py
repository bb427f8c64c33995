"""Reads conversations in the forms that trainers share: ShareGPT, OpenAI's messages, and those of ms-swift and
LLaMA-Factory.

    {"conversations": [{"from": "human", "value": "<image>What?"}, {"from": "gpt", "value": "A cat."}],
     "images": ["a.png"]}
    {"messages": [{"role": "user", "content": "<image>What?"}, {"role": "assistant", "content": "A cat."}],
     "images": ["a.png"]}
    {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "a.png"}},
                                               {"type": "text", "text": "What?"}]}, ...]}
    {"query": "<image>What?", "response": "A cat.", "history": [], "images": ["a.png"]}

Knows these rows. Does not open media.
"""

import logging
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mllm.budget import MEDIA
from mllm.data.findings import Listing, renumbered, shown_type
from mllm.data.json_files import json_rows
from mllm.data.manifest import Sample, parse_row
from mllm.data.prompts import CAPTION_PROMPTS
from mllm.data.source_files import below_root

logger = logging.getLogger(__name__)

MARKERS = {medium: f"<{medium}>" for medium in MEDIA}
"""Where a medium stands in a text."""
MEDIA_KEYS = {"image": ("images", "image"), "audio": ("audios", "audio"), "video": ("videos", "video")}
ROLES = {
    **{"user": "user", "human": "user"},
    **{"assistant": "assistant", "gpt": "assistant"},
    **{"system": "system", "developer": "system"},
}
TASKS = {(): "chat", ("image",): "vqa", ("audio",): "audio_qa", ("video",): "video_qa"}
"""The task of a sample that states none, by its media; several media are joined by "+"."""
CAPTION_KEYS = ("caption", "text", "sentence", "transcription", "transcript")
"""Under which tables and tars of pairs keep what is said about a medium, or in it."""
CAPTION_TASKS = {"image": "caption", "audio": "asr", "video": "video_caption"}
_REFUSED = ("tools", "objects", "rejected_response", "rejected", "chosen", "rejected_messages")
"""Keys that change what is learned, in ways a sample of ours cannot say."""
_OTHER_KEYS = ("id", "task", "kind", "meta", "system")


@dataclass
class Turn:
    """Holds one message: who speaks, and its parts; a medium without a path takes the next one of the row."""

    role: str
    parts: list[dict[str, Any]] = field(default_factory=list)


Turns = list[Turn]
Form = Callable[[dict[str, Any]], Turns]


def read_sharegpt(source: Path, root: Path) -> Listing:
    """Read ShareGPT's conversations, as a JSON list or by lines."""
    return _read(source, root, ("conversations", "conversation"))


def read_messages(source: Path, root: Path) -> Listing:
    """Read OpenAI's messages and ms-swift's queries and responses, as a JSON list or by lines."""
    return _read(source, root, ("messages", "query"))


def _read(source: Path, root: Path, forms: Sequence[str]) -> Listing:
    listing = Listing()
    reader = ConversationReader(root, forms)
    for entry in json_rows(source, listing):
        with listing.noting(source, entry.line_number, entry.what):
            sample = reader.sample_of(entry.row, entry.id_of(source))
            listing.samples.append(renumbered(sample, reader.times_seen))
    reader.log(source)
    return listing


class ConversationReader:
    """Turns rows into samples, and counts the keys that are not read.

    Args:
        root: folder that media paths are relative to.
        forms: keys that a conversation may stand under, see `FORMS`; the first that a row has counts.
    """

    def __init__(self, root: Path, forms: Sequence[str]) -> None:
        self.root = root
        self.forms = forms
        self.times_seen: dict[str, int] = {}
        self.unread: Counter[str] = Counter()

    def sample_of(
        self, row: Mapping[str, Any], sample_id: str, media: Mapping[str, Sequence[str]] | None = None
    ) -> Sample:
        """Make the sample of a row.

        Args:
            sample_id: the one it states, or one that was made up.
            media: paths by medium that come with the row from elsewhere; then it names none of that medium.

        Raises:
            ValueError: media and markers that do not match, an unknown speaker, or anything a manifest row may not be.
        """
        for key in _REFUSED:
            if row.get(key):
                raise ValueError(f"{key}: it changes what is learned and is not read")
        paths = {medium: list((media or {}).get(medium, ())) or paths_of(row, medium) for medium in MEDIA}
        row = dict(row)
        form = next((key for key in self.forms if row.get(key) is not None), None)
        if form is None:
            form = _as_caption(row, [medium for medium in MEDIA if paths[medium]], self.forms)
        turns = FORMS[form](row)
        if row.get("system"):
            turns.insert(0, Turn("system", [_text(row["system"], "system")]))
        _place_media(turns, paths)
        for part in (part for turn in turns for part in turn.parts if part["type"] != "text"):
            part["path"] = below_root(self.root, part["path"])
        known = {*_OTHER_KEYS, *_USED[form], *(key for keys in MEDIA_KEYS.values() for key in keys)}
        self.unread.update(key for key in row if key not in known and row[key] is not None)
        return self._sample(row, turns, sample_id)

    def _sample(self, row: Mapping[str, Any], turns: Turns, sample_id: str) -> Sample:
        held = tuple(medium for medium in MEDIA if any(part["type"] == medium for turn in turns for part in turn.parts))
        made = {
            "id": sample_id,
            "task": row["task"] if row.get("task") is not None else TASKS.get(held, "+".join(held)),
            "messages": [{"role": turn.role, "content": turn.parts} for turn in turns],
        }
        kept = {key: row[key] for key in ("kind", "meta") if row.get(key) is not None}
        return parse_row(made | kept, self.root, where="as a row of a manifest")

    def log(self, source: str | os.PathLike[str]) -> None:
        """Say which keys were not read."""
        for key, count in self.unread.items():
            logger.warning("%s: %d rows hold the key %r, which is not read", os.fspath(source), count, key)


def _as_caption(row: dict[str, Any], media: Sequence[str], forms: Sequence[str]) -> str:
    """Make a question of a row that only describes its medium, where such rows are read; returns its form."""
    key = next((key for key in CAPTION_KEYS if row.get(key) is not None), None) if "question" in forms else None
    if key is None:
        raise ValueError(f"there is no {' and no '.join(forms)}; it has {', '.join(map(str, row)) or 'nothing'}")
    if len(media) != 1:
        raise ValueError(f"{key}: it must describe media of one kind, and there are {' and '.join(media) or 'none'}")
    row["question"], row["answer"] = CAPTION_PROMPTS[media[0]], row.pop(key)
    if row.get("task") is None:
        row["task"] = CAPTION_TASKS[media[0]]
    return "question"


def _said_by_from(row: dict[str, Any]) -> Turns:
    """Read ShareGPT's `conversations`; some files have OpenAI's turns under that name."""
    return [
        _turn(turn, "from", "value") if "from" in turn else _turn(turn, "role", "content")
        for turn in _objects(row["conversations"], "conversations")
    ]


def _said_by_role(row: dict[str, Any]) -> Turns:
    return [_turn(turn, "role", "content") for turn in _objects(row["messages"], "messages")]


def _said_in_pairs(key: str, names: tuple[str, str]) -> Form:
    """Return a reader of ms-swift's `conversation` and the Cauldron's `texts`: a question and its answer in one
    object.
    """

    def turns(row: dict[str, Any]) -> Turns:
        return [
            Turn(role, _parts(pair[name], name, role))
            for pair in _objects(row[key], key)
            for name, role in zip(names, _PAIR, strict=True)
        ]

    return turns


def _question_and_answer(question: str, answer: str) -> Form:
    """Return a reader of a question and its answer under keys of the row; ms-swift's `history` comes before them."""

    def turns(row: dict[str, Any]) -> Turns:
        pairs = (
            [*_history(row), (row[question], row[answer])] if question == "query" else [(row[question], row[answer])]
        )
        return [
            Turn(role, _parts(text, name, role))
            for pair in pairs
            for text, name, role in zip(pair, (question, answer), _PAIR, strict=True)
        ]

    return turns


def _history(row: dict[str, Any]) -> list[tuple[Any, Any]]:
    history = row.get("history") or []
    if not isinstance(history, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in history):
        raise ValueError("history: must be a list of pairs of a query and a response")
    return [(pair[0], pair[1]) for pair in history]


_PAIR = ("user", "assistant")
FORMS: dict[str, Form] = {
    "messages": _said_by_role,
    "conversations": _said_by_from,
    "conversation": _said_in_pairs("conversation", ("human", "assistant")),
    "texts": _said_in_pairs("texts", ("user", "assistant")),
    "query": _question_and_answer("query", "response"),
    "question": _question_and_answer("question", "answer"),
}
"""Keys that a conversation may stand under, and how it is read."""
_USED = {form: (form,) for form in FORMS} | {
    "query": ("query", "response", "history"),
    "question": ("question", "answer"),
}


def _objects(value: Any, key: str) -> list[dict[str, Any]]:
    if not isinstance(value, list) or not value or not all(isinstance(entry, dict) for entry in value):
        raise ValueError(f"{key}: must be a list of at least one object, got {shown_type(value)}")
    return value


def _turn(entry: dict[str, Any], speaker: str, content: str) -> Turn:
    """Read a turn of a speaker and a content; whatever else it holds would be lost, so it is refused."""
    role = entry.get(speaker)
    if not isinstance(role, str) or role not in ROLES:
        raise ValueError(f"{speaker}: must be one of {', '.join(ROLES)}, got {role!r}")
    if others := [key for key in entry if key not in (speaker, content) and entry[key] not in (None, [], "")]:
        raise ValueError(f"a turn holds {', '.join(map(str, others))}, which is not read")
    if content not in entry:
        raise ValueError(f"a turn has no {content}")
    return Turn(ROLES[role], _parts(entry[content], content, ROLES[role]))


def _parts(content: Any, key: str, role: str) -> list[dict[str, Any]]:
    """Read the texts and media of a turn; what is typed as a marker counts only where a user speaks, see
    `_place_media`.
    """
    if isinstance(content, str):
        return _split(content) if role == "user" else [_text(content, key)]
    if not isinstance(content, list) or not content:
        raise ValueError(f"{key}: must be a string or a list of parts, got {shown_type(content)}")
    return [_part(part, key) for part in content]


def _part(part: Any, key: str) -> dict[str, Any]:
    """Read a part in OpenAI's form, in that of chat templates, or in our own."""
    kind = part.get("type") if isinstance(part, dict) else None
    if kind == "text":
        return _text(part.get("text"), f"{key}: text")
    medium = str(kind).removeprefix("input_").removesuffix("_url")
    if medium not in MEDIA:
        raise ValueError(f"{key}: type must be one of text, {', '.join(MEDIA)} or such as image_url, got {kind!r}")
    names = (kind, medium, f"{medium}_url", "path", "url")
    media = next((part[name] for name in names if part.get(name) is not None), None)
    return {"type": medium, "path": None if media is None else _path_of(media, medium)}


def _split(text: str) -> list[dict[str, Any]]:
    """Cut a text at its markers; the text of each marker is kept, in case it is none."""
    parts: list[dict[str, Any]] = []
    rest = text
    while True:
        markers = [(rest.find(marker), medium) for medium, marker in MARKERS.items() if marker in rest]
        if not markers:
            break
        position, medium = min(markers)
        parts += [{"type": "text", "text": rest[:position]}] if position else []
        parts.append({"type": medium, "path": None, "marker": MARKERS[medium]})
        rest = rest[position + len(MARKERS[medium]) :]
    return [*parts, {"type": "text", "text": rest}] if rest or not parts else parts


def _text(value: Any, key: str) -> dict[str, Any]:
    if not isinstance(value, str):
        raise ValueError(f"{key}: must be a string, got {shown_type(value)}")
    return {"type": "text", "text": value}


def _path_of(value: Any, medium: str) -> str:
    """Return a path as it is written, or inside an object that names it."""
    if isinstance(value, dict):
        if value.get("bytes") is not None or value.get("data") is not None:
            raise ValueError(f"{medium}: it stands in the row itself; write it as a file and name that")
        value = value.get("path") if value.get("path") is not None else value.get("url")
    if not isinstance(value, str):
        raise ValueError(f"{medium}: must be a path, got {shown_type(value)}")
    if value.startswith("data:"):
        raise ValueError(f"{medium}: it stands in the row itself (a data: URL); write it as a file and name that")
    return value


def paths_of(row: Mapping[str, Any], medium: str) -> list[str]:
    """Return the paths of a row's media, under the key of one or of several."""
    paths: list[str] = []
    for key in MEDIA_KEYS[medium]:
        value = row.get(key)
        values = [] if value is None else value if isinstance(value, list) else [value]
        paths += [_path_of(entry, medium) for entry in values]
    return paths


def _place_media(turns: Turns, paths: dict[str, list[str]]) -> None:
    """Give each medium of the turns its path.

    Where a row names media and no turn says where they stand, they stand before the first question, as ms-swift puts
    them. Where it names none, a marker in the midst of a text is text: people write about HTML.
    """
    for medium, named_beside in paths.items():
        parts = [(turn, part) for turn in turns for part in turn.parts if part["type"] == medium]
        unnamed = [(turn, part) for turn, part in parts if part["path"] is None]
        named_inside = [part["path"] for _, part in parts if part["path"] is not None]
        if named_beside and named_inside:  # some data name every file twice; then both must agree
            if named_beside != named_inside or unnamed:
                raise ValueError(f"media of the kind {medium} are named in the turns and beside them, and differ")
        elif not named_beside and unnamed:
            _as_text(unnamed, medium)
        elif named_beside and not unnamed:
            _before_the_question(turns, medium, named_beside)
        elif len(named_beside) != len(unnamed):
            got = f"{len(unnamed)} places ({MARKERS[medium]}) for {len(named_beside)}"
            raise ValueError(f"{got} media of the kind {medium}")
        else:
            for (_, part), path in zip(unnamed, named_beside, strict=True):
                part["path"] = path
    for turn in turns:
        turn.parts = _joined(turn.parts)


def _joined(parts: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Join parts as a manifest has them, texts that follow each other in one."""
    joined: list[dict[str, Any]] = []
    for part in parts:
        if part["type"] == "text" and joined and joined[-1]["type"] == "text":
            joined[-1]["text"] += part["text"]
        else:
            joined.append({key: part[key] for key in ("type", "text", "path") if key in part})
    return joined


def _as_text(parts: list[tuple[Turn, dict[str, Any]]], medium: str) -> None:
    for turn, part in parts:
        if "marker" not in part or part is turn.parts[0] or part is turn.parts[-1]:
            raise ValueError(f"{len(parts)} places ({MARKERS[medium]}) for 0 media of the kind {medium}")
        part.pop("path")
        part.update(type="text", text=part.pop("marker"))


def _before_the_question(turns: Turns, medium: str, paths: list[str]) -> None:
    question = next((turn for turn in turns if turn.role == "user"), None)
    if question is None:
        raise ValueError(f"there are {len(paths)} media of the kind {medium} and no question they could belong to")
    # Media of several kinds stand in the order in which they are placed here, each kind behind those before it.
    count = sum("placed" in part for part in question.parts)
    question.parts[count:count] = [{"type": medium, "path": path, "placed": True} for path in paths]
