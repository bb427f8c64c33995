"""Cuts a clip into segments: a video without audio and an audio file beside it, of exactly the same length.

Knows clips and times. Does not know transcripts' formats or manifests.
"""

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from mllm.data.speech.lrs import Piece, Segment
from mllm.data.speech.utterances import FRAMES_PER_SECOND
from mllm.media import load_audio, load_video, resolve_media, write_audio, write_video
from mllm.utils.files import written_whole

SAMPLE_RATE_HZ = 16_000


class Cutter:
    """Writes segments below a folder under the root, at 25 frames per second and 16 kHz.

    A piece begins at the frame nearest to the segment's start and ends at the one nearest to its end; 640 samples
    belong to each frame. Images are encoded once more (H.264, about one grey level of error).

    Args:
        root: what paths are relative to.
        folder: where pieces go, relative to the root.
    """

    def __init__(self, root: Path, folder: str) -> None:
        self.root = root
        self.folder = folder

    def __call__(self, video: str, audio: str | None, segments: Sequence[Segment]) -> list[Piece]:
        """Cut one clip; without audio its pieces have none either.

        Raises:
            MediaError: it cannot be read.
            ValueError: a segment without a frame, or images with odd sides.
        """
        frames = load_video(resolve_media(self.root, video), frames_per_second=FRAMES_PER_SECOND).frames
        samples = None if audio is None else load_audio(resolve_media(self.root, audio), SAMPLE_RATE_HZ).samples
        stem = f"{self.folder}/{os.path.splitext(video)[0]}"
        return [
            self._write(f"{stem}_{number:03d}", segment, frames, samples) for number, segment in enumerate(segments)
        ]

    def _write(self, stem: str, segment: Segment, frames: np.ndarray, samples: np.ndarray | None) -> Piece:
        first, last = (round(time * FRAMES_PER_SECOND) for time in (segment.start_seconds, segment.end_seconds))
        last = min(last, len(frames))
        if first >= last:
            raise ValueError(f"the clip has {len(frames)} frames, none of them from {segment.start_seconds} seconds on")
        target = self.root / stem
        target.parent.mkdir(parents=True, exist_ok=True)
        per_frame = SAMPLE_RATE_HZ // FRAMES_PER_SECOND
        # A manifest of an earlier import may list the same pieces, which are there all the while.
        with written_whole(target.with_name(f"{target.name}.mp4")) as aside:
            write_video(aside, frames[first:last])
        if samples is not None:
            with written_whole(target.with_name(f"{target.name}.wav")) as aside:
                write_audio(aside, samples[first * per_frame : last * per_frame])
        audio = None if samples is None else f"{stem}.wav"
        return Piece(f"{stem}.mp4", audio, (last - first) / FRAMES_PER_SECOND)
