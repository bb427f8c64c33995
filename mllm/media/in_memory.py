"""Decodes media that callers hold in memory (bytes, images, arrays) to what the loaders give for files.

    image    path, bytes, open file, data: URL, PIL image, or uint8 array (H, W), (H, W, 1 | 3 | 4), (1 | 3 | 4, H, W)
    audio      path, bytes, open file, data: URL, `Audio`, or array (L,), of float -1..1 or of whole numbers
    video      path, bytes, open file, data: URL, `Video`, PIL images, or uint8 array (T, H, W) or (T, H, W, 3)

Audio may come with its rate, as (array, 44100) or {"array": array, "sampling_rate": 44100}, and a video as
(array, 30.0) with its frames per second. An array alone is at 16 kHz, or at 25 frames per second.

Knows forms. Does not know decoders, samples or encoders.
"""

import base64
import binascii
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from mllm.media.audio import Audio, resample
from mllm.media.frame_plan import FrameSampling, nearest_frames
from mllm.media.image import MODES, to_rgb
from mllm.media.loader import MediaLoader, Raw
from mllm.media.video import Video, to_gray

USUAL_RATES = {"audio": 16_000, "video": 25.0}
"""Samples and frames per second of an array that comes without its rate."""
CHANNELS = (1, 3, 4)
MediaInput = Any
"""One of the forms above; see `items_of` and `decode_in_memory`."""


@dataclass(frozen=True, slots=True, eq=False)
class InMemoryMedium:
    """Holds one medium that is not named by a path, as its caller has it."""

    medium: str
    value: MediaInput

    @property
    def kind(self) -> str:
        """Say what it is called in messages."""
        return "bytes" if isinstance(self.value, bytes) else type(self.value).__name__


def items_of(medium: str, media: Any) -> list[MediaInput]:
    """List the items of what a caller has of a medium: None, one item, or several.

    Raises:
        ValueError: none of the forms that are read.
    """
    if media is None:
        return []
    if _is_one(medium, media):
        return [media]
    if isinstance(media, Sequence) or _is_array(media):
        items = list(media)
        if medium == "video" and items and all(isinstance(item, Image.Image) for item in items):
            return [items]
        return items
    raise ValueError(f"{medium} is {_named(media)}; {_allowed(medium)}")


def path_of(medium: str, item: MediaInput) -> str | None:
    """Return the path that one item is, or None where it is not named by one.

    Raises:
        ValueError: an address on the network, which is not fetched.
    """
    if isinstance(item, str):
        if item.startswith("data:"):
            return None
        scheme, colon, rest = item.partition("://")
        if colon and scheme.isalnum():
            if scheme == "file":
                return rest
            raise ValueError(f"{medium} is {item!r}; nothing is fetched from the network, give a file or its bytes")
        return item
    return os.fspath(item) if isinstance(item, os.PathLike) else None


def is_file(item: MediaInput) -> bool:
    """Tell whether one item is a file, by name or as bytes, which may hold audio beside frames."""
    return isinstance(item, str | os.PathLike | bytes | bytearray | memoryview) or hasattr(item, "read")


def decode_in_memory(item: InMemoryMedium, loader: MediaLoader, sampling: FrameSampling | None = None) -> Raw:
    """Decode one item that is not named by a path, as the loader decodes a file of the same contents.

    Args:
        sampling: of a video whose frames are images; those frames are taken, in colour.

    Returns:
        An RGB image, audio at the loader's rate, or frames at the loader's rate or of the sampling.

    Raises:
        ValueError: none of the forms that are read, or a shape or type that has no one meaning.
        MediaError: bytes that cannot be used.
    """
    value = _encoded(item.value)
    if isinstance(value, bytes):
        return loader(item.medium, value) if sampling is None else loader.frames(value, sampling)
    if item.medium == "image":
        return _image(value)
    if item.medium == "audio":
        audio = _audio(value)
        samples = resample(audio.samples, audio.sample_rate_hz, loader.sample_rate_hz)
        return Audio(samples, loader.sample_rate_hz)
    return _at_rate(_video(value), loader, sampling)


