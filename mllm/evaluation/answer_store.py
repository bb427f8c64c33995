"""Keeps answers on disk: one line per (sample, budget), written at once, so that a sweep can be resumed.

Knows lines, ranks and a fingerprint. Does not know models, metrics or media.

    out/fingerprint.json     everything the answers depend on; answers of anything else are refused
    out/answers/0.jsonl      appended by rank 0, and so on; read by every later run, whatever its number of ranks
    out/hypotheses.jsonl     all answers in the order of the manifests, written at the end
"""

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from mllm.evaluation.media_stamps import NO_MEDIA
from mllm.utils.fail_points import fail_point
from mllm.utils.files import append_text, cut_half_line, write_text_whole

FINGERPRINT = "fingerprint.json"
HYPOTHESES = "hypotheses.jsonl"
ANSWERS = "answers"
_DIGEST = re.compile("[0-9a-f]{64}")


class Key(NamedTuple):
    """Identifies the answer of a line: the set, the sample in it, the noise, the budget and the stamp of its media."""

    set_name: str
    sample_id: str
    snr_db: float | None
    budget: str
    media_stamp: str


Line = dict[str, Any]


def key_of(line: Mapping[str, Any]) -> Key:
    """Reads the key of a line."""
    return Key(line["set"], line["id"], line["snr_db"], line["budget"], line.get("media_stamp", NO_MEDIA))


class AnswerStore:
    """Reads and writes the answers of one output folder, for one rank.

    Args:
        folder: shared by all ranks.
        rank: the process whose file is appended to.
    """

    def __init__(self, folder: str | Path, *, rank: int = 0) -> None:
        self.folder = Path(folder)
        self.path = self.folder / ANSWERS / f"{rank}.jsonl"

    def claim(self, fingerprint: Mapping[str, Any]) -> None:
        """Claims the folder for this evaluation, or finds that it is; one rank does this before the others begin.

        Raises:
            ValueError: the folder holds answers that depend on something else; what differs is named.
        """
        (self.folder / ANSWERS).mkdir(parents=True, exist_ok=True)
        file = self.folder / FINGERPRINT
        if not file.exists():
            write_text_whole(file, json.dumps(dict(fingerprint), indent=1, sort_keys=True) + "\n")
            return
        now = json.loads(json.dumps(dict(fingerprint)))
        if changed := list(_differences(json.loads(file.read_text()), now)):
            raise ValueError(
                f"{self.folder} holds answers of another evaluation ({'; '.join(changed)}); give this one a name to "
                "keep it beside them (--name NAME), or choose another --out"
            )

    def append(self, lines: Iterable[Line]) -> None:
        """Appends lines, and waits until they are on the disk."""
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        fail_point("evaluate.answered")
        append_text(self.path, text, flush=True)
        fail_point("evaluate.kept")

    def read(self) -> dict[Key, Line]:
        """Reads the lines of all ranks by key; an answer beats a failure, and a later failure an earlier one.

        Raises:
            ValueError: a line that is no JSON, other than the last of a file, which a killed run may leave half
                written.
        """
        lines: dict[Key, Line] = {}
        for file in sorted((self.folder / ANSWERS).glob("*.jsonl")):
            for line in _whole_lines(file):
                key = key_of(line)
                if key not in lines or "error" in lines[key]:
                    lines[key] = line
        return lines

    def repair(self) -> None:
        """Cuts a half-written last line of this rank's file, so that what is appended begins on a new line."""
        cut_half_line(self.path)


def _differences(before: Any, now: Any, key: str = "") -> Iterator[str]:
    """Says what differs between two values of JSON, by dotted keys; of digests only that they do."""
    if isinstance(before, dict) and isinstance(now, dict):
        for name in sorted(before.keys() | now.keys()):
            yield from _differences(before.get(name), now.get(name), f"{key}.{name}".removeprefix("."))
    elif before != now:
        if any(isinstance(value, str) and _DIGEST.fullmatch(value) for value in (before, now)):
            yield f"{key} {'is new' if before is None else 'is gone' if now is None else 'has changed'}"
        else:
            yield f"{key} was {before!r} and is {now!r}"


def _whole_lines(file: Path) -> Iterable[Line]:
    rows = file.read_text(encoding="utf-8", errors="replace").split("\n")
    for number, row in enumerate(rows[:-1], start=1):  # what follows the last line break is half written or nothing
        try:
            yield json.loads(row)
        except json.JSONDecodeError as error:
            raise ValueError(f"{file}:{number}: not JSON: {error.msg}; delete the line or the folder") from error
