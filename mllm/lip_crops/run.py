"""Turns a folder of recordings into a folder of crops: workers, what is done already, report, manifest, contact sheet.

    out/<id>.mp4, out/<id>.wav    crop and audio, named as the recording is below the source folder
    out/prepare.jsonl             one line per recording: done, skipped or failed, and why
    out/manifest.jsonl            the clips that have a transcript, asked as asr, vsr and avsr
    out/contact_sheet.png         what the crops look like; out/sheets holds its lines
    out/prepare.log               what the libraries said

Knows folders and processes. Does not know faces or pixels.
"""

import json
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from mllm.data.manifest import Media, Message, Sample, Text, write_manifest
from mllm.data.prompts import SPEECH_PROMPTS, SPEECH_TASKS
from mllm.lip_crops.clip import ClipJob, prepare_clip, strip_path
from mllm.lip_crops.config import LipCropsConfig
from mllm.lip_crops.faces import check_installed
from mllm.lip_crops.sheet import draw_sheet
from mllm.media import path_problem
from mllm.media.containers import VIDEO_SUFFIXES
from mllm.utils.fail_points import fail_point
from mllm.utils.files import write_text_whole
from mllm.utils.progress import Progress

REPORT, MANIFEST, SHEET, LOG = "prepare.jsonl", "manifest.jsonl", "contact_sheet.png", "prepare.log"


@dataclass(frozen=True)
class Prepared:
    """What a run leaves behind.

    Attributes:
        rows: of the report, in order of the recordings.
        num_new: how many of them this run made; the others were there.
        num_samples: rows of the manifest, those of earlier runs among them.
    """

    rows: list[dict[str, Any]]
    num_new: int
    num_samples: int

    def with_status(self, status: str) -> list[dict[str, Any]]:
        """List the rows of the clips that are done, skipped or failed."""
        return [row for row in self.rows if row["status"] == status]


def prepare(settings: LipCropsConfig, *, progress: Progress | None = None) -> Prepared:
    """Prepare a recording or a folder of them.

    Args:
        settings: what, where to, and how.
        progress: called with ("clips", done, all).

    Raises:
        ImportError: MediaPipe is missing or broken.
        FileNotFoundError: there is no such source.
        ValueError: no recording in it, two that would get one name, a name that cannot stand in a manifest, or
            crops that would overwrite recordings.
        OSError: a worker ended without an answer; what is done stays done.
    """
    check_installed()
    out = Path(settings.out)
    jobs = _jobs(settings, find_recordings(Path(settings.source), out))
    out.mkdir(parents=True, exist_ok=True)
    rows = {row["id"]: row for row in _rows_of(out / REPORT)}
    _check_sources(jobs, rows, out)
    waiting = [job for job in jobs if not _is_made(job, rows.get(job.id))]
    _write_report(out / REPORT, list(rows.values()))  # an interrupted run may have left half a line
    with open(out / REPORT, "a", encoding="utf-8") as report:
        for number, (job, row) in enumerate(_work(waiting, settings.workers, out / LOG), start=1):
            fail_point("prepare.clip")
            rows[job.id] = row | _stamp(job)
            report.write(json.dumps(rows[job.id], ensure_ascii=False) + "\n")
            report.flush()
            if progress is not None:
                progress("clips", len(jobs) - len(waiting) + number, len(jobs))
    for job in jobs:
        rows[job.id]["transcript"] = transcript_of(job.path)
    # Rows of other recordings, prepared into the same folder before, stay.
    _write_report(out / REPORT, [rows[name] for name in sorted(rows)])
    samples = [sample for name in sorted(rows) for sample in _samples(rows[name])]
    write_manifest(out / MANIFEST, samples)
    _write_sheet([rows[name] for name in sorted(rows)], out, settings.sheet_clips)
    return Prepared([rows[job.id] for job in jobs], len(waiting), len(samples))


def find_recordings(source: Path, out: Path) -> list[tuple[str, Path]]:
    """List (id, file) of one recording, or of all below a folder but `out`; an id is the path without its suffix.

    Raises:
        FileNotFoundError: there is no such file or folder.
        ValueError: see `prepare`.
    """
    if not source.exists():
        raise FileNotFoundError(f"there is no file or folder {source}")
    root = source if source.is_dir() else source.parent
    if root.resolve() == out.resolve():
        raise ValueError(f"--out is the folder of the recordings, {out}: crops would overwrite them")
    files = [source] if source.is_file() else sorted(_recordings_below(source, out))
    if not files:
        raise ValueError(f"{source} holds no recording; looked for {', '.join(VIDEO_SUFFIXES)}")
    recordings: dict[str, Path] = {}
    for path in files:
        name = path.relative_to(root).with_suffix("").as_posix()
        if problem := path_problem(f"{name}.mp4"):
            raise ValueError(f"{path} cannot stand in a manifest: {problem}; rename it")
        if name in recordings:
            raise ValueError(f"{recordings[name]} and {path} would both become {name}.mp4; rename one")
        recordings[name] = path
    return list(recordings.items())


def _recordings_below(source: Path, out: Path) -> Iterator[Path]:
    outputs = out.resolve()
    for path in source.rglob("*"):
        if path.suffix.lower() in VIDEO_SUFFIXES and path.is_file() and outputs not in path.resolve().parents:
            yield path


