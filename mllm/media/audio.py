"""Decodes an audio file, or the audio of a video file, to one channel of float samples at the rate asked for.

Reads WAV, AIFF, FLAC, Ogg and MP3 with soundfile, and AAC and the audio stream of MP4, Matroska/WebM and AVI with PyAV,
block by block. Does not know what an encoder wants to hear (`transforms/encoder_inputs.py` does).
"""

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np

from mllm.media.containers import open_stream, stated_seconds
from mllm.media.errors import MediaError
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

AUDIO_FORMATS = ("WAV", "WAVEX", "RF64", "AIFF", "FLAC", "OGG", "MP3", "MPEG")
AUDIO_CODECS = ("aac", "mp3", "opus", "vorbis", "flac", "alac", "ac3", "mp2")
"""Codecs read inside video files, besides plain PCM."""
BLOCK_FRAMES = 65_536


@dataclass(frozen=True, slots=True, eq=False)
class Audio:
    """Holds one channel of audio: `samples` float32 (L,), nominally within -1..1, and their rate."""

    samples: np.ndarray
    sample_rate_hz: int

    @property
    def seconds(self) -> float:
        """Return the length in seconds."""
        return len(self.samples) / self.sample_rate_hz


def load_audio(path: MediaFile, sample_rate_hz: int = 16_000, *, limits: MediaLimits = DEFAULT_LIMITS) -> Audio:
    """Read audio as one channel at `sample_rate_hz`.

    The rate is read from the file; another one is resampled by a polyphase filter, always the same one, so that a
    result does not depend on which audio packages are installed. Channels are averaged. Samples are not clipped.
    A file that was cut off is refused where its format states a length; MP3, AAC and Ogg state none, and there it
    reads as shorter audio.

    Raises:
        MediaError: missing, refused, unsupported (format, codec, no audio stream), corrupt (also NaN or infinite
            samples, or fewer samples than the header states), empty, limit, or deadline.
    """
    if sample_rate_hz <= 0:
        raise ValueError(f"sample_rate_hz must be above 0, got {sample_rate_hz}")
    name = media_name(path)
    deadline = Deadline(name, limits.deadline_seconds)
    with open_media(path, limits.audio_bytes, "audio_bytes") as file:
        container = sniff(file)
        if container is None or container[0] == "image":
            raise MediaError("unsupported", name, "neither an audio nor a video file of a known format")
        read = _read_audio_file if container[0] == "audio" and container[1] != "aac" else _read_video_file
        samples, rate_hz = read(name, file, limits, deadline)
    if not np.isfinite(samples).all():
        raise MediaError("corrupt", name, "the samples are not all finite numbers")
    return Audio(resample(samples, rate_hz, sample_rate_hz), sample_rate_hz)


