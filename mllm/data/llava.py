"""Reads LLaVA's JSON of conversations about pictures: LLaVA-Pretrain, mix665k and files of their form.

    [{"id": "7", "image": "coco/train2017/a.jpg", "conversations": [
        {"from": "human", "value": "<image>\\nWhat is this?"}, {"from": "gpt", "value": "A cat."}]}]

Knows that format. Does not open pictures.
"""

import json
import logging
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from mllm.data.manifest import Sample, parse_row

logger = logging.getLogger(__name__)

MARKER = "<image>"
ROLES = {"human": "user", "gpt": "assistant", "system": "system"}
MAX_SHOWN = 20
# What is left out, as the log says it; LLaVA's mixtures have a few of each.
_UNASKED, _UNANSWERED = "answers without a question were left out", "questions without an answer were left out"
_EMPTY = "samples without a question that has an answer were left out"
_TEXT = f"samples without a picture speak of {MARKER}, which was read as text"


def read_llava(
    path: str | os.PathLike[str],
    root: str | os.PathLike[str],
    *,
    task: str = "vqa",
    kind: str | None = None,
    pictures_first: bool = False,
) -> list[Sample]:
    """Read a LLaVA JSON file.

    Each `<image>` of a human turn stands for the next picture of the sample; the text around it is kept as it is, line
    breaks included. `image` is one path or a list of them; a sample without pictures is allowed, and `<image>` in the
    midst of its text (people write about HTML) is text. Ids that are numbers become text, and an id that occurs again
    (LLaVA's own mixtures have such) gets "#2", "#3" and so on appended.

    Answers without a question (some conversations begin with one) and questions that are empty or without an answer
    are left out, each with what belongs to it; the log says how many.

    Args:
        path: the JSON file.
        root: folder that picture paths are relative to.
        task: what the samples are filed under in reports.
        kind: likewise, finer.
        pictures_first: put the pictures of a turn before its text, each followed by a line break, as LLaVA's training
            code does with every turn that has one.

    Raises:
        ValueError: naming the file and the samples, up to 20: pictures and markers that do not match, a marker in an
            answer, an unknown speaker, or anything a manifest row may not be.
    """
    name = os.fspath(path)
    try:
        entries = json.loads(Path(path).read_text(encoding="utf-8-sig"))
    except ValueError as error:
        raise ValueError(f"{name}: not a JSON file in UTF-8: {error}") from error
    if not isinstance(entries, list) or not entries:
        raise ValueError(f"{name}: must be a list of at least one conversation")
    reader = _Reader(root, {"task": task} | ({} if kind is None else {"kind": kind}), pictures_first)
    samples, problems, times_seen = [], [], dict[str, int]()
    for number, entry in enumerate(entries):
        try:
            sample = reader.sample_of(entry, where=f"{name}: entry {number}")
            if sample is not None:
                times_seen[sample.id] = times_seen.get(sample.id, 0) + 1
                samples.append(_renumbered(sample, times_seen))
        except ValueError as error:
            problems.append(str(error))
    if problems:
        more = [f"and {len(problems) - MAX_SHOWN} more"] if len(problems) > MAX_SHOWN else []
        raise ValueError("\n".join([*problems[:MAX_SHOWN], *more]))
    reader.counts["ids occur again and were numbered"] = len(samples) - len(times_seen)
    for what, count in reader.counts.items():
        if count:
            logger.warning("%s: %d %s", name, count, what)
    return samples