def _jobs(settings: LipCropsConfig, recordings: Sequence[tuple[str, Path]]) -> list[ClipJob]:
    step = len(recordings) / max(1, min(settings.sheet_clips, len(recordings)))
    shown = {int(position * step) for position in range(settings.sheet_clips)}
    return [
        ClipJob(name, path, Path(settings.out), settings, number in shown)
        for number, (name, path) in enumerate(recordings)
    ]


def _work(jobs: Sequence[ClipJob], num_workers: int, log: Path) -> Iterator[tuple[ClipJob, dict[str, Any]]]:
    """Yield jobs with their rows, as they are finished.

    Always in processes of their own: MediaPipe's libraries write to the terminal, which would break a progress bar.
    """
    if not jobs:
        return
    workers = min(num_workers, len(jobs))
    pool = ProcessPoolExecutor(workers, get_context("spawn"), initializer=_say_into, initargs=(os.fspath(log),))
    futures: dict[Future[dict[str, Any]], ClipJob] = {}
    try:
        futures = {pool.submit(prepare_clip, job): job for job in jobs}
        for future in as_completed(futures):
            yield futures[future], future.result()
    except BrokenProcessPool as error:
        raise OSError(f"a worker ended without an answer, see {log}; run again to go on from what is done") from error
    finally:
        pool.shutdown(cancel_futures=True)


def _say_into(log: str) -> None:
    """Send what the libraries of this process write to the terminal into a file."""
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(descriptor, 2)
    os.close(descriptor)


def _check_sources(jobs: Sequence[ClipJob], rows: dict[str, dict[str, Any]], out: Path) -> None:
    for job in jobs:
        earlier = rows.get(job.id, {}).get("source", os.path.abspath(job.path))
        if earlier != os.path.abspath(job.path) and os.path.exists(earlier):
            raise ValueError(f"{out} already holds {job.id}.mp4, cut out of {earlier}; choose another --out")


def _rows_of(report: Path) -> list[dict[str, Any]]:
    """Read the rows of an earlier run; a last line that was cut off by its end counts as not written."""
    if not report.is_file():
        return []
    lines = report.read_text(encoding="utf-8").splitlines(keepends=True)
    try:
        return [json.loads(line) for line in lines if line.endswith("\n")]
    except json.JSONDecodeError as error:
        raise ValueError(f"{report} is not the report of an earlier run: {error}") from error


def _stamp(job: ClipJob) -> dict[str, Any]:
    """Tell whether a recording, or the way it is asked for, has changed since."""
    status = job.path.stat()
    return {"settings": job.settings.deciding, "source_bytes": status.st_size, "source_time": status.st_mtime}


def _is_made(job: ClipJob, row: dict[str, Any] | None) -> bool:
    if row is None or row["status"] == "failed" or any(row.get(key) != value for key, value in _stamp(job).items()):
        return False
    if row.get("seconds", 0.0) > job.settings.max_seconds:  # it was made when a longer one was allowed
        return False
    suffixes = [".mp4", ".wav"][: 1 + bool(row.get("audio"))] if row["status"] == "done" else []
    has_strip = not job.is_shown or job.strip.is_file()
    return has_strip and all(job.output(suffix).is_file() for suffix in suffixes)


def _write_report(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    write_text_whole(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def _samples(row: dict[str, Any]) -> Iterator[Sample]:
    """Yield the samples of a clip: one per task its files allow; none without a transcript."""
    if row["status"] != "done" or not row["transcript"]:
        return
    paths = {"audio": f"{row['id']}.wav", "video": f"{row['id']}.mp4"}
    for task, media in SPEECH_TASKS.items():
        if "audio" in media and not row["audio"]:
            continue
        prompt = (*(Media(medium, paths[medium]) for medium in media), Text(SPEECH_PROMPTS[task]))
        answer = Message("assistant", (Text(row["transcript"]),))
        yield Sample(f"{row['id']}-{task}", (Message("user", prompt), answer), task, meta={"seconds": row["seconds"]})


def transcript_of(recording: Path) -> str:
    """Read the .txt beside a recording: its line `Text:` as in LRS2 and LRS3, or else all of it; may be empty.

    Raises:
        ValueError: the file is not UTF-8.
    """
    path = recording.with_suffix(".txt")
    if not path.is_file():
        return ""
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8") from error
    labelled = [line.removeprefix("Text:") for line in lines if line.startswith("Text:")]
    return " ".join(" ".join(labelled[:1] or lines).split())


def _write_sheet(rows: Sequence[dict[str, Any]], out: Path, most: int) -> None:
    """Draw up to `most` clips that are done, then as many that are not; the sheet of an earlier run goes."""
    strips: dict[bool, list[Path]] = {True: [], False: []}
    for row in rows:
        path = strip_path(out, row["id"])
        if path.is_file():
            strips[row["status"] == "done"].append(path)
    chosen = strips[True][:most] + strips[False][:most]
    (out / SHEET).unlink(missing_ok=True)
    if chosen:
        draw_sheet(chosen).save(out / SHEET)