def resample(samples: np.ndarray, from_hz: int, to_hz: int) -> np.ndarray:
    """Resample (L,) float32 to ceil(L * to_hz / from_hz) samples; the same array when the rates agree."""
    if from_hz == to_hz:
        return samples
    from scipy.signal import resample_poly

    divisor = math.gcd(from_hz, to_hz)
    return resample_poly(samples, to_hz // divisor, from_hz // divisor).astype(np.float32)


def _read_audio_file(name: str, file: BinaryIO, limits: MediaLimits, deadline: Deadline) -> tuple[np.ndarray, int]:
    import soundfile

    _check_stated_length(name, file)
    with decoding(name):
        opened = soundfile.SoundFile(file)
    with opened:
        if opened.format not in AUDIO_FORMATS:
            raise MediaError("unsupported", name, f"not one of the audio formats {', '.join(AUDIO_FORMATS)}")
        rate_hz, stated = opened.samplerate, opened.frames
        _check_header(name, rate_hz, opened.channels, stated, limits)
        mono = _collect(name, _file_blocks(opened), rate_hz, limits, deadline)
        # The length an MP3 header gives is an estimate; the other formats state it exactly.
        if len(mono) < stated and opened.format not in ("MP3", "MPEG"):
            raise MediaError("corrupt", name, "the file holds fewer samples than its header states")
    return mono, rate_hz


def _file_blocks(opened: Any) -> Iterator[np.ndarray]:
    while len(block := opened.read(BLOCK_FRAMES, dtype="float32", always_2d=True)):
        yield block.mean(axis=1)


def _check_stated_length(name: str, file: BinaryIO) -> None:
    """Refuse a WAV or AIFF that was cut off: soundfile reads it as if it ended there, and its first chunk header tells.

    Sizes near 2^31 and 2^32 are what programs write that stream to a pipe and never learn the length.
    """
    head, size = file.read(8), file.seek(0, os.SEEK_END)
    file.seek(0)
    stated = int.from_bytes(head[4:8], "little" if head[:4] == b"RIFF" else "big")
    if head[:4] in (b"RIFF", b"FORM") and stated < 0x7FFF_F000 and size < stated + 8:
        raise MediaError("corrupt", name, "the file is shorter than its header states")


def _read_video_file(name: str, file: BinaryIO, limits: MediaLimits, deadline: Deadline) -> tuple[np.ndarray, int]:
    with open_stream(name, file, "audio", AUDIO_CODECS) as (container, stream):
        rate_hz, channels = stream.codec_context.sample_rate, stream.codec_context.channels
        stated = int(stated_seconds(container, stream) * rate_hz)
        _check_header(name, rate_hz, channels, stated, limits)
        return _collect(name, _stream_blocks(name, container, stream, rate_hz), rate_hz, limits, deadline), rate_hz


def _stream_blocks(name: str, container: Any, stream: Any, rate_hz: int) -> Iterator[np.ndarray]:
    import av

    planar = av.AudioResampler(format="fltp")
    for frame in container.decode(stream):
        if frame.sample_rate != rate_hz:
            raise MediaError("corrupt", name, "the sample rate changes inside the file")
        for part in planar.resample(frame):
            yield part.to_ndarray().mean(axis=0)


def _check_header(name: str, rate_hz: int, channels: int, stated: int, limits: MediaLimits) -> None:
    if not limits.audio_min_hz <= rate_hz <= limits.audio_max_hz:
        allowed = f"{limits.audio_min_hz} to {limits.audio_max_hz} Hz (limits.audio_min_hz, limits.audio_max_hz)"
        raise MediaError("limit", name, f"the sample rate must be {allowed}, the file has {rate_hz}")
    if not 1 <= channels <= limits.audio_channels:
        allowed = f"1 to {limits.audio_channels} channels (limits.audio_channels)"
        raise MediaError("limit", name, f"there must be {allowed}, the file has {channels}")
    _check_count(name, stated, rate_hz, limits)


def _check_count(name: str, samples: int, rate_hz: int, limits: MediaLimits) -> None:
    if samples > limits.audio_seconds * rate_hz:
        reason = f"the audio is longer than {limits.audio_seconds:g} seconds (limits.audio_seconds)"
        raise MediaError("limit", name, reason, limit="audio_seconds")
    if samples > limits.audio_samples:
        reason = f"the audio has more than {limits.audio_samples} samples per channel (limits.audio_samples)"
        raise MediaError("limit", name, reason)


def _collect(
    name: str, blocks: Iterator[np.ndarray], rate_hz: int, limits: MediaLimits, deadline: Deadline
) -> np.ndarray:
    """Join mono blocks, counting: a header may state less than the file holds.

    They go to one array that grows, since blocks and what they are joined to would be there twice.
    """
    samples, count = np.empty(BLOCK_FRAMES, np.float32), 0
    for block in guarded(name, blocks):
        deadline.check()
        _check_count(name, count + len(block), rate_hz, limits)
        if (needed := count + len(block)) > len(samples):
            # The system moves pages of large arrays instead of copying them, and gives memory once it is written to.
            samples.resize(max(needed, 2 * len(samples)), refcheck=False)
        samples[count:needed] = block
        count = needed
    if not count:
        raise MediaError("empty", name, "the file holds no audio samples")
    samples.resize(count, refcheck=False)
    return samples
