"""What the header of a media file says, without decoding: how long it lasts, and whether it holds sound.

Knows files and headers. Does not vouch for them: only decoding shows whether a header is right.
"""

from pathlib import Path

from mllm.media.audio import AUDIO_CODECS
from mllm.media.containers import open_stream, stated_seconds
from mllm.media.errors import MediaError
from mllm.media.limits import DEFAULT_LIMITS, MediaLimits, decoding, open_media, sniff
from mllm.media.video import VIDEO_CODECS


def header_seconds(medium: str, path: Path, *, limits: MediaLimits = DEFAULT_LIMITS) -> float:
    """Length of the sound (medium `audio`) or the pictures of a file as its header states it; 0 when it does not.

    Args:
        limits: of which the bytes count here.

    Raises:
        MediaError: the header cannot be read.
    """
    name = str(path)
    limit = limits.audio_bytes if medium == "audio" else limits.video_bytes
    with open_media(path, limit) as file:
        found = sniff(file)
        if found is not None and found[0] == "sound":
            import soundfile

            with decoding(name), soundfile.SoundFile(file) as sound:
                return sound.frames / sound.samplerate
        kind, codecs = ("audio", AUDIO_CODECS) if medium == "audio" else ("video", VIDEO_CODECS)
        with open_stream(name, file, kind, codecs) as (container, stream):
            return float(stated_seconds(container, stream))


def has_sound(path: Path) -> bool:
    """Whether a video file has a sound stream that can be read; False also for a file that is none."""
    try:
        with open_media(path, DEFAULT_LIMITS.video_bytes) as file, open_stream(str(path), file, "audio", AUDIO_CODECS):
            return True
    except MediaError:
        return False
