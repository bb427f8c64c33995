"""Decodes a video file to an array of upright frames at the frame rate asked for.

Two decoders, PyAV and decord, give the same frames: the plan of which frames are used is made once, from the
timestamps in the file, and either decoder only carries it out. Audio is left to `audio.py`; both start at their own
first sample, so an offset between the two streams of a file is not undone.
Does not know crops or what an encoder wants (`transforms/encoder_inputs.py` does).

Shapes: T frames, H rows and W columns of a frame.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from itertools import repeat
from typing import Any, BinaryIO, Literal

import numpy as np
from packaging.version import Version

from mllm.media.animation import KINDS, TICK_SECONDS, animation_frames, is_animated
from mllm.media.containers import open_stream, stated_seconds
from mllm.media.decord_process import decord_frames
from mllm.media.errors import MediaError
from mllm.media.frame_plan import FramePlan, FrameSampling, nearest_frames
from mllm.media.frames import Upright, check_frame_size, check_length, over_limit, pyav_version, to_gray
from mllm.media.limits import (
    DEFAULT_LIMITS,
    Deadline,
    MediaFile,
    MediaLimits,
    decoding,
    guarded,
    media_name,
    open_media,
    sniff,
)
from mllm.utils.extras import install_line

Backend = Literal["pyav", "decord"]
VIDEO_CODECS = ("h264", "hevc", "mpeg4", "mpeg1video", "mpeg2video", "vp8", "vp9", "av1", "mjpeg", "prores")
_SEEK_BACK = (0, 1, 10, 100)
"""Seconds before a frame at which a key frame is looked for, one after the other."""


@dataclass(frozen=True, slots=True, eq=False)
class Video:
    """Holds frames as uint8, (T, H, W, 3) RGB or (T, H, W) grey, and how many stand for a second."""

    frames: np.ndarray
    frames_per_second: float

    @property
    def seconds(self) -> float:
        """Return the length in seconds."""
        return len(self.frames) / self.frames_per_second


def load_video(
    path: MediaFile,
    *,
    backend: Backend = "pyav",
    frames_per_second: float | FrameSampling | None = 25.0,
    gray: bool = False,
    limits: MediaLimits = DEFAULT_LIMITS,
) -> Video:
    """Read the frames of a video.

    With a rate, output k is the frame whose presentation time is nearest to k / rate seconds after the first frame
    (the earlier of two equally near ones), and there are round(seconds * rate) outputs, at least one. Timestamps
    decide, not counts, so a variable frame rate is resampled right. `frames_per_second=None` keeps the file's frames
    and reports their mean rate; a `FrameSampling` takes a few frames of the whole, and only those are kept in memory.
    Then the video may be longer than the limits, and where its container keeps timestamps with the frames (MP4,
    Matroska, WebM) only what leads to the frames that are taken is decoded.

    A rotation in the file's header is applied when it is a multiple of 90 degrees; pixels are taken as square.
    Grey is the ITU-R 601 luma. PyAV takes it from the file, which holds it as a plane of its own unless its colours are
    of another standard, and brings it to 0..255; otherwise, and by decord, it is that of the RGB frame, as Pillow's
    mode "L". The two differ by 1 where nothing has a colour, and by more where a colour is beyond RGB and was cut off.

    Raises:
        ValueError: an unknown backend, a rate that is not above 0, or fewer frames in the file than are to be taken.
        ImportError: the backend is not installed or broken.
        MediaError: missing, refused, unsupported (format, codec, no video stream), corrupt, empty, limit, deadline.
    """
    if backend not in _READERS:
        raise ValueError(f"video backend must be one of {', '.join(_READERS)}, got {backend!r}")
    if isinstance(frames_per_second, int | float) and not frames_per_second > 0:
        raise ValueError(f"frames_per_second must be above 0 or None, got {frames_per_second}")
    if backend == "decord":
        _check_decord()
    name = media_name(path)
    deadline = Deadline(name, limits.deadline_seconds)
    with open_media(path, limits.video_bytes, "video_bytes") as file:
        plan, frames = _planned(name, file, backend, frames_per_second, limits, gray, deadline)
        return Video(_gather(name, frames, plan, limits, deadline), plan.frames_per_second)


def stream_video(
    path: MediaFile, *, frames_per_second: float = 25.0, limits: MediaLimits = DEFAULT_LIMITS
) -> Iterator[np.ndarray]:
    """Yield the frames of `load_video`, (H, W, 3) uint8 RGB, one after the other and never all in memory.

    A frame that stands for several outputs is the same array each time. The deadline counts what the caller does
    between the frames as well.

    Raises:
        MediaError: as `load_video`, when the first frame is asked for or later.
    """
    name = media_name(path)
    deadline = Deadline(name, limits.deadline_seconds)
    with open_media(path, limits.video_bytes, "video_bytes") as file:
        plan, frames = _planned(name, file, "pyav", frames_per_second, limits, False, deadline)
        uses = Counter(plan.indices)
        number = -1
        for number, frame in enumerate(guarded(name, frames)):
            deadline.check()
            yield from repeat(frame, uses[number])
        if number + 1 != plan.num_frames:
            raise MediaError("corrupt", name, "the decoder found another number of frames than the file states")


def _planned(
    name: str,
    file: BinaryIO,
    backend: Backend,
    frames_per_second: float | FrameSampling | None,
    limits: MediaLimits,
    gray: bool,
    deadline: Deadline,
) -> tuple[FramePlan, Iterator[np.ndarray]]:
    """Plan which frames are used, and return those that the plan numbers: of an animated image, of a video, or those
    sought.
    """
    if (kind := _animation_kind(name, file, limits)) is not None:
        plan = _animation_plan(name, file, kind, frames_per_second, limits, deadline)
        return plan, _animation_frames(name, file, kind, limits, gray)
    plan = _plan(name, file, _CODECS[backend], frames_per_second, limits, deadline)
    file.seek(0)
    if plan.stamps is not None:
        return plan.of_used(), _sought_frames(name, file, plan.stamps, limits, gray, deadline)
    return plan, _READERS[backend](name, file, plan, limits, gray)


def _animation_kind(name: str, file: BinaryIO, limits: MediaLimits) -> str | None:
    """Say which animated image a file is; None for a video.

    Raises:
        MediaError: it is neither.
    """
    container = sniff(file)
    if container is not None and container[0] == "video":
        return None
    if container is not None and container[1] in KINDS and is_animated(name, file, container[1], limits):
        return container[1]
    raise MediaError("unsupported", name, "not an MP4, Matroska, WebM, AVI or MPEG video, nor an animated image")


def _animation_plan(
    name: str,
    file: BinaryIO,
    kind: str,
    frames_per_second: float | FrameSampling | None,
    limits: MediaLimits,
    deadline: Deadline,
) -> FramePlan:
    """Plan as `_plan` does; an animation has no timestamps that could be read without its frames."""
    is_whole = not isinstance(frames_per_second, FrameSampling)
    stamps, now = [], 0
    for frame, ticks in animation_frames(name, file, kind, limits):
        deadline.check()
        check_frame_size(name, frame.shape[1], frame.shape[0], limits)
        stamps.append((now, ticks))
        now += ticks
        if is_whole:
            check_length(name, now * TICK_SECONDS, len(stamps), limits)
    file.seek(0)
    if not stamps:
        raise MediaError("empty", name, "the file holds no video frames")
    return _plan_of(name, stamps, TICK_SECONDS, Fraction(0), frames_per_second, limits)


def _animation_frames(name: str, file: BinaryIO, kind: str, limits: MediaLimits, gray: bool) -> Iterator[np.ndarray]:
    for frame, _ in animation_frames(name, file, kind, limits):
        yield to_gray(frame) if gray else frame


def _plan(
    name: str,
    file: BinaryIO,
    codecs: Sequence[str],
    frames_per_second: float | FrameSampling | None,
    limits: MediaLimits,
    deadline: Deadline,
) -> FramePlan:
    """Read every packet's timestamp without decoding a frame: the frame count cannot be forged in a header."""
    with open_stream(name, file, "video", codecs) as (container, stream):
        check_frame_size(name, stream.codec_context.width, stream.codec_context.height, limits)
        is_whole = not isinstance(frames_per_second, FrameSampling)
        if is_whole:
            check_length(name, stated_seconds(container, stream), stream.frames, limits)
        stamps: list[tuple[int, int]] = []
        with decoding(name):
            for packet in container.demux(stream):
                deadline.check()
                if not _is_shown(packet, stream.codec_context.codec.canonical_name):
                    continue
                if packet.is_corrupt or packet.pts is None:
                    raise MediaError("corrupt", name, "the file is cut off, or a frame has no timestamp")
                stamps.append((packet.pts, packet.duration or 0))
                if is_whole and len(stamps) > limits.video_frames:
                    check_length(name, Fraction(0), len(stamps), limits)
        if not stamps:
            raise MediaError("empty", name, "the file holds no video frames")
        if len(stamps) < stream.frames and "mp4" in container.format.name:
            raise MediaError("corrupt", name, "the file holds fewer frames than its header states")
        rate = stream.average_rate or stream.guessed_rate or Fraction(25)
        plan = _plan_of(name, sorted(stamps), stream.time_base, rate, frames_per_second, limits)
        span = max(stamps)[0] - min(stamps)[0]
        is_long = len(stamps) > limits.video_frames or span * stream.time_base > limits.video_seconds
        # AVI and MPEG streams keep no timestamp with a frame that could be sought and trusted.
        if is_long and {"mp4", "matroska"} & set(container.format.name.split(",")):
            used = sorted(set(plan.indices))
            return replace(plan, stamps=tuple(sorted(stamps)[number][0] for number in used))
        return plan


