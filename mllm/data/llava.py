"""Reads LLaVA's JSON of conversations about pictures.

    [{"id": "7", "image": "a.jpg", "conversations": [
        {"from": "human", "value": "<image>\\nWhat is this?"}, {"from": "gpt", "value": "A cat."}]}]

Knows that format. Does not open pictures.
"""

import json
import logging
import os
from pathlib import Path
from typing import Any

from mllm.data.manifest import Sample, parse_row

logger = logging.getLogger(__name__)

MARKER = "<image>"
ROLES = {"human": "user", "gpt": "assistant", "system": "system"}


def read_llava(
    path: str | os.PathLike[str], root: str | os.PathLike[str], *, task: str = "vqa", kind: str | None = None
) -> list[Sample]:
    """Read a LLaVA JSON file.

    Each `<image>` of a human turn stands for the next picture of the sample; the text around it is kept as it is, line
    breaks included. `image` is one path or a list of them; a sample without pictures is allowed. Ids that are numbers
    become text, and an id that occurs again (LLaVA's own mixtures have such) gets "#2", "#3" and so on appended.

    Args:
        path: the JSON file.
        root: folder that picture paths are relative to.
        task: what the samples are filed under in reports.
        kind: likewise, finer.

    Raises:
        ValueError: naming the file and the sample: pictures and markers that do not match, a marker in an answer, an
            unknown speaker, or anything a manifest row may not be.
    """
    name = os.fspath(path)
    try:
        entries = json.loads(Path(path).read_text(encoding="utf-8-sig"))
    except ValueError as error:
        raise ValueError(f"{name}: not a JSON file in UTF-8: {error}") from error
    if not isinstance(entries, list) or not entries:
        raise ValueError(f"{name}: must be a list of at least one conversation")
    samples, times_seen = [], dict[str, int]()
    for number, entry in enumerate(entries):
        sample = _sample_of(entry, root, where=f"{name}: entry {number}", labels={"task": task, "kind": kind})
        times_seen[sample.id] = times_seen.get(sample.id, 0) + 1
        samples.append(_renumbered(sample, times_seen))
    if len(times_seen) < len(samples):
        logger.info(
            "%s: %d of %d ids occur again and were numbered", name, len(samples) - len(times_seen), len(samples)
        )
    return samples


def _sample_of(entry: Any, root: str | os.PathLike[str], *, where: str, labels: dict[str, str | None]) -> Sample:
    if not isinstance(entry, dict):
        raise ValueError(f"{where}: must be an object, got {type(entry).__name__}")
    where = f"{where} (id {entry.get('id')!r})"
    if unknown := entry.keys() - {"id", "image", "conversations", "model"}:
        raise ValueError(f"{where}: unknown keys {', '.join(sorted(unknown))}; allowed are id, image, conversations")
    pictures = entry.get("image", [])
    pictures = [pictures] if isinstance(pictures, str) else list(pictures)
    messages = _messages_of(entry.get("conversations"), pictures, where)
    row = {"id": str(entry.get("id", "")), "messages": messages}
    return parse_row(row | {key: value for key, value in labels.items() if value is not None}, root, where=where)


def _messages_of(turns: Any, pictures: list[str], where: str) -> list[dict[str, Any]]:
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise ValueError(f"{where}: conversations must be a list of objects")
    for turn in turns:
        if turn.get("from") not in ROLES:
            raise ValueError(f"{where}: from must be one of {', '.join(ROLES)}, got {turn.get('from')!r}")
        if not isinstance(turn.get("value"), str):
            raise ValueError(f"{where}: value must be a string, got {turn.get('value')!r}")
        if MARKER in turn["value"] and turn["from"] != "human":
            raise ValueError(f"{where}: {MARKER} may stand only in what a human says")
    num_markers = sum(turn["value"].count(MARKER) for turn in turns)
    if num_markers != len(pictures):
        raise ValueError(f"{where}: {num_markers} {MARKER} markers for {len(pictures)} pictures")
    rest = iter(pictures)
    return [{"role": ROLES[turn["from"]], "content": _parts_of(turn["value"], rest)} for turn in turns]


def _parts_of(value: str, pictures: Any) -> list[dict[str, str]] | str:
    """Texts and pictures in turn; the text between two markers is left out where it is empty."""
    texts = value.split(MARKER)
    if len(texts) == 1:
        return value
    parts: list[dict[str, str]] = []
    for number, text in enumerate(texts):
        if number:
            parts.append({"type": "image", "path": next(pictures)})
        if text:
            parts.append({"type": "text", "text": text})
    return parts


def _renumbered(sample: Sample, times_seen: dict[str, int]) -> Sample:
    """The sample with a number after its id from the second time on that the id is seen."""
    from dataclasses import replace

    times = times_seen[sample.id]
    if times == 1:
        return sample
    new_id = f"{sample.id}#{times}"
    if new_id in times_seen:
        raise ValueError(f"the id {new_id!r} is needed for a second sample {sample.id!r}, but it is taken")
    return replace(sample, id=new_id)
