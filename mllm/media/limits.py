"""Says how large a media file may be, and opens files and tells them apart before any decoder sees them.

Every limit is enforced twice: from what the header claims, and again by counting while decoding, since headers lie.
Knows bytes, signatures and numbers. Does not decode.
"""

import hashlib
import io
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import BinaryIO, Literal, TypeVar

from mllm.media.errors import MediaError, too_many_bytes
from mllm.media.packed import packed_bytes, packed_location
from mllm.media.regular import open_regular
from mllm.utils.files import digest_of_file

Container = Literal["image", "audio", "video"]
Item = TypeVar("Item")


@dataclass(frozen=True, kw_only=True)
class MediaLimits:
    """Holds the limits of media files: what is above one is refused, whoever asks. Raise a limit for your own files,
    lower it for strangers'.

    The defaults stop files of a few kilobytes that unpack to gigabytes; LRS3 and VQA material is far below them,
    except that a few LRS3 pretraining clips are minutes long.
    """

    image_bytes: int = 20 * 2**20
    """The largest image file that is read."""
    image_pixels: int = 40_000_000
    """The largest width x height of an image that is read."""
    audio_bytes: int = 128 * 2**20
    """The largest audio file that is read, and the largest video file that is read for its audio."""
    audio_seconds: float = 600.0
    """The longest audio that is read."""
    audio_samples: int = 32 * 2**20
    """The most samples of one channel that are read, at the file's own rate (64 MiB of 16-bit PCM)."""
    audio_channels: int = 8
    """The most channels that an audio file may have."""
    audio_min_hz: int = 8_000
    """The lowest sample rate that is read; below it there is no speech band left."""
    audio_max_hz: int = 192_000
    """The highest sample rate that is read."""
    video_bytes: int = 256 * 2**20
    """The largest video file that is read."""
    video_seconds: float = 120.0
    """The longest video that is read; one of which only a few frames are taken may be longer."""
    video_pixels: int = 3840 * 2160
    """The largest width x height that a video frame may have."""
    video_frames: int = 3_000
    """The most frames that are read, in the file and after resampling; a file of which only a few are taken may have
    more.
    """
    video_decoded_bytes: int = 256 * 2**20
    """The largest array that decoded frames may fill."""
    deadline_seconds: float = 20.0
    """The longest time that one file may take to decode; it is checked between frames and blocks, never inside a
    decoder call.
    """

    def __post_init__(self) -> None:
        for name in (field.name for field in fields(self)):
            if not getattr(self, name) > 0:
                raise ValueError(f"limits.{name} must be above 0, got {getattr(self, name)!r}")

    @classmethod
    def of(cls, values: "MediaLimits | Mapping[str, float] | None") -> "MediaLimits":
        """Return limits as they are, or the defaults with some of them changed, by name.

        Raises:
            ValueError: a name that is none, or a value that is not above 0.
        """
        if isinstance(values, MediaLimits):
            return values
        names = [field.name for field in fields(cls)]
        if unknown := [name for name in values or {} if name not in names]:
            raise ValueError(f"limits.{unknown[0]} is no limit; allowed: {', '.join(names)}")
        return cls(**(values or {}))  # type: ignore[arg-type]


DEFAULT_LIMITS = MediaLimits()


class Deadline:
    """Raises once a file has taken longer than `seconds` since the start of its decoding."""

    def __init__(self, path: str, seconds: float) -> None:
        self.path = path
        self.seconds = seconds
        self.end = time.monotonic() + seconds

    def check(self) -> None:
        """Raise MediaError("deadline") when the time is up."""
        if time.monotonic() > self.end:
            reason = f"decoding took longer than {self.seconds:g} seconds (limits.deadline_seconds)"
            raise MediaError("deadline", self.path, reason)


MediaFile = str | os.PathLike[str] | bytes
"""A media file: its path, or what it holds."""


def media_name(file: MediaFile) -> str:
    """Return what a media file is called in messages."""
    return f"<{len(file):,} bytes>" if isinstance(file, bytes) else os.fspath(file)


@contextmanager
def open_media(path: MediaFile, max_bytes: int, key: str | None = None) -> Iterator[BinaryIO]:
    """Open a regular file for a decoder, without following a link put in its place after the path was resolved.

    Decoders get this object and never the path, so that none of them can take a name for a URL or a device. Media
    inside a tar or a table (see `packed.py`) are read into memory, and are as large as files may be.

    Args:
        max_bytes: size of the largest file that is opened.
        key: the limit's name, for the message.

    Raises:
        MediaError: missing, refused (no regular file, no permission), empty, or limit (more than `max_bytes`).
    """
    name = media_name(path)
    if isinstance(path, bytes):
        _check_size(name, len(path), max_bytes, key)
        yield io.BytesIO(path)
        return
    if (location := packed_location(name)) is not None and not os.path.lexists(name):
        yield io.BytesIO(packed_bytes(name, location, max_bytes, key))
        return
    descriptor = open_regular(name, name)
    try:
        _check_size(name, os.fstat(descriptor).st_size, max_bytes, key)
        with os.fdopen(descriptor, "rb", closefd=False) as file:
            yield file
    finally:
        os.close(descriptor)