def _encoded(value: MediaInput) -> MediaInput:
    """Return the bytes of a file where the value is one, and any other value as it is."""
    if isinstance(value, str):
        head, _, body = value.partition(",")
        if not head.endswith(";base64"):
            raise ValueError(f"a data: URL must be base64, got {head[:60]!r}")
        try:
            return base64.b64decode(body, validate=True)
        except binascii.Error as error:
            raise ValueError(f"the base64 of a data: URL cannot be read: {error}") from error
    if isinstance(value, bytearray | memoryview):
        return bytes(value)
    if hasattr(value, "read") and not isinstance(value, Image.Image):
        if value.seekable():  # the audio and the frames of one file are read one after the other
            value.seek(0)
        read = value.read()
        if not isinstance(read, bytes):
            raise ValueError("an open file must be opened for reading bytes (mode 'rb')")
        return read
    return value


def _is_one(medium: str, media: Any) -> bool:
    """Tell whether something is one item and not several."""
    single = (str, os.PathLike, bytes, bytearray, memoryview, Image.Image, Audio, Video, Mapping, InMemoryMedium)
    if isinstance(media, single) or hasattr(media, "read"):
        return True
    if _is_array(media):
        return media.ndim <= {"image": 3, "audio": 2, "video": 4}[medium]
    return _is_timed(media)


def _is_array(media: Any) -> bool:
    return hasattr(media, "__array__") and hasattr(media, "ndim") and not isinstance(media, Image.Image)


def _is_timed(media: Any) -> bool:
    """Tell whether something is an array and its rate."""
    return isinstance(media, tuple) and len(media) == 2 and isinstance(media[1], int | float)


def _array(value: Any) -> np.ndarray:
    return value.detach().cpu().numpy() if hasattr(value, "detach") else np.asarray(value)


def _image(value: MediaInput) -> Image.Image:
    if isinstance(value, Image.Image):
        if value.mode not in MODES:
            raise ValueError(f"an image has pixels of the kind {value.mode}; allowed are {', '.join(MODES)}")
        return to_rgb(ImageOps.exif_transpose(value))
    if not _is_array(value):
        raise ValueError(f"image is {_named(value)}; {_allowed('image')}")
    pixels = _array(value)
    if pixels.dtype != np.uint8:
        raise ValueError(f"an image given as an array must be uint8 (0 to 255), got {pixels.dtype}")
    if pixels.ndim == 3 and pixels.shape[-1] not in CHANNELS and pixels.shape[0] in CHANNELS:
        pixels = pixels.transpose(1, 2, 0)
    if not (pixels.ndim == 2 or (pixels.ndim == 3 and pixels.shape[-1] in CHANNELS)) or not pixels.size:
        raise ValueError(f"an image given as an array has shape {pixels.shape}; {_allowed('image')}")
    return to_rgb(Image.fromarray(pixels.squeeze(-1) if pixels.shape[-1:] == (1,) else pixels))


def _audio(value: MediaInput) -> Audio:
    if isinstance(value, Audio):
        return value
    rate: Any = USUAL_RATES["audio"]
    if isinstance(value, Mapping):
        if not {"array", "sampling_rate"} <= value.keys():
            raise ValueError(f"audio given as a dict must hold array and sampling_rate, got {', '.join(value)}")
        value, rate = value["array"], value["sampling_rate"]
    elif _is_timed(value):
        value, rate = value
    if not _is_array(value):
        raise ValueError(f"audio is {_named(value)}; {_allowed('audio')}")
    samples = _array(value)
    if samples.ndim == 2 and 1 in samples.shape:
        samples = samples.reshape(-1)
    if samples.ndim != 1 or not samples.size:
        raise ValueError(f"audio given as an array has shape {samples.shape}; it must be one channel, (L,)")
    if rate <= 0 or rate != int(rate):
        raise ValueError(f"the rate of audio must be a whole number above 0, got {rate}")
    return Audio(_as_float(samples), int(rate))


