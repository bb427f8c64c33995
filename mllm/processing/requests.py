"""Reads requests and chats as people write them in Python, to samples and the media that came with them in memory.

    read_request({"image": [image], "audio": ["hello.wav"]}, "what is this?")
    read_chat([{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": "what?"}]}])

Knows messages, parts and files. Does not know models, tokenizers or decoders.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from mllm.budget import MEDIA, Budget, BudgetInput
from mllm.data.manifest import ROLES, Media, Message, Part, Sample, Text
from mllm.media import InMemoryMedium, MediaInput, items_of, path_of

SEPARATORS = {"vicuna_v1": "\n"}
"""By chat format, what published data put between images and a question; a manifest's texts hold it themselves."""
PART_KEYS = {
    "image": ("image", "url", "path", "base64", "image_url"),
    "audio": ("audio", "url", "path", "base64", "audio_url"),
    "video": ("video", "url", "path", "base64", "video_url"),
}
"""The keys of a part that may hold its medium, by type; `image_url` and its like are types as well (OpenAI's form)."""


class Request(NamedTuple):
    """Holds a conversation, what the caller calls its files, and the media in memory that stand in place of files.

    `names` are by path in the sample. `in_memory` holds one entry per medium of the sample, None where it is a file.
    """

    sample: Sample
    names: dict[str, str]
    in_memory: tuple[InMemoryMedium | None, ...]


def read_request(media: Mapping[str, Any], text: str, *, separator: str = "") -> Request:
    """Read a question about media: images before audio before videos, all before the text.

    Args:
        media: one item or several by medium, in any form of `mllm.media.in_memory`.
        separator: put between the media and the question where it does not begin with it already.

    Raises:
        ValueError: media in no form that is read.
    """
    collected = _Collected()
    parts = [collected.add(medium, item) for medium in MEDIA for item in items_of(medium, media.get(medium))]
    if parts and not text.startswith(separator):
        text = f"{separator}{text}"
    return collected.request([("user", [*parts, Text(text)])])


def fitting_budget(budget: BudgetInput, samples: Sequence[Sample]) -> Budget:
    """Read a budget and refuse one that speaks of a medium that none of the samples holds.

    Raises:
        ValueError: it does, or as `Budget.of`.
    """
    read = Budget.of(budget)
    if idle := read.media - {part.medium for sample in samples for part in sample.media}:
        raise ValueError(f"the budget {str(read)!r} names {min(idle)}, but the request holds none")
    return read


def read_rows(media: Mapping[str, Any], texts: Sequence[str], *, separator: str = "") -> list[Request]:
    """Read several questions, each about media of its own: the i-th entry of each medium goes with the i-th text.

    Raises:
        ValueError: as many entries as texts are needed.
    """
    entries: dict[str, list[Any]] = {}
    for medium, values in media.items():
        items = list(values) if isinstance(values, list | tuple) else items_of(medium, values)
        # For one text a flat list is its items; with several texts it would be unclear whose they are.
        if len(texts) == 1 and items and not isinstance(items[0], list | tuple):
            items = [items]
        if values is not None and len(items) != len(texts):
            raise ValueError(
                f"there are {len(texts)} texts and {len(items)} entries of {medium}; give one entry per text: one "
                "item, a list of several, or None"
            )
        entries[medium] = items or [None] * len(texts)
    return [
        read_request({medium: by_row[row] for medium, by_row in entries.items()}, text, separator=separator)
        for row, text in enumerate(texts)
    ]