def _check_size(name: str, size: int, max_bytes: int, key: str | None) -> None:
    if size == 0:
        raise MediaError("empty", name, "the file is empty")
    if size > max_bytes:
        raise too_many_bytes(name, max_bytes, key)


@contextmanager
def decoding(path: str) -> Iterator[None]:
    """Turn whatever a decoder raises into one MediaError; what it said is kept as the cause only.

    Wraps calls into decoders and nothing else: PyAV alone raises six exception types of its own on damaged files.
    """
    try:
        yield
    except MediaError:
        raise
    except Exception as error:
        raise _corrupt(path) from error


def _corrupt(path: str) -> MediaError:
    return MediaError("corrupt", path, "the decoder could not read the file")


def guarded(path: str, items: Iterator[Item]) -> Iterator[Item]:
    """Yield the items of a decoder, each step of it under `decoding`; the caller's own code between the steps
    is not.
    """
    while True:
        try:  # `decoding` written out: its entry and exit cost as much as decoding a small frame
            item = next(items)
        except StopIteration:
            return
        except MediaError:
            raise
        except Exception as error:
            raise _corrupt(path) from error
        yield item


def sniff(file: BinaryIO) -> tuple[Container, str] | None:
    """Tell the container by its first bytes, as (group, name), or None when it is none of those that are read.

    The name of the file means nothing: a playlist called clip.mp4 would make a decoder open other files and URLs.
    """
    head = file.read(64)
    file.seek(0)
    if head[:4] in (b"RIFF", b"RF64"):
        riff: dict[bytes, tuple[Container, str]] = {
            b"WAVE": ("audio", "wav"),
            b"AVI ": ("video", "avi"),
            b"WEBP": ("image", "webp"),
        }
        return riff.get(head[8:12])
    if head[:4] == b"FORM" and head[8:12] in (b"AIFF", b"AIFC"):
        return "audio", "aiff"
    if head[4:8] == b"ftyp":
        return _of_brands(head)
    if head[4:8] in (b"moov", b"mdat", b"free", b"wide", b"skip"):
        return "video", "mp4"
    if head[:3] == b"ID3":
        return _of_frame(_behind_tag(file, head)) or ("audio", "mp3")
    return _of_frame(head) or next((container for magic, container in _SIGNATURES if head.startswith(magic)), None)


def _of_frame(head: bytes) -> tuple[Container, str] | None:
    """Tell MP3 from AAC: eleven set bits begin a frame of MPEG audio; its two layer bits are 0 only in AAC."""
    sync = int.from_bytes(head[:2], "big")
    if sync & 0xFFE0 == 0xFFE0 and sync & 0x0006:
        return "audio", "mp3"
    return ("audio", "aac") if sync & 0xFFF6 == 0xFFF0 else None


def _behind_tag(file: BinaryIO, head: bytes) -> bytes:
    """Return what follows an ID3 tag, whose length stands in seven bits of each of four bytes."""
    size = sum((byte & 0x7F) << shift for byte, shift in zip(head[6:10], (21, 14, 7, 0), strict=True))
    file.seek(10 + size)
    behind = file.read(2)
    file.seek(0)
    return behind


def _of_brands(head: bytes) -> tuple[Container, str]:
    """Tell MP4, AVIF and HEIC apart, one kind of container, by the brands at its start."""
    size = int.from_bytes(head[:4], "big")
    others = {head[start : start + 4] for start in range(16, min(size, len(head)), 4)}
    if head[8:12] in _AVIF_BRANDS or (head[8:12] in _IMAGE_BRANDS and others & _AVIF_BRANDS):
        return "image", "avif"
    return ("image", "heif") if head[8:12] in _IMAGE_BRANDS else ("video", "mp4")


_AVIF_BRANDS = {b"avif", b"avis"}
_IMAGE_BRANDS = {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1"}


_SIGNATURES: tuple[tuple[bytes, tuple[Container, str]], ...] = (
    (b"\xff\xd8\xff", ("image", "jpeg")),
    (b"\x89PNG\r\n\x1a\n", ("image", "png")),
    (b"BM", ("image", "bmp")),
    (b"GIF8", ("image", "gif")),
    (b"fLaC", ("audio", "flac")),
    (b"OggS", ("audio", "ogg")),
    (b"II*\0", ("image", "tiff")),
    (b"MM\0*", ("image", "tiff")),
    (b"II+\0", ("image", "tiff")),
    (b"MM\0+", ("image", "tiff")),
    (b"\x1a\x45\xdf\xa3", ("video", "matroska")),
    (b"\x00\x00\x01\xba", ("video", "mpeg")),
    (b"\x00\x00\x01\xb3", ("video", "mpeg")),
)


def digest_of_media(file: Path) -> str:
    """Compute the SHA-256 of a medium's bytes, which may stand inside another file.

    Raises:
        MediaError: as `packed_bytes`.
        OSError: a file that cannot be read.
    """
    packed = packed_location(str(file))
    if packed is None:
        return digest_of_file(file)
    return hashlib.sha256(packed_bytes(str(file), packed, DEFAULT_LIMITS.video_bytes)).hexdigest()