def _is_shown(packet: Any, codec: str) -> bool:
    """Tell whether a packet becomes a frame: not the flush packet, nor one before an edit, nor a hidden VP8
    reference.
    """
    if packet.size == 0 or packet.is_discard:
        return False
    return codec != "vp8" or bool(bytes(packet)[0] & 0x10)


def _plan_of(
    name: str,
    stamps: list[tuple[int, int]],
    time_base: Fraction,
    mean_rate: Fraction,
    frames_per_second: float | FrameSampling | None,
    limits: MediaLimits,
) -> FramePlan:
    """Make the plan of timestamps and durations in units of `time_base`; the rate counts where the last has no
    duration.
    """
    times = [time - stamps[0][0] for time, _ in stamps]
    # A video ends when its last frame does, not when that begins: 25 frames at 25 per second last 1 s and not 0.96 s.
    span = (times[-1] + (stamps[-1][1] or 1 / (mean_rate * time_base))) * time_base
    if isinstance(frames_per_second, FrameSampling):
        return frames_per_second.plan(name, times, span, time_base)
    check_length(name, span, len(times), limits)
    if frames_per_second is None:
        return FramePlan(len(times), tuple(range(len(times))), float(len(times) / span))
    rate = Fraction(frames_per_second)
    count = max(1, round(span * rate))
    check_length(name, Fraction(0), count, limits)
    return FramePlan(len(times), nearest_frames(times, count, 1 / (rate * time_base)), frames_per_second)


