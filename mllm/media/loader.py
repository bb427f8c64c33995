"""Reads every medium by one call: a file to a raw image, audio or video.

Knows which function reads which medium. Does not know manifests or encoders.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

from PIL import Image

from mllm.media.audio import Audio, load_audio
from mllm.media.av_sync import MAX_MISMATCH_SECONDS
from mllm.media.image import load_image
from mllm.media.limits import DEFAULT_LIMITS, MediaFile, MediaLimits
from mllm.media.video import Backend, FrameSampling, Video, load_video

Raw = Image.Image | Audio | Video


class Reader(Protocol):
    """Reads any medium of a sample; `MediaLoader` from its file."""

    @property
    def max_mismatch_seconds(self) -> float | None:
        """Say how far apart the lengths of a clip's audio and video may be; None never compares."""
        ...

    def __call__(self, medium: str, path: MediaFile) -> Raw:
        """Read the whole of a medium."""
        ...

    def frames(self, path: MediaFile, sampling: FrameSampling) -> Video:
        """Read a few frames of a video, in colour."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class MediaLoader:
    """Reads any medium the way one model wants it; small and picklable, so it travels to data loader workers."""

    sample_rate_hz: int = 16_000
    """The rate that audio is resampled to."""
    frames_per_second: float | None = 25.0
    """The rate that video is resampled to; None keeps the file's frames."""
    gray: bool = False
    """Whether video frames are grey (lip encoders) or RGB."""
    backend: Backend = "pyav"
    """The decoder that reads videos."""
    max_mismatch_seconds: float | None = MAX_MISMATCH_SECONDS
    """How far apart the lengths of a clip's audio and video may be, for whoever loads both; None never compares."""
    limits: MediaLimits = DEFAULT_LIMITS
    """What is refused."""

    def __call__(self, medium: str, path: MediaFile) -> Raw:
        """Read one file.

        Raises:
            ValueError: an unknown medium.
            MediaError: the file cannot be used.
        """
        if medium == "image":
            return load_image(path, limits=self.limits)
        if medium == "audio":
            return load_audio(path, self.sample_rate_hz, limits=self.limits)
        if medium == "video":
            return load_video(
                path,
                backend=self.backend,
                frames_per_second=self.frames_per_second,
                gray=self.gray,
                limits=self.limits,
            )
        raise ValueError(f"medium must be one of image, audio, video, got {medium!r}")

    def frames(self, path: MediaFile, sampling: FrameSampling) -> Video:
        """Read a few frames of a video, in colour.

        Raises:
            MediaError: the file cannot be used.
            ValueError: it has fewer frames than are to be taken.
        """
        return load_video(path, backend=self.backend, frames_per_second=sampling, limits=self.limits)


class RememberingLoader:
    """Keeps the last files that a loader has read, for whoever reads one file several times in a row.

    Args:
        loader: reads what is not remembered.
        size: how many files are.
    """

    def __init__(self, loader: MediaLoader, size: int) -> None:
        self.max_mismatch_seconds = loader.max_mismatch_seconds
        self._read: Callable[[str, MediaFile], Raw] = lru_cache(size)(loader)
        self.frames = lru_cache(size)(loader.frames)

    def __call__(self, medium: str, path: MediaFile) -> Raw:
        """Read as `MediaLoader` does; what comes is shared and must not be changed in place."""
        return self._read(medium, path)
