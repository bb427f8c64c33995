"""Opens one stream of a video file by PyAV with nothing else within reach, and lists what media files are called.

Knows containers, codecs and suffixes. Does not know frames or samples.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from fractions import Fraction
from typing import Any, BinaryIO, Literal

from mllm.media.errors import MediaError
from mllm.media.limits import decoding

CONTAINERS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpeg,mpegvideo,aac"
"""Demuxers PyAV may use. Playlists (HLS, DASH, concat) are not among them: they open other files and URLs."""

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".heic", ".heif", ".avif")
AUDIO_SUFFIXES = (".wav", ".flac", ".mp3", ".ogg", ".opus", ".m4a", ".aac", ".aif", ".aiff")
VIDEO_SUFFIXES = (".mp4", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".mov", ".m4v", ".3gp")
"""What folders and tars are searched for, in lower case. Whether a file is read is told by what it holds."""


@contextmanager
def open_stream(
    name: str, file: BinaryIO, medium: Literal["audio", "video"], codecs: Sequence[str], **options: str
) -> Iterator[tuple[Any, Any]]:
    """Open the first stream of a medium, decoding on one thread (data loader workers already fill the cores).

    Args:
        name: the file's name for messages.
        file: the file, at its start.
        medium: which kind of stream.
        codecs: codecs that are read; plain PCM always is.
        options: options of the codec.

    Returns:
        PyAV's (container, stream), closed at the end of the block.

    Raises:
        MediaError: unsupported (no such stream, another codec) or corrupt.
    """
    import av

    with decoding(name):
        container = av.open(file, options={"format_whitelist": CONTAINERS, "protocol_whitelist": "none"})
    try:
        streams = container.streams.audio if medium == "audio" else container.streams.video
        if not streams:
            raise MediaError("unsupported", name, f"the file has no {medium} stream")
        stream = streams[0]
        codec = stream.codec_context.codec.canonical_name if stream.codec_context else "unknown"
        if codec not in codecs and not codec.startswith("pcm_"):
            raise MediaError("unsupported", name, f"the {medium} codec must be one of {', '.join(codecs)}")
        stream.codec_context.thread_count = 1  # set before the first frame: the codec is opened then
        stream.codec_context.options = options
        yield container, stream
    finally:
        container.close()


def stated_seconds(container: Any, stream: Any) -> Fraction:
    """Return the length of a stream as its header or else the file's header states it; 0 when neither does."""
    if stream.duration:
        return stream.duration * stream.time_base
    return Fraction(container.duration or 0, 1_000_000)