def _pyav_frames(name: str, file: BinaryIO, plan: FramePlan, limits: MediaLimits, gray: bool) -> Iterator[np.ndarray]:
    """Yield every frame of the file in the order shown, (H, W, 3) or grey (H, W), turned upright; frames the plan
    leaves out as well.

    The n-th frame shown belongs to the n-th smallest timestamp. A frame's own timestamp is not used: in AVI files it
    is guessed from the order of storage and wrong for reordered frames.
    """
    upright = Upright(name, limits, gray)
    with open_stream(name, file, "video", VIDEO_CODECS, max_pixels=str(limits.video_pixels)) as (container, stream):
        for frame in container.decode(stream):
            yield upright(frame)


def _sought_frames(
    name: str, file: BinaryIO, stamps: Sequence[int], limits: MediaLimits, gray: bool, deadline: Deadline
) -> Iterator[np.ndarray]:
    """Yield the frames of these timestamps, each decoded from a key frame before it."""
    upright = Upright(name, limits, gray)
    with open_stream(name, file, "video", VIDEO_CODECS, max_pixels=str(limits.video_pixels)) as (container, stream):
        for stamp in stamps:
            frame = None
            for seconds in _SEEK_BACK:
                # A seek goes by the time of decoding, so the key frame it finds may be shown too late.
                container.seek(stamp - int(seconds / stream.time_base), stream=stream)
                frame = _first_from(container.decode(stream), stamp, deadline)
                if frame is not None and frame.pts == stamp and not frame.is_corrupt:
                    break
            if frame is None or frame.pts != stamp:
                raise MediaError("corrupt", name, "a frame cannot be found at the time the file states")
            yield upright(frame)


