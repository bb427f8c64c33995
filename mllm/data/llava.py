"""Reads LLaVA's JSON of conversations about images, as a list or by lines: LLaVA-Pretrain, mix665k and their like.

    [{"id": "7", "image": "coco/train2017/a.jpg", "conversations": [
        {"from": "human", "value": "<image>\\nWhat is this?"}, {"from": "gpt", "value": "A cat."}]}]

Knows that format. Does not open images.
"""

import logging
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mllm.data.findings import BadRows, Listing, renumbered, shown_type
from mllm.data.json_files import json_rows
from mllm.data.manifest import Sample, parse_row
from mllm.data.source_files import below_root

logger = logging.getLogger(__name__)

MARKER = "<image>"
ROLES = {"human": "user", "gpt": "assistant", "system": "system"}
_KEYS = ("id", "image", "conversations", "model")
_MEDIA_KEYS = ("images", "video", "videos", "audio", "audios")
# What is left out, as the log says it; LLaVA's mixtures have a few of each.
_UNASKED, _UNANSWERED = "answers without a question were left out", "questions without an answer were left out"
_EMPTY = "samples without a question that has an answer were left out"
_TEXT = f"samples without an image speak of {MARKER}, which was read as text"


def read_llava(
    path: str | os.PathLike[str],
    root: str | os.PathLike[str],
    *,
    task: str = "vqa",
    kind: str | None = None,
    images_first: bool = False,
) -> list[Sample]:
    """Read a LLaVA JSON file.

    Each `<image>` of a human turn stands for the next image of the sample; the text around it is kept as it is, line
    breaks included. `image` is one path or a list of them; a sample without images is allowed, and `<image>` in the
    midst of its text (people write about HTML) is text. Ids that are numbers become text, and an id that occurs again
    (LLaVA's own mixtures have such) gets "#2", "#3" and so on appended.

    Answers without a question (some conversations begin with one) and questions that are empty or without an answer
    are left out, each with what belongs to it; the log says how many.

    Args:
        path: the JSON file.
        root: folder that image paths are relative to.
        task: what the samples are filed under in reports.
        kind: likewise, finer.
        images_first: put the images of a turn before its text, each followed by a line break, as LLaVA's training
            code does with every turn that has one.

    Raises:
        ValueError: naming the file and the samples, up to 20: images and markers that do not match, a marker in an
            answer, an unknown speaker, or anything a manifest row may not be. Or there is no conversation.
    """
    listing = list_llava(path, root, task=task, kind=kind, images_first=images_first)
    if listing.problems:
        raise BadRows(listing.problems)
    if not listing.samples:
        raise ValueError(f"{os.fspath(path)}: must be a list of at least one conversation")
    return listing.samples


def list_llava(
    path: str | os.PathLike[str],
    root: str | os.PathLike[str],
    *,
    task: str = "vqa",
    kind: str | None = None,
    images_first: bool = False,
) -> Listing:
    """Read a LLaVA file as `read_llava` does; what is wrong with a conversation is noted, and the others go on.

    Raises:
        ValueError: a file that begins like a JSON list and is none.
        OSError: it cannot be read.
    """
    reader = _Reader(root, {"task": task} | ({} if kind is None else {"kind": kind}), images_first)
    listing, times_seen = Listing(), dict[str, int]()
    for entry in json_rows(Path(path), listing):
        name = f"{entry.what} (id {entry.row.get('id')!r})".strip()
        with listing.noting(path, entry.line_number, name):
            sample = reader.sample_of(entry.row, entry.id_of(Path(path)))
            if sample is not None:
                listing.samples.append(renumbered(sample, times_seen))
    reader.counts["ids occur again and were numbered"] = len(listing.samples) - len(times_seen)
    for message, count in reader.counts.items():
        if count > 0:
            logger.warning("%s: %d %s", os.fspath(path), count, message)
    return listing


