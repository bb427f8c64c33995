"""Reads one recording: upright frames at 25 a second, and audio that begins with the first of them.

Knows files, limits and the clock that image and audio share. Does not know faces.

Shapes: L samples of audio, H rows and W columns of a frame.
"""

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

import numpy as np

from mllm.media import DEFAULT_LIMITS, MediaError, MediaLimits, load_audio, stream_video
from mllm.media.audio import AUDIO_CODECS
from mllm.media.containers import CONTAINERS, open_stream
from mllm.media.limits import decoding, open_media
from mllm.media.video import VIDEO_CODECS

FRAMES_PER_SECOND = 25
SAMPLE_RATE_HZ = 16_000
SAMPLES_PER_FRAME = SAMPLE_RATE_HZ // FRAMES_PER_SECOND

MAX_BYTES = 8 * 2**30
AUDIO_SURPLUS_SECONDS = 10
"""How much longer than its image the audio of a recording may be."""


def limits_of(max_seconds: float) -> MediaLimits:
    """Give the limits of recordings of such lengths: a camera's files are larger than crops, its slow motion has more
    frames."""
    seconds = max(max_seconds + AUDIO_SURPLUS_SECONDS, DEFAULT_LIMITS.audio_seconds)
    return MediaLimits(
        audio_bytes=MAX_BYTES,
        audio_seconds=max_seconds + AUDIO_SURPLUS_SECONDS,
        audio_samples=math.ceil(seconds * DEFAULT_LIMITS.audio_max_hz),
        video_bytes=MAX_BYTES,
        video_seconds=max_seconds,
        video_frames=math.ceil(max_seconds * 240),
        deadline_seconds=max(3600, 30 * max_seconds),
    )


@dataclass(frozen=True, slots=True, eq=False)
class AlignedAudio:
    """Audio that begins with the first frame and lasts as long as the frames.

    Attributes:
        samples: (L,) float32 at 16 kHz.
        offset_seconds: how much later than the image the audio of the file begins; negative when it is earlier.
        silent_seconds: what had to be filled with silence, at both ends together.
    """

    samples: np.ndarray
    offset_seconds: float
    silent_seconds: float


def frames_of(
    path: str | os.PathLike[str], *, max_seconds: float = DEFAULT_LIMITS.video_seconds
) -> Iterator[np.ndarray]:
    """Yield upright RGB frames (H, W, 3) at 25 a second, by the file's own timestamps.

    Raises:
        MediaError: the file cannot be used, when the first frame is asked for or later.
    """
    with _saying_max_seconds(max_seconds):
        yield from stream_video(path, frames_per_second=FRAMES_PER_SECOND, limits=limits_of(max_seconds))


def audio_of(
    path: str | os.PathLike[str], num_frames: int, *, max_seconds: float = DEFAULT_LIMITS.video_seconds
) -> AlignedAudio | None:
    """Read the audio of a recording, cut or filled so that it keeps time with `num_frames` frames; None without audio.

    Raises:
        MediaError: there is an audio stream, and it cannot be read.
    """
    if not _has_audio(path):
        return None
    offset = _first_second(path, "audio") - _first_second(path, "video")
    with _saying_max_seconds(max_seconds):
        samples = load_audio(path, SAMPLE_RATE_HZ, limits=limits_of(max_seconds)).samples
    return align(samples, float(offset), num_frames)


@contextmanager
def _saying_max_seconds(max_seconds: float) -> Iterator[None]:
    """Name the setting that a length comes from; the other limits are those of no camera."""
    try:
        yield
    except MediaError as error:
        said = {
            "video_seconds": f"the video is longer than {max_seconds:g} seconds (max_seconds)",
            "audio_seconds": f"the audio is longer than {max_seconds:g} seconds (max_seconds) and "
            f"{AUDIO_SURPLUS_SECONDS} more",
        }
        if error.limit not in said:
            raise
        raise MediaError("limit", error.path, said[error.limit], limit=error.limit) from error


def align(samples: np.ndarray, offset_seconds: float, num_frames: int) -> AlignedAudio:
    """Put audio (L,) that begins `offset_seconds` after the image beside exactly `num_frames` frames."""
    wanted = num_frames * SAMPLES_PER_FRAME
    start = round(offset_seconds * SAMPLE_RATE_HZ)
    # A late start leaves zeros before it, an early one loses what came before the image; the end likewise.
    aligned = np.zeros(wanted, dtype=np.float32)
    used = samples[max(0, -start) : max(0, wanted - start)]
    begin = min(max(0, start), wanted)
    aligned[begin : begin + len(used)] = used
    return AlignedAudio(aligned, offset_seconds, (wanted - len(used)) / SAMPLE_RATE_HZ)


def _has_audio(path: str | os.PathLike[str]) -> bool:
    import av

    options = {"format_whitelist": CONTAINERS, "protocol_whitelist": "none"}
    with (
        open_media(path, MAX_BYTES) as file,
        decoding(os.fspath(path)),
        av.open(file, options=options) as container,
    ):
        return bool(container.streams.audio)


def _first_second(path: str | os.PathLike[str], medium: Literal["audio", "video"]) -> Fraction:
    """Find when the first decoded frame of a stream is due, on the clock of the file."""
    name = os.fspath(path)
    codecs = AUDIO_CODECS if medium == "audio" else VIDEO_CODECS
    with open_media(path, MAX_BYTES) as file, open_stream(name, file, medium, codecs) as (container, stream):
        with decoding(name):
            frame = next(container.decode(stream), None)
        if frame is None:
            raise MediaError("empty", name, f"the {medium} stream holds nothing")
        return (frame.pts or 0) * (frame.time_base or stream.time_base)
