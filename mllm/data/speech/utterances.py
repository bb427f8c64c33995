"""Turns speech clips into samples: one per clip and task, asked in the words of the published systems.

    asr   the audio     "Transcribe speech to text."
    vsr   the video     "Transcribe video to text."
    avsr  both          "Transcribe speech and video to text."

Knows tasks, prompts, forms of text and which files are there. Does not know formats (the readers do) or decode media.
"""

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path

from mllm.config.data import ReaderConfig
from mllm.data.findings import Finding, Listing
from mllm.data.json_lines import numbered_lines, text_of
from mllm.data.manifest import Media, Medium, Message, Sample, Text
from mllm.data.prompts import SPEECH_PROMPTS, SPEECH_TASKS
from mllm.data.text_forms import TEXT_FORMS
from mllm.media import MediaError, RootedPaths, path_problem
from mllm.media.containers import AUDIO_SUFFIXES
from mllm.media.headers import has_audio

FRAMES_PER_SECOND = 25
"""Of the videos that the lists of the published systems count frames of."""


@dataclass(frozen=True, slots=True)
class Utterance:
    """Holds one clip: its name, its files relative to the root by medium, and what is said."""

    name: str
    files: Mapping[Medium, str]
    text: str
    seconds: float | None = None


class Gathering:
    """Makes a `Listing` of utterances as a reader comes upon them.

    Args:
        source: the list or folder that is read, for messages.
        root: folder that media paths are relative to and cannot leave.
        config: tasks, prompts, form of text.
    """

    def __init__(self, source: Path, root: Path, config: ReaderConfig) -> None:
        self.source = source
        self.root = root
        self.config = config
        self.listing = Listing()
        self._paths = RootedPaths(root)
        self._named_at: dict[str, str] = {}

    def problem(self, message: str, line_number: int | None = None, path: Path | None = None) -> None:
        """Note something that cannot be used."""
        self.listing.note(path or self.source, line_number, message)

    def row(self, line_number: int | None = None, path: Path | None = None) -> AbstractContextManager[None]:
        """Make a finding of whatever an odd row raises inside the block; see `Listing.noting`."""
        return self.listing.noting(path or self.source, line_number)

    def lines(self, path: Path) -> Iterator[tuple[int, str]]:
        """Yield the lines of a file that are not blank, without their ends, numbered from 1; what is not UTF-8, or
        longer than any row, is noted.

        Raises:
            OSError: the file cannot be read.
        """
        yield from ((number, text) for number, text in self.lines_and_gaps(path) if text is not None)

    def lines_and_gaps(self, path: Path) -> Iterator[tuple[int, str | None]]:
        """Yield as `lines` does, with None for a line that was noted, where lines are counted."""
        for line_number, line in numbered_lines(path):
            text = None
            with self.row(line_number, path):
                text = text_of(line).rstrip("\r\n")
            yield line_number, text

    def holds(self, relative: str) -> bool:
        """Tell whether there is such a file under the root."""
        try:
            self._paths.resolve(relative)
        except MediaError:
            return False
        return True

    def files_of(self, video: str) -> dict[Medium, str]:
        """Name the files of a clip by medium: its audio is the file beside the video, or the video's own if it has one.

        The header of a video that has no audio file beside it is looked at, unless only video is asked for. One that is
        not there is taken to have audio, so that both media are said to be missing.
        """
        stem = os.path.splitext(video)[0]
        beside = next((stem + suffix for suffix in AUDIO_SUFFIXES if self.holds(stem + suffix)), None)
        if beside is not None:
            return {"audio": beside, "video": video}
        hears = not self.config.tasks or any("audio" in SPEECH_TASKS[task] for task in self.config.tasks)
        if hears and self.holds(video) and not has_audio(Path(self._paths.resolve(video))):
            return {"video": video}
        return {"audio": video, "video": video}

    def add(self, utterance: Utterance, line_number: int | None = None, path: Path | None = None) -> None:
        """Take up an utterance, or note what is wrong with it, at the line and path it was read from."""
        location = Finding(os.fspath(path or self.source), line_number, "")
        text = TEXT_FORMS[self.config.text](utterance.text)
        tasks = self.config.tasks or [
            task for task, media in SPEECH_TASKS.items() if set(media) <= set(utterance.files)
        ]
        problems = [*_problems_of(utterance, text), *_lacking(utterance, tasks)]
        if utterance.name in self._named_at:
            problems.append(f"the clip {utterance.name!r} was already named at {self._named_at[utterance.name]}")
        missing = {} if problems else self._missing(utterance, problems)  # which may add to the problems
        for message in problems:
            self.listing.note(location.path, line_number, message)
        if problems:
            return
        self._named_at[utterance.name] = str(location).removesuffix(": ")
        # Samples whose files are not there are kept: lists are often read before the media arrive.
        self.listing.missing += [replace(location, message=message) for message in missing.values()]
        for task in tasks:
            sample = self._sample(utterance, task, text)
            self.listing.samples.append(sample)
            if missing.keys() & set(SPEECH_TASKS[task]):
                self.listing.incomplete.add(sample.id)

    def _missing(self, utterance: Utterance, problems: list[str]) -> dict[Medium, str]:
        """Return the media whose files are not there; files that are refused for another reason become problems."""
        missing: dict[Medium, str] = {}
        for medium, file in utterance.files.items():
            try:
                self._paths.resolve(file)
            except MediaError as error:
                message = f"{medium} {file}: {error.reason} {os.fspath(self.root)}"
                if error.kind == "missing":
                    missing[medium] = message
                else:
                    problems.append(message)
        return missing

    def _sample(self, utterance: Utterance, task: str, text: str) -> Sample:
        media = tuple(Media(medium, utterance.files[medium]) for medium in SPEECH_TASKS[task])
        prompt = dict(self.config.prompts).get(task, SPEECH_PROMPTS[task])  # type: ignore[call-overload]
        messages = (Message("user", (*media, Text(prompt))), Message("assistant", (Text(text),)))
        meta = {} if utterance.seconds is None else {"seconds": round(utterance.seconds, 3)}
        return Sample(f"{utterance.name}-{task}", messages, task, meta=meta, root=self.root)


def _lacking(utterance: Utterance, tasks: Sequence[str]) -> Iterator[str]:
    for task in tasks:
        if lacking := [medium for medium in SPEECH_TASKS[task] if medium not in utterance.files]:
            yield f"{utterance.name}: there is no {' and no '.join(lacking)} for the task {task}"


def _problems_of(utterance: Utterance, text: str) -> Iterator[str]:
    for medium, file in utterance.files.items():
        if problem := path_problem(file):
            yield f"{medium} {file!r}: {problem}"
    if not utterance.name.strip() or not utterance.name.isprintable():
        yield f"the clip's name must be printable and not empty, got {utterance.name!r}"
    if not text:
        yield f"{utterance.name}: the transcript is empty"
    if "\0" in text:
        yield f"{utterance.name}: the transcript holds the character NUL"


def unquoted(text: str) -> str:
    """Return a field without the quotes around it, where it stands in quotes as a whole."""
    bare = text.strip()
    return bare[1:-1].replace('""', '"') if re.fullmatch(r'"(?:[^"]|"")*"', bare) else text
