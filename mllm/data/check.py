"""Looks a whole manifest, or a file of another format, over in one pass and reports everything that is wrong with it.

Knows rows and files. Does not know models, so it cannot say whether a sample fits a context or an encoder's window.
"""

import os
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mllm.config.data import ReaderConfig
from mllm.data.av_pairs import clip_pairs
from mllm.data.findings import Finding
from mllm.data.guessing import naming_format, wrong_format
from mllm.data.manifest import MEDIA, Sample, scan_manifest
from mllm.data.readers import read_listing
from mllm.media import Audio, MediaError, MediaLoader, RootedPaths, Video, audio_as_long_as_video


@dataclass(frozen=True, slots=True)
class Problem:
    """Says what is wrong on one line; a line may have several, and what is about a whole file has none."""

    line_number: int | None
    message: str


@dataclass
class Report:
    """Reports what a manifest holds and what is wrong with it.

    Counts are of good rows. `seconds` are filled when media were opened, and then count every appearance of a file.
    """

    path: str
    num_rows: int = 0
    num_samples: int = 0
    media: Counter[str] = field(default_factory=Counter)
    tasks: Counter[str] = field(default_factory=Counter)
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(MEDIA, 0.0))
    problems: list[Problem] = field(default_factory=list)

    @property
    def is_good(self) -> bool:
        """Tell whether nothing is wrong and there is something to use."""
        return not self.problems and self.num_samples > 0

    def summary(self) -> str:
        """Summarize the report in a few lines for a terminal, without the problems themselves."""
        lines = [f"{self.path}: {self.num_rows} rows, {self.num_samples} good samples"]
        if self.tasks:
            lines.append("tasks: " + ", ".join(f"{task} {count}" for task, count in sorted(self.tasks.items())))
        if self.media:
            lines.append("media: " + ", ".join(self._medium(medium) for medium in MEDIA if self.media[medium]))
        bad_lines = {problem.line_number for problem in self.problems} - {None}
        where = f" on {len(bad_lines)} lines" if bad_lines else ""
        lines.append(f"problems: {len(self.problems)}{where}" if self.problems else "no problems")
        return "\n".join(lines)

    def _medium(self, medium: str) -> str:
        text = f"{medium} {self.media[medium]}"
        return f"{text} ({self.seconds[medium]:.1f} seconds)" if self.seconds[medium] else text


def check_manifest(
    path: str | os.PathLike[str],
    root: str | os.PathLike[str],
    *,
    open_media: bool,
    loader: MediaLoader | None = None,
) -> Report:
    """Check every row of a manifest, and that every file it names is a regular file under the root.

    Args:
        path: the JSONL file.
        root: folder that media paths are relative to.
        open_media: also decode every file, which takes as long as an epoch of reading does, and compare the lengths
            of audio and video of one clip.
        loader: how files are decoded, and under which limits; the default one when None.

    Raises:
        OSError: the manifest itself cannot be read; everything else is in the report.
    """
    report = Report(os.fspath(path))
    paths = RootedPaths(root)
    opener = (loader or MediaLoader()) if open_media else None
    with naming_format(path, "manifest"), open(path, "rb"):
        pass  # a folder is refused here, with the format it seems to be in, before any row is read
    for row in scan_manifest(path, root):
        report.num_rows += 1
        problems = list(row.problems)
        if row.sample is not None:
            problems = _media_problems(row.sample, paths, opener, report)
            if not problems:
                _count(row.sample, report)
        report.problems += [Problem(row.line_number, message) for message in problems]
    if not report.num_rows:
        report.problems.append(Problem(1, "the manifest holds no sample"))
    # First, since all the problems of rows below it are of one cause.
    if not report.num_samples and (hint := wrong_format(Path(path), "manifest")):
        report.problems.insert(0, Problem(None, hint))
    return report


def check_listing(
    path: str | os.PathLike[str],
    root: str | os.PathLike[str],
    reader: ReaderConfig,
    *,
    open_media: bool,
    loader: MediaLoader | None = None,
) -> Report:
    """Check a file or folder of another format as `check_manifest` does; lines are those of the file, where it has any.

    Raises:
        OSError: it cannot be read; everything else is in the report.
    """
    report = Report(os.fspath(path))
    opener = (loader or MediaLoader()) if open_media else None
    listing = read_listing(path, root, reader)
    for finding in listing.problems:
        is_of_source = finding.path == report.path
        report.problems.append(Problem(finding.line_number if is_of_source else None, _shown(finding, is_of_source)))
    report.num_rows = len(listing.samples) + sum(not finding.is_of_file for finding in listing.problems)
    roots: dict[str, RootedPaths] = {}
    for sample in listing.samples:
        paths = roots.setdefault(str(sample.root), RootedPaths(sample.root))
        problems = _media_problems(sample, paths, opener, report)
        if not problems:
            _count(sample, report)
        report.problems += [Problem(None, f"sample {sample.id!r}: {problem}") for problem in problems]
    if not report.num_rows and not report.problems:
        report.problems.append(Problem(None, "there is no sample in it"))
    return report


def _shown(finding: Finding, is_of_source: bool) -> str:
    return finding.message if is_of_source else str(finding)


def _media_problems(sample: Sample, paths: RootedPaths, opener: MediaLoader | None, report: Report) -> list[str]:
    problems, raws = [], []
    for part in sample.media:
        try:
            path = paths.resolve(part.path)
            raws.append(None if opener is None else opener(part.medium, path))
        except MediaError as error:
            problems.append(f"{part.medium} {part.path}: {error.reason} ({error.kind})")
    if opener is not None and not problems:  # lengths are compared of what could be decoded, and of nothing less
        problems += _mismatches(sample, raws, opener.max_mismatch_seconds)
    if opener is not None and not problems:
        for part, raw in zip(sample.media, raws, strict=True):
            report.seconds[part.medium] += _seconds(raw)
    return problems


def _mismatches(sample: Sample, raws: list[Any], max_mismatch_seconds: float | None) -> list[str]:
    """List audio that is not as long as the video of the same clip, and what a sample states wrongly about its
    clips.
    """
    problems: list[str] = []
    if max_mismatch_seconds is None:
        return problems
    try:
        for audio, video in clip_pairs(sample):
            path = sample.media[audio].path
            audio_as_long_as_video(raws[audio], raws[video], path=path, max_mismatch_seconds=max_mismatch_seconds)
    except MediaError as error:
        problems.append(f"audio {error.path}: {error.reason} ({error.kind})")
    except ValueError as error:
        problems.append(str(error))
    return problems


def _seconds(raw: Any) -> float:
    return raw.seconds if isinstance(raw, Audio | Video) else 0.0


def _count(sample: Sample, report: Report) -> None:
    report.num_samples += 1
    report.tasks[sample.task] += 1
    report.media.update(part.medium for part in sample.media)