def _as_float(samples: np.ndarray) -> np.ndarray:
    """Return samples as float32 within -1..1, whole numbers divided by what their type holds, as a WAV file's are."""
    # By the type's lowest value, not its highest, so that full scale is exactly -1 as WAV readers have it.
    if samples.dtype in (np.int16, np.int32):
        return (samples / float(-np.iinfo(samples.dtype).min)).astype(np.float32)
    if not np.issubdtype(samples.dtype, np.floating):
        raise ValueError(f"audio given as an array must be float, int16 or int32, got {samples.dtype}")
    if not np.isfinite(samples).all():
        raise ValueError("the samples of audio given as an array are not all finite numbers")
    return samples.astype(np.float32)


def _video(value: MediaInput) -> Video:
    if isinstance(value, Video):
        return value
    rate: Any = USUAL_RATES["video"]
    if _is_timed(value):
        value, rate = value
    if isinstance(value, Sequence) and value and all(isinstance(frame, Image.Image) for frame in value):
        if len(sizes := {frame.size for frame in value}) > 1:
            raise ValueError(f"the frames of a video must be of one size, got {sorted(sizes)}")
        value = np.stack([np.asarray(to_rgb(frame)) for frame in value])
    if not _is_array(value):
        raise ValueError(f"video is {_named(value)}; {_allowed('video')}")
    frames = _array(value)
    # (T, 3, H, W) of torch; frames that are 3 wide as well are taken as (T, H, W, 3).
    if frames.ndim == 4 and frames.shape[1] == 3 and frames.shape[-1] != 3:
        frames = frames.transpose(0, 2, 3, 1)
    # Three axes that end in colours are an image, which would pass for grey frames of a few columns.
    is_video = frames.shape[-1] not in CHANNELS if frames.ndim == 3 else frames.ndim == 4 and frames.shape[-1] == 3
    if frames.dtype != np.uint8 or not is_video or not frames.size:
        raise ValueError(f"a video given as an array has shape {frames.shape} of {frames.dtype}; {_allowed('video')}")
    if rate <= 0:
        raise ValueError(f"the rate of a video must be above 0 frames per second, got {rate}")
    return Video(frames, float(rate))


def _at_rate(video: Video, loader: MediaLoader, sampling: FrameSampling | None) -> Video:
    """Bring a video to the colours and times that the loader takes of a file."""
    frames, rate = video.frames, Fraction(video.frames_per_second)
    wanted = loader.frames_per_second
    if sampling is not None:
        plan = sampling.plan("the video", range(len(frames)), len(frames) / rate, 1 / rate)
        frames, rate = frames[list(plan.indices)], plan.frames_per_second
    elif wanted is not None and rate != Fraction(wanted):
        step = rate / Fraction(wanted)
        count = max(1, round(len(frames) / step))
        frames = frames[list(nearest_frames(range(len(frames)), count, step))]
        rate = wanted
    if sampling is None and loader.gray and frames.ndim == 4:
        frames = to_gray(frames)
    if frames.ndim == 3 and (sampling is not None or not loader.gray):
        frames = np.repeat(frames[..., None], 3, axis=-1)
    return Video(frames, float(rate))


def _named(value: object) -> str:
    return f"{value!r}" if isinstance(value, int | float | bool) else f"a {type(value).__name__}"


def _allowed(medium: str) -> str:
    return {
        "image": "allowed are a path, bytes, a PIL image, or a uint8 array (H, W), (H, W, 3) or (H, W, 4)",
        "audio": "allowed are a path, bytes, an array (L,) at 16 kHz, or (array, samples per second)",
        "video": "allowed are a path, bytes, PIL images, a uint8 array (T, H, W, 3) or (T, H, W) at 25 frames per "
        "second, or (array, frames per second)",
    }[medium]
