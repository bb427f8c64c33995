"""Reads what the header of a media file says, without decoding: how long it lasts, and whether it holds audio.

Knows files and headers. Does not vouch for them: only decoding shows whether a header is right.
"""

import sys
from pathlib import Path

from mllm.media.animation import KINDS, TICK_SECONDS, animation_frames
from mllm.media.audio import AUDIO_CODECS
from mllm.media.containers import open_stream, stated_seconds
from mllm.media.errors import MediaError
from mllm.media.limits import DEFAULT_LIMITS, MediaLimits, decoding, open_media, sniff
from mllm.media.video import VIDEO_CODECS


def header_seconds(medium: str, path: Path, *, limits: MediaLimits = DEFAULT_LIMITS) -> float:
    """Return the length of the audio (medium `audio`) or the images of a file as its header states it; 0 when it does
    not. AAC alone is counted by its packets, animations by their frames.

    Args:
        limits: of which the bytes count here, and of an animation its pixels.

    Raises:
        MediaError: the header cannot be read.
    """
    name = str(path)
    limit, key = (limits.audio_bytes, "audio_bytes") if medium == "audio" else (limits.video_bytes, "video_bytes")
    with open_media(path, limit, key) as file:
        container = sniff(file)
        if container == ("audio", "aac"):  # it states no length, and its bit rate tells little
            with open_stream(name, file, "audio", AUDIO_CODECS) as (container, stream), decoding(name):
                return float(sum(packet.duration or 0 for packet in container.demux(stream)) * stream.time_base)
        if container is not None and container[0] == "audio":
            import soundfile

            with decoding(name), soundfile.SoundFile(file) as opened:
                return opened.frames / opened.samplerate
        if container is not None and container[0] == "image" and container[1] in KINDS:
            ticks = sum(ticks for _, ticks in animation_frames(name, file, container[1], limits))
            return float(ticks * TICK_SECONDS)
        kind, codecs = ("audio", AUDIO_CODECS) if medium == "audio" else ("video", VIDEO_CODECS)
        with open_stream(name, file, kind, codecs) as (container, stream):
            return float(stated_seconds(container, stream))


def has_audio(path: Path) -> bool:
    """Tell whether a video file has an audio stream that can be read; False also for a file that is no video.

    Only the header is looked at, so the file may be of any size; whoever reads it knows how large it may be.
    """
    try:
        with open_media(path, sys.maxsize) as file, open_stream(str(path), file, "audio", AUDIO_CODECS):
            return True
    except MediaError:
        return False