def read_chat(
    messages: Sequence[Mapping[str, Any]], media: Mapping[str, Any] | None = None, *, separator: str = ""
) -> Request:
    """Read a conversation in the form of transformers' chat templates.

    Args:
        messages: `{"role", "content"}`; the content is a text or a list of parts, `{"type": "text", "text"}` or
            `{"type": "image", "image": ...}`; the medium may also stand under url, path or base64.
        media: fills, in order, the parts that say only which medium they are.
        separator: put between a medium and a text after it that does not begin with it already.

    Raises:
        ValueError: a message or part of another form, with its place; or media that are left over or missing.
    """
    waiting = {medium: items_of(medium, (media or {}).get(medium)) for medium in MEDIA}
    collected = _Collected()
    turns = []
    for number, message in enumerate(messages):
        where = f"messages[{number}]"
        if not isinstance(message, Mapping) or not {"role", "content"} <= message.keys():
            raise ValueError(f"{where} must hold role and content")
        if message["role"] not in ROLES:
            raise ValueError(f"{where}.role is {message['role']!r}; allowed: {', '.join(ROLES)}")
        content = message["content"]
        parts: list[Part] = []
        for index, content_part in enumerate([content] if isinstance(content, str) else content):
            part = _read_part(f"{where}.content[{index}]", content_part, waiting, collected)
            after_medium = bool(parts) and isinstance(parts[-1], Media)
            if isinstance(part, Text) and after_medium and not part.text.startswith(separator):
                part = Text(f"{separator}{part.text}")
            parts.append(part)
        turns.append((message["role"], parts))
    if left := [medium for medium in MEDIA if waiting[medium]]:
        raise ValueError(f"{len(waiting[left[0]])} more of {left[0]} were given than the messages have places for")
    return collected.request(turns)


def _read_part(where: str, part: Any, waiting: dict[str, list[MediaInput]], collected: "_Collected") -> Part:
    if isinstance(part, str):
        return Text(part)
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind == "text" and isinstance(part.get("text"), str):
        return Text(part["text"])
    medium = str(kind).removesuffix("_url")
    if medium not in MEDIA:
        raise ValueError(f"{where}.type is {kind!r}; allowed: text, {', '.join(MEDIA)}")
    held = [(key, part[key]) for key in PART_KEYS[medium] if part.get(key) is not None]
    if held:
        key, value = held[0]
        value = value.get("url") if key.endswith("_url") and isinstance(value, Mapping) else value
        value = f"data:;base64,{value}" if key == "base64" else value
    elif waiting[medium]:
        value = waiting[medium].pop(0)
    else:
        raise ValueError(f"{where} is of type {kind} and holds none; put it under {medium!r}, 'path' or 'url'")
    return collected.add(medium, value)


@dataclass
class _Collected:
    """Collects the media of one request, as they come."""

    media: list[tuple[str, str | InMemoryMedium]] = field(default_factory=list)

    def add(self, medium: str, item: MediaInput) -> Media:
        """Note one medium; its part names it by number until `request` knows the root of all files."""
        path = path_of(medium, item)
        self.media.append((medium, path if path is not None else InMemoryMedium(medium, item)))
        return Media(medium, str(len(self.media) - 1))  # type: ignore[arg-type]

    def request(self, turns: Sequence[tuple[str, Sequence[Part]]]) -> Request:
        """Make the sample: its root is the folder that all files have in common."""
        # Links are followed here: whoever names a file may read it, while a manifest cannot leave its root.
        real = {i: os.path.realpath(item) for i, (_, item) in enumerate(self.media) if isinstance(item, str)}
        root = os.path.commonpath([os.path.dirname(path) for path in real.values()]) if real else os.curdir
        paths, names, known = [], {}, dict[int, str]()
        for number, (_, item) in enumerate(self.media):
            if isinstance(item, str):
                paths.append(Path(real[number]).relative_to(root).as_posix())
                names |= {paths[-1]: item, real[number]: item}
            else:  # the same object is the same clip, whose audio and frames belong together
                paths.append(known.setdefault(id(item.value), f"given {len(known) + 1} ({item.kind})"))
        messages = tuple(
            Message(
                role,  # type: ignore[arg-type]
                tuple(Media(p.medium, paths[int(p.path)]) if isinstance(p, Media) else p for p in parts),
            )
            for role, parts in turns
        )
        in_memory = tuple(item if isinstance(item, InMemoryMedium) else None for _, item in self.media)
        return Request(Sample("request", messages, task="generate", root=Path(root)), names, in_memory)
