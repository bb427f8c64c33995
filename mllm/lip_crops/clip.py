"""Turns one recording into one crop, its audio and a line of the report.

Knows the order of the steps: find faces, follow one, cut it out in a second pass, write, show. Frames are never all in
memory, crops are. Does not know folders, workers or manifests.

Shapes: T frames, H rows and W columns of a frame, S side of a crop.
"""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from mllm.lip_crops.config import LipCropsConfig
from mllm.lip_crops.faces import FaceFinder
from mllm.lip_crops.geometry import MEAN_FACE_MILLIMETRES, CropPath, crop, crop_path, fraction_outside
from mllm.lip_crops.recording import FRAMES_PER_SECOND, SAMPLE_RATE_HZ, AlignedAudio, audio_of, frames_of
from mllm.lip_crops.sheet import draw_strip
from mllm.lip_crops.tracks import Track, choose, follow
from mllm.media import MediaError, to_gray, write_audio, write_video
from mllm.utils.files import written_whole

Status = Literal["done", "skipped", "failed"]
Finder = Callable[[np.ndarray], Sequence[np.ndarray]]


@dataclass(frozen=True)
class ClipJob:
    """One recording to prepare.

    Attributes:
        id: path below the source folder without its suffix; the outputs are named after it.
        path: the recording.
        out: folder of all outputs.
        settings: of the whole run.
        is_shown: whether the contact sheet wants this clip even when nothing is wrong with it.
    """

    id: str
    path: Path
    out: Path
    settings: LipCropsConfig
    is_shown: bool

    def output(self, suffix: str) -> Path:
        """Name where the crop (.mp4) or the audio (.wav) goes."""
        return self.out / f"{self.id}{suffix}"

    @property
    def strip(self) -> Path:
        """The file of this clip's part of the contact sheet."""
        return strip_path(self.out, self.id)


def strip_path(out: Path, clip_id: str) -> Path:
    """Name the file of the strip of a clip."""
    return out / "sheets" / f"{clip_id}.png"


def prepare_clip(job: ClipJob) -> dict[str, Any]:
    """Prepare one recording.

    Returns:
        Its line of the report: status "done"; "skipped" (no face that fits) or "failed" (a file that cannot be read),
        both with a reason; and what was found.

    Raises:
        ImportError: MediaPipe is missing or broken.
    """
    # What an earlier run with other settings wrote would otherwise stand beside a report that says otherwise.
    for old in (job.output(".mp4"), job.output(".wav"), job.strip):
        old.unlink(missing_ok=True)
    try:
        status, facts = _prepare(job)
    except MediaError as error:
        status, facts = "failed", {"reason": error.reason}
    return {"id": job.id, "source": os.path.abspath(job.path), "status": status, **facts}


def _prepare(job: ClipJob) -> tuple[Status, dict[str, Any]]:
    # Two passes over the file: smoothing wants the faces of later frames, and all frames do not fit into memory.
    with FaceFinder() as find:
        faces, first = _find_faces(job, find)
    tracks = follow(faces)
    track, reason = choose(tracks, job.settings.face, min_coverage=job.settings.min_face_coverage)
    if len(faces) < job.settings.min_frames:
        track, reason = None, f"{len(faces)} frames; at least {job.settings.min_frames} are asked for"
    facts = {"frames": len(faces), "seconds": len(faces) / FRAMES_PER_SECOND, **_face_facts(tracks, track)}
    if track is None:
        _show(job, first, None, np.empty(0), reason)
        return "skipped", {"reason": reason, **facts}
    split = len(MEAN_FACE_MILLIMETRES)
    path = crop_path(track.points[:, :split], track.points[:, split:])
    outside = fraction_outside(path, first.shape[1], first.shape[0])
    facts["outside_fraction"] = round(outside, 4)
    crops, middle = _cut(job, path)
    if outside > job.settings.max_outside:
        reason = f"{outside:.0%} of the crops lie beyond the border; {job.settings.max_outside:.0%} are allowed"
        _show(job, middle, path, crops, reason)
        return "skipped", {"reason": reason, **facts}
    audio = audio_of(job.path, len(crops), max_seconds=job.settings.max_seconds)
    _write(job, crops, audio)
    _show(job, middle, path, crops, f"face in {track.coverage:.0%} of {len(crops)} frames", is_used=True)
    return "done", {**facts, **_audio_facts(audio)}


def _find_faces(job: ClipJob, find: Finder) -> tuple[list[list[np.ndarray]], np.ndarray]:
    """Find the faces of every frame; return the first frame too."""
    faces: list[list[np.ndarray]] = []
    first = np.empty(0)
    for frame in frames_of(job.path, max_seconds=job.settings.max_seconds):
        first = first if faces else frame
        faces.append(list(find(frame)))
    return faces, first


def _cut(job: ClipJob, path: CropPath) -> tuple[np.ndarray, np.ndarray]:
    """Cut crops (T, S, S) gray or (T, S, S, 3) RGB; return the frame in the middle of the clip too."""
    crops, middle = [], np.empty(0)
    for number, frame in enumerate(frames_of(job.path, max_seconds=job.settings.max_seconds)):
        cut = crop(frame, path.factors[number], path.centres[number])
        crops.append(cut if job.settings.color else to_gray(cut))
        if number == len(path.factors) // 2:
            middle = frame
    return np.stack(crops), middle


def _write(job: ClipJob, crops: np.ndarray, audio: AlignedAudio | None) -> None:
    """Write outputs that appear under their names only when they are whole, the crop last."""
    job.output(".mp4").parent.mkdir(parents=True, exist_ok=True)
    if audio is not None:
        with written_whole(job.output(".wav")) as aside:
            write_audio(aside, audio.samples, SAMPLE_RATE_HZ)
    with written_whole(job.output(".mp4")) as aside:
        write_video(aside, crops, frames_per_second=FRAMES_PER_SECOND)


def _show(
    job: ClipJob, frame: np.ndarray, path: CropPath | None, crops: np.ndarray, text: str, *, is_used: bool = False
) -> None:
    """Draw a clip's strip, of one that is not used always: it is what somebody should look at."""
    if job.settings.sheet_clips and (job.is_shown or not is_used):
        middle = len(crops) // 2
        square = None if path is None else (path.factors[middle], path.centres[middle])
        job.strip.parent.mkdir(parents=True, exist_ok=True)
        draw_strip(frame, square, crops, f"{job.id}: {text}").save(job.strip)


def _face_facts(tracks: Sequence[Track], track: Track | None) -> dict[str, Any]:
    coverage = track.coverage if track else max((track.coverage for track in tracks), default=0.0)
    width = {"face_pixels": round(track.size / 2)} if track else {}
    return {"faces": len(tracks), "face_coverage": round(coverage, 4), **width}


def _audio_facts(audio: AlignedAudio | None) -> dict[str, Any]:
    if audio is None:
        return {"audio": False}
    offset, silent = round(audio.offset_seconds, 3), round(audio.silent_seconds, 3)
    return {"audio": True, "audio_offset_seconds": offset, "silent_seconds": silent}
