"""Turns a decoded frame of a video into an upright array of pixels.

Knows pixel layouts, colours and turned frames. Does not know files, or which frames of one are used.

Shapes: H rows and W columns of a frame.
"""

from fractions import Fraction
from typing import Any

import numpy as np
from packaging.version import Version

from mllm.media.errors import MediaError
from mllm.media.limits import MediaLimits

_LUMA_FIRST = ("yuv420p", "yuv422p", "yuv444p", "yuvj420p", "yuvj422p", "yuvj444p", "gray", "nv12")
"""Pixel layouts of 8 bits whose first plane is the brightness."""
_ITU_601 = (2, 5, 6)
"""FFmpeg's numbers of its colour matrices: none stated, which is decoded as 601, and its two names for 601."""
_FULL_RANGE = 2
_TO_FULL_RANGE = bytes(min(max(round((value - 16) * 255 / 219), 0), 255) for value in range(256))


class Upright:
    """Turns the decoded frames of one file into arrays, (H, W, 3) or grey (H, W)."""

    def __init__(self, name: str, limits: MediaLimits, gray: bool) -> None:
        from av.video.reformatter import VideoReformatter

        self.name, self.limits, self.gray = name, limits, gray
        # Before release 17 it was one thread and could not be said.
        self.options = {"threads": 1} if pyav_version() >= Version("17") else {}
        self.reformatter = VideoReformatter()  # one for all: setting it up costs far more than a small frame

    def __call__(self, frame: Any) -> np.ndarray:
        """Return the pixels of a frame; MediaError where it is too large or turned by an odd angle."""
        check_frame_size(self.name, frame.width, frame.height, self.limits)
        if frame.rotation % 90:
            raise MediaError("unsupported", self.name, "the rotation in the header is not a multiple of 90 degrees")
        shown = _luma_plane(frame) if self.gray else None
        if shown is None:
            shown = self.reformatter.reformat(frame, format="rgb24", **self.options).to_ndarray()
            shown = to_gray(shown) if self.gray else shown
        return np.rot90(shown, frame.rotation // 90) if frame.rotation else shown


def pyav_version() -> Version:
    """Return the release of PyAV, whose compiled functions have no signature to ask."""
    from av import __version__ as installed

    return Version(installed)


def _luma_plane(frame: Any) -> np.ndarray | None:
    """Return the brightness (H, W) that a frame holds beside its colours; None where it is not ITU-R 601's."""
    if frame.format.name not in _LUMA_FIRST or frame.colorspace not in _ITU_601:
        return None
    plane = frame.planes[0]
    values = np.frombuffer(plane, np.uint8).reshape(-1, plane.line_size)[: frame.height, : frame.width]
    is_full = frame.color_range == _FULL_RANGE or frame.format.name.startswith("yuvj")
    if is_full:
        return values
    return np.frombuffer(values.tobytes().translate(_TO_FULL_RANGE), np.uint8).reshape(values.shape)


def to_gray(frame: np.ndarray) -> np.ndarray:
    """Return the ITU-R 601 luma of RGB frames, (..., 3) to (...) uint8, by the integer weights of Pillow's mode "L"."""
    red, green, blue = (frame[..., channel].astype(np.uint32) for channel in range(3))
    return ((red * 19595 + green * 38470 + blue * 7471 + 0x8000) >> 16).astype(np.uint8)


def check_frame_size(name: str, width: int, height: int, limits: MediaLimits) -> None:
    """Refuse, by a MediaError, a frame without pixels or with too many."""
    if not 0 < width * height <= limits.video_pixels:
        raise MediaError(
            "limit", name, over_limit(f"a frame must have 1 to {limits.video_pixels} pixels", "video_pixels")
        )


def check_length(name: str, seconds: Fraction, frames: int, limits: MediaLimits) -> None:
    """Refuse, by a MediaError, a video that is too long, or has too many frames."""
    if seconds > limits.video_seconds:
        reason = over_limit(f"the video is longer than {limits.video_seconds:g} seconds", "video_seconds")
        raise MediaError("limit", name, reason, limit="video_seconds")
    if frames > limits.video_frames:
        raise MediaError(
            "limit", name, over_limit(f"the video has more than {limits.video_frames} frames", "video_frames")
        )


def over_limit(reason: str, key: str) -> str:
    """Return a reason with the limit that can be raised."""
    return f"{reason} (limits.{key})"