class _Reader:
    """Turns entries into samples, and counts what it left out or read as text.

    Args:
        root, images_first: see `read_llava`.
        labels: keys of every row.
    """

    def __init__(self, root: str | os.PathLike[str], labels: dict[str, str], images_first: bool) -> None:
        self.root = root
        self.labels = labels
        self.images_first = images_first
        self.counts: Counter[str] = Counter()

    def sample_of(self, entry: dict[str, Any], sample_id: str) -> Sample | None:
        """Make the sample of an entry, or None where no question in it has an answer.

        Raises:
            ValueError: see `read_llava`.
        """
        for key in entry.keys() - set(_KEYS):
            if key in _MEDIA_KEYS and entry[key]:
                raise ValueError(f"{key}: format llava reads images under image; format sharegpt reads {key}")
            self.counts[f"samples hold the key {key!r}, which is not read"] += 1
        images = [
            below_root(self.root, image) if isinstance(image, str) else image
            for image in _images_of(entry.get("image"))
        ]
        turns = _checked(entry.get("conversations"))
        images_left = _matched(turns, images) if images else None
        if images_left is None and any(MARKER in turn["value"] for turn in turns):
            _check_text_only(turns)
            self.counts[_TEXT] += 1
        answered = self._answered(turns)
        if answered is None:
            self.counts[_EMPTY] += 1
            return None
        messages = [
            {"role": ROLES[turn["from"]], "content": self._content(turn["value"], images_left)} for turn in answered
        ]
        row = {"id": sample_id, "messages": messages, **self.labels}
        return parse_row(row, self.root, where="as a row of a manifest")

    def _answered(self, turns: list[dict[str, str]]) -> list[dict[str, str]] | None:
        """Return the turns with a question before and an answer behind; None where an image would be lost with
        others.
        """
        kept: list[dict[str, str]] = []
        lost: list[dict[str, str]] = []
        for turn in turns:
            if turn["from"] != "gpt":
                (kept if turn["value"].strip() else lost).append(turn)
            elif not kept or kept[-1]["from"] != "human":  # the loss would teach to speak unasked
                self.counts[_UNASKED] += 1
                lost.append(turn)
            elif not turn["value"].strip():
                self.counts[_UNANSWERED] += 1
                lost.append(kept.pop())
            else:
                kept.append(turn)
        # A question at the end would be read as context and never answered.
        while kept and kept[-1]["from"] == "human":
            self.counts[_UNANSWERED] += 1
            lost.append(kept.pop())
        holds_answer = any(turn["from"] == "gpt" for turn in kept)
        return kept if holds_answer and not any(MARKER in turn["value"] for turn in lost) else None

    def _content(self, value: str, images: Iterator[str] | None) -> list[dict[str, str]] | str:
        """Return texts and images in turn; the text between two markers is left out where it is empty."""
        texts = value.split(MARKER)
        if images is None or len(texts) == 1:
            return value
        if self.images_first:
            rest = "".join(texts).strip()
            texts = ["", *["\n"] * (len(texts) - 2), f"\n{rest}" if rest else ""]
        parts: list[dict[str, str]] = []
        for number, text in enumerate(texts):
            if number:
                parts.append({"type": "image", "path": next(images)})
            if text:
                parts.append({"type": "text", "text": text})
        return parts


def _images_of(value: Any) -> list[str]:
    """Return the paths under `image`: one, a list of them, or null for a sample of text."""
    if value is None or isinstance(value, str):
        return [] if value is None else [value]
    if not isinstance(value, list):
        raise ValueError(f"image: must be a path, a list of paths or null, got {shown_type(value)}")
    return value


def _checked(turns: Any) -> list[dict[str, str]]:
    """Return the turns of a conversation, checked to be of known speakers and with a text each."""
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise ValueError("conversations must be a list of objects")
    for turn in turns:
        if not isinstance(turn.get("from"), str) or turn["from"] not in ROLES:
            raise ValueError(f"from must be one of {', '.join(ROLES)}, got {turn.get('from')!r}")
        if not isinstance(turn.get("value"), str):
            raise ValueError(f"value must be a string, got {turn.get('value')!r}")
    return turns


def _matched(turns: list[dict[str, str]], images: list[str]) -> Iterator[str]:
    """Return the images, to be taken marker by marker."""
    if any(MARKER in turn["value"] for turn in turns if turn["from"] != "human"):
        raise ValueError(f"{MARKER} may stand only in what a human says")
    num_markers = sum(turn["value"].count(MARKER) for turn in turns)
    if num_markers != len(images):
        raise ValueError(f"{num_markers} {MARKER} markers for {len(images)} images")
    return iter(images)


def _check_text_only(turns: list[dict[str, str]]) -> None:
    """Refuse a marker at the edge of a human turn, where LLaVA puts images: one is missing."""
    for turn in turns:
        text = turn["value"].strip()
        if turn["from"] == "human" and (text.startswith(MARKER) or text.endswith(MARKER)):
            raise ValueError(f"{text.count(MARKER)} {MARKER} markers for 0 images")
