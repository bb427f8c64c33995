"""Reads LRS2 and LRS3 trees as they are handed out, and cuts their long clips by the times of the words.

    mvlrs_v1/train.txt                      LRS2: a list (also val, test, pretrain) of clips below main/ or pretrain/
    mvlrs_v1/main/<speaker>/<clip>.mp4      a .txt with the text beside each clip
    lrs3/trainval/<speaker>/<clip>.mp4      LRS3: folders trainval, test, pretrain instead of lists

A text file begins with `Text:  WORDS`; a table `WORD START END ASDSCORE` may follow.

Knows those trees and texts. Does not encode: what cuts a clip is a callable of others.
"""

import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from mllm.config.data import ReaderConfig
from mllm.data.findings import Listing
from mllm.data.manifest import Medium
from mllm.data.source_files import read_text, relative_to
from mllm.data.speech.utterances import Gathering, Utterance
from mllm.media import path_problem
from mllm.media.headers import header_seconds

SUFFIX = ".mp4"


@dataclass(frozen=True, slots=True)
class Word:
    """Holds a word and when it is said, in seconds from the start of the clip."""

    text: str
    start_seconds: float
    end_seconds: float


@dataclass(frozen=True, slots=True)
class Segment:
    """Holds a piece of a clip: its words, and from when to when it lasts, in seconds."""

    words: tuple[Word, ...]

    @property
    def start_seconds(self) -> float:
        """Say when its first word begins."""
        return self.words[0].start_seconds

    @property
    def end_seconds(self) -> float:
        """Say when its last word ends."""
        return self.words[-1].end_seconds

    @property
    def text(self) -> str:
        """Return what is said."""
        return " ".join(word.text for word in self.words)


@dataclass(frozen=True, slots=True)
class Piece:
    """Says what a cut made of a segment: files relative to the root, and their length; no audio where the clip has
    none.
    """

    video: str
    audio: str | None
    seconds: float


Cut = Callable[[str, str | None, Sequence[Segment]], list[Piece]]
"""Cuts a clip, the paths of its video and its audio (if any) relative to the root, into segments."""


def read_lrs(source: Path, root: Path, config: ReaderConfig, *, cut: Cut | None = None) -> Listing:
    """Read a list of LRS2 or a folder of LRS3 (or any folder of such clips).

    The audio is an audio file beside the video where there is one, else the video's own if it has one. Braces around
    words, as in `{LG}`, are taken away, as auto_avsr does.

    Args:
        cut: cuts clips longer than `config.max_seconds` and says what came of them; None refuses those.

    Raises:
        OSError: there is no such list or folder.
    """
    gathering = Gathering(source, root, config)
    for stem, line_number in _stems(source, gathering):
        text_file = Path(f"{stem}.txt")
        text_path = None if line_number else text_file
        with gathering.row(line_number, text_path):
            video = relative_to(root, Path(f"{stem}{SUFFIX}"))
            if not text_file.is_file():
                gathering.problem(f"there is no transcript {text_file}", line_number)
                continue
            text, words = parse_text(read_text(text_file))
            for utterance in _utterances(gathering, video, text, words, cut, line_number):
                gathering.add(utterance, line_number, text_path)
    return gathering.listing


def parse_text(content: str) -> tuple[str, list[Word]]:
    """Return the text of a transcript file, and its words with their times where it has a table of them.

    Raises:
        ValueError: no text, or a row of the table that is none.
    """
    lines = content.splitlines()
    if not lines or not lines[0].startswith("Text:"):
        raise ValueError("a transcript must begin with 'Text:'")
    words = []
    header = next((number for number, line in enumerate(lines) if line.split()[:3] == ["WORD", "START", "END"]), None)
    for line in lines[header + 1 :] if header is not None else []:
        if not (fields := line.split()):
            break
        try:
            words.append(Word(_bare(fields[0]), float(fields[1]), float(fields[2])))
        except (IndexError, ValueError) as error:
            raise ValueError(f"a row of the table of words must be WORD START END, got {line!r}") from error
    if any(word.end_seconds < word.start_seconds for word in words):
        raise ValueError("a word ends before it begins")
    return _bare(lines[0].removeprefix("Text:")).strip(), words


def plan_segments(words: Sequence[Word], max_seconds: float) -> list[Segment]:
    """Group words in turn, each group as long as the limit allows.

    Raises:
        ValueError: a single word is longer than the limit.
    """
    groups: list[list[Word]] = []
    for word in words:
        seconds = word.end_seconds - word.start_seconds
        if seconds > max_seconds:
            raise ValueError(f"the word {word.text!r} lasts {seconds:.2f} seconds, above {max_seconds:g}")
        if groups and word.end_seconds - groups[-1][0].start_seconds <= max_seconds:
            groups[-1].append(word)
        else:
            groups.append([word])
    return [Segment(tuple(group)) for group in groups]


def _stems(source: Path, gathering: Gathering) -> Iterator[tuple[Path, int | None]]:
    """Yield every clip's path without its suffix, and the line of the list it stands on."""
    if source.is_dir():
        for folder, folders, files in os.walk(source):
            folders.sort()
            yield from ((Path(folder) / Path(name).stem, None) for name in sorted(files) if name.endswith(SUFFIX))
        return
    subset = source.parent / ("pretrain" if source.stem.startswith("pretrain") else "main")
    for line_number, line in gathering.lines(source):
        name = (line.split() or [line])[0]  # the list of the test clips has a second column
        if problem := path_problem(name):
            gathering.problem(f"{problem}, got {name!r}", line_number)
        else:
            yield subset / name, line_number


def _utterances(
    gathering: Gathering, video: str, text: str, words: list[Word], cut: Cut | None, line_number: int | None
) -> Iterator[Utterance]:
    """Yield the clip as it is, or its pieces when it is too long."""
    name, limit = os.path.splitext(video)[0], gathering.config.max_seconds
    whole = Utterance(name, gathering.files_of(video), text)
    if limit is None or not gathering.holds(video):  # that it is not there is noted where it is taken up
        yield whole
        return
    try:
        seconds = words[-1].end_seconds if words else header_seconds("video", gathering.root / video)
        if seconds <= limit:
            yield whole
            return
        if cut is None or not words:
            hint = "`mllm data import lrs --segments` cuts it" if words else "it has no times of words to cut it by"
            raise ValueError(f"it lasts {seconds:.1f} seconds, above max_seconds {limit:g}; {hint}")
        segments = plan_segments(words, limit)
        for segment, piece in zip(segments, cut(video, whole.files.get("audio"), segments), strict=True):
            stem = os.path.splitext(piece.video)[0]
            files: dict[Medium, str] = {} if piece.audio is None else {"audio": piece.audio}
            yield Utterance(stem, {**files, "video": piece.video}, segment.text, piece.seconds)
    except ValueError as error:
        gathering.problem(f"{name}: {error}", line_number)


def _bare(text: str) -> str:
    return re.sub(r"[{}]", "", text)