class _Reader:
    """Entries to samples; counts what it left out or read as text.

    Args:
        root, pictures_first: see `read_llava`.
        labels: keys of every row.
    """

    def __init__(self, root: str | os.PathLike[str], labels: dict[str, str], pictures_first: bool) -> None:
        self.root = root
        self.labels = labels
        self.pictures_first = pictures_first
        self.counts: Counter[str] = Counter()

    def sample_of(self, entry: Any, *, where: str) -> Sample | None:
        """The sample of an entry, or nothing where no question in it has an answer."""
        if not isinstance(entry, dict):
            raise ValueError(f"{where}: must be an object, got {type(entry).__name__}")
        where = f"{where} (id {entry.get('id')!r})"
        if unknown := entry.keys() - {"id", "image", "conversations", "model"}:
            raise ValueError(
                f"{where}: unknown keys {', '.join(sorted(unknown))}; allowed are id, image, conversations"
            )
        pictures = entry.get("image", [])
        pictures = [pictures] if isinstance(pictures, str) else list(pictures)
        turns = _checked(entry.get("conversations"), where)
        pictures_left = _matched(turns, pictures, where) if pictures else None
        if pictures_left is None and any(MARKER in turn["value"] for turn in turns):
            _check_text_only(turns, where)
            self.counts[_TEXT] += 1
        answered = self._answered(turns)
        if answered is None:
            self.counts[_EMPTY] += 1
            return None
        messages = [
            {"role": ROLES[turn["from"]], "content": self._content(turn["value"], pictures_left)} for turn in answered
        ]
        return parse_row({"id": str(entry.get("id", "")), "messages": messages, **self.labels}, self.root, where=where)

    def _answered(self, turns: list[dict[str, str]]) -> list[dict[str, str]] | None:
        """The turns with a question before and an answer behind; nothing where a picture would be lost with others."""
        kept: list[dict[str, str]] = []
        lost: list[dict[str, str]] = []
        for turn in turns:
            if turn["from"] != "gpt":
                (kept if turn["value"].strip() else lost).append(turn)
            elif not kept or kept[-1]["from"] != "human":
                self.counts[_UNASKED] += 1
                lost.append(turn)
            elif not turn["value"].strip():
                self.counts[_UNANSWERED] += 1
                lost.append(kept.pop())
            else:
                kept.append(turn)
        while kept and kept[-1]["from"] == "human":
            self.counts[_UNANSWERED] += 1
            lost.append(kept.pop())
        holds_answer = any(turn["from"] == "gpt" for turn in kept)
        return kept if holds_answer and not any(MARKER in turn["value"] for turn in lost) else None

    def _content(self, value: str, pictures: Iterator[str] | None) -> list[dict[str, str]] | str:
        """Texts and pictures in turn; the text between two markers is left out where it is empty."""
        texts = value.split(MARKER)
        if pictures is None or len(texts) == 1:
            return value
        if self.pictures_first:
            rest = "".join(texts).strip()
            texts = ["", *["\n"] * (len(texts) - 2), f"\n{rest}" if rest else ""]
        parts: list[dict[str, str]] = []
        for number, text in enumerate(texts):
            if number:
                parts.append({"type": "image", "path": next(pictures)})
            if text:
                parts.append({"type": "text", "text": text})
        return parts


def _checked(turns: Any, where: str) -> list[dict[str, str]]:
    """The turns of a conversation, of known speakers and with a text each."""
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise ValueError(f"{where}: conversations must be a list of objects")
    for turn in turns:
        if turn.get("from") not in ROLES:
            raise ValueError(f"{where}: from must be one of {', '.join(ROLES)}, got {turn.get('from')!r}")
        if not isinstance(turn.get("value"), str):
            raise ValueError(f"{where}: value must be a string, got {turn.get('value')!r}")
    return turns


def _matched(turns: list[dict[str, str]], pictures: list[str], where: str) -> Iterator[str]:
    """The pictures, to be handed out marker by marker."""
    if any(MARKER in turn["value"] for turn in turns if turn["from"] != "human"):
        raise ValueError(f"{where}: {MARKER} may stand only in what a human says")
    num_markers = sum(turn["value"].count(MARKER) for turn in turns)
    if num_markers != len(pictures):
        raise ValueError(f"{where}: {num_markers} {MARKER} markers for {len(pictures)} pictures")
    return iter(pictures)


def _check_text_only(turns: list[dict[str, str]], where: str) -> None:
    """Refuse a marker at the edge of a human turn, where LLaVA puts pictures: one is missing."""
    for turn in turns:
        text = turn["value"].strip()
        if turn["from"] == "human" and (text.startswith(MARKER) or text.endswith(MARKER)):
            raise ValueError(f"{where}: {text.count(MARKER)} {MARKER} markers for 0 pictures")


def _renumbered(sample: Sample, times_seen: dict[str, int]) -> Sample:
    """The sample with a number after its id from the second time on that the id is seen."""
    times = times_seen[sample.id]
    if times == 1:
        return sample
    new_id = f"{sample.id}#{times}"
    if new_id in times_seen:
        raise ValueError(f"the id {new_id!r} is needed for a second sample {sample.id!r}, but it is taken")
    return replace(sample, id=new_id)
