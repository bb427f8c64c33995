"""Reads a folder of one's own clips: videos with or without audio, audio files, and their transcripts.

Files of one name (but for the suffix) are one clip. A transcript is a .txt of that name, or a row of a CSV or TSV of
two columns, the clip (its path in the folder, with or without suffix) and the text, which may hold commas.

Knows names and transcripts; opens a video's header to see whether it has audio.
"""

import os
from collections.abc import Iterator
from pathlib import Path

from mllm.config.data import ReaderConfig
from mllm.data.findings import Listing
from mllm.data.source_files import read_text, relative_to
from mllm.data.speech.utterances import Gathering, Utterance, unquoted
from mllm.media.containers import AUDIO_SUFFIXES, VIDEO_SUFFIXES
from mllm.media.headers import has_audio


def read_clips(source: Path, root: Path, config: ReaderConfig) -> Listing:
    """Read a folder of clips; those without a transcript are listed, by their paths relative to the root.

    Raises:
        ValueError: the folder is not under the root, or there is no clip in it.
        NotADirectoryError: no such folder.
        OSError: the table of transcripts cannot be read.
    """
    if not source.is_dir():
        raise NotADirectoryError(f"{source} is no folder of clips")
    relative_to(root, source)
    gathering = Gathering(source, root, config)
    clips = _clips(source)
    if not clips:
        raise ValueError(f"{source} holds no clip; those end in {', '.join(VIDEO_SUFFIXES + AUDIO_SUFFIXES)}")
    table = _Table(gathering, clips, None if config.transcripts is None else Path(config.transcripts))
    for name, files in clips.items():
        text_file = source / f"{name}.txt"
        path, line_number = table.location_of(name, text_file)
        with gathering.listing.noting(path or source, line_number, name):
            text = table.text_of(name, text_file)
            if text is None:
                gathering.listing.untranscribed += [relative_to(root, source / file) for file in files]
                continue
            media = _media_of(files, source, root)
            clip = Utterance(relative_to(root, source / name), media, text)  # type: ignore[arg-type]
            gathering.add(clip, line_number, path)
    return gathering.listing


def _clips(source: Path) -> dict[str, list[str]]:
    """Return the files of each clip, by its name, relative to the folder; sorted."""
    clips: dict[str, list[str]] = {}
    for folder, folders, files in os.walk(source):
        folders.sort()
        for name in sorted(files):
            stem, suffix = os.path.splitext(os.path.relpath(os.path.join(folder, name), source))
            if suffix.lower() in VIDEO_SUFFIXES + AUDIO_SUFFIXES:
                clips.setdefault(Path(stem).as_posix(), []).append(Path(stem + suffix).as_posix())
    return clips


def _media_of(files: list[str], source: Path, root: Path) -> dict[str, str]:
    videos = [file for file in files if file.lower().endswith(VIDEO_SUFFIXES)]
    audios = [file for file in files if file.lower().endswith(AUDIO_SUFFIXES)]
    for kind, paths in (("video files", videos), ("audio files", audios)):
        if len(paths) > 1:
            raise ValueError(f"there are several {kind} of this name: {', '.join(paths)}")
    if videos and not audios and has_audio(source / videos[0]):
        audios = videos
    by_medium = {"audio": audios, "video": videos}
    return {medium: relative_to(root, source / paths[0]) for medium, paths in by_medium.items() if paths}


class _Table:
    """Holds the transcripts of a table, and where each stands; rows that fit no clip are noted at once."""

    def __init__(self, gathering: Gathering, clips: dict[str, list[str]], path: Path | None) -> None:
        self.path = path
        self.rows: dict[str, tuple[str, int]] = {}
        for line_number, key, text in _rows(gathering, path):
            name = key if key in clips else os.path.splitext(key)[0]
            if name not in clips:
                gathering.problem(f"there is no clip {key!r} in {gathering.source}", line_number, path)
            elif name in self.rows:
                gathering.problem(f"the clip {key!r} has a transcript on line {self.rows[name][1]}", line_number, path)
            else:
                self.rows[name] = (text, line_number)

    def location_of(self, name: str, file: Path) -> tuple[Path | None, int | None]:
        """Say where the transcript of a clip stands: in the table or else the file."""
        return (self.path, self.rows[name][1]) if name in self.rows else (file, None)

    def text_of(self, name: str, file: Path) -> str | None:
        """Return the transcript of a clip, where there is one."""
        if name in self.rows:
            return self.rows[name][0]
        return read_text(file) if file.is_file() else None


def _rows(gathering: Gathering, path: Path | None) -> Iterator[tuple[int, str, str]]:
    if path is None:
        return
    separator = "\t" if path.suffix.lower() == ".tsv" else ","
    for line_number, line in gathering.lines(path):
        key, tab, text = line.partition(separator)
        if not tab:
            gathering.problem("a row must be clip and transcript, in two columns", line_number, path)
            continue
        yield line_number, unquoted(key).strip(), unquoted(text)