def _first_from(frames: Iterator[Any], stamp: int, deadline: Deadline) -> Any:
    """Return the first decoded frame that is not shown before a time, or None."""
    for frame in frames:
        deadline.check()
        if frame.pts is not None and frame.pts >= stamp:
            return frame
    return None


def _decord_frames(name: str, file: BinaryIO, plan: FramePlan, limits: MediaLimits, gray: bool) -> Iterator[np.ndarray]:
    """Yield the same frames by decord, in a process of its own, which turns them upright and has the whole file in
    memory.
    """
    for frame in decord_frames(name, file, plan.num_frames, limits.deadline_seconds):
        yield to_gray(frame) if gray else frame


def _check_decord() -> None:
    """Raise ImportError where decord is missing, broken, or beside a PyAV it cannot live with."""
    if pyav_version() < Version("18.1"):
        raise ImportError(
            f"decord beside PyAV {pyav_version()} ends the process without a word: {install_line('decord')}"
        )
    try:
        import decord  # noqa: F401
    except (ImportError, OSError) as error:
        raise ImportError(f"the video backend decord cannot be imported: {install_line('decord')}") from error


_READERS = {"pyav": _pyav_frames, "decord": _decord_frames}
_CODECS = {"pyav": VIDEO_CODECS, "decord": tuple(codec for codec in VIDEO_CODECS if codec not in ("av1", "prores"))}


def _gather(
    name: str, frames: Iterator[np.ndarray], plan: FramePlan, limits: MediaLimits, deadline: Deadline
) -> np.ndarray:
    """Put the planned frames into one array, which is allocated once, after its size has been checked."""
    gathered: np.ndarray | None = None
    number, position = -1, 0
    for number, frame in enumerate(guarded(name, frames)):
        deadline.check()
        if gathered is None:
            if frame.nbytes * len(plan.indices) > limits.video_decoded_bytes:
                raise MediaError(
                    "limit",
                    name,
                    over_limit(f"the frames take more than {limits.video_decoded_bytes} bytes", "video_decoded_bytes"),
                )
            gathered = np.empty((len(plan.indices), *frame.shape), dtype=np.uint8)
        if frame.shape != gathered.shape[1:]:
            raise MediaError("corrupt", name, "the frame size changes inside the file")
        while position < len(plan.indices) and plan.indices[position] == number:
            gathered[position] = frame
            position += 1
    if gathered is None or number + 1 != plan.num_frames:
        raise MediaError("corrupt", name, "the decoder found another number of frames than the file states")
    return gathered
