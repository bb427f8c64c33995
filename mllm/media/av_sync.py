"""Brings audio and video of one clip to one length, or refuses them where they cannot be of one clip.

Knows lengths. Does not look for an offset between the two: both begin at their own first sample and frame.
"""

import numpy as np

from mllm.media.audio import Audio
from mllm.media.errors import MediaError
from mllm.media.video import Video

MAX_MISMATCH_SECONDS = 0.08
"""Two frames of a video at 25 per second, or the padding of an audio codec."""


def audio_as_long_as_video(audio: Audio, video: Video, *, path: object, max_mismatch_seconds: float) -> Audio:
    """Return the audio, cut or followed by silence to the length of the video: 640 samples a frame at 16 kHz and 25
    fps.

    Args:
        path: of the audio, for the message.
        max_mismatch_seconds: how far apart the two may be.

    Raises:
        MediaError: kind `mismatch`, when they are further apart.
    """
    apart = abs(audio.seconds - video.seconds)
    if apart > max_mismatch_seconds + 1e-6:
        raise MediaError(
            "mismatch",
            path,
            f"the audio lasts {audio.seconds:.3f} seconds and the video of the same clip {video.seconds:.3f}; they may "
            f"differ by {max_mismatch_seconds:g} (max_mismatch_seconds)",
        )
    count = max(1, round(video.seconds * audio.sample_rate_hz))
    if count <= len(audio.samples):
        return Audio(audio.samples[:count], audio.sample_rate_hz)
    return Audio(np.pad(audio.samples, (0, count - len(audio.samples))), audio.sample_rate_hz)
