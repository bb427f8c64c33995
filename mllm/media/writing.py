"""Writes clips: pictures as H.264 in mp4 with little loss, sound as 16-bit wav.

Knows formats. Does not know what is in a clip.
"""

from pathlib import Path

import numpy as np

_QUALITY = {"preset": "ultrafast", "crf": "10", "threads": "1"}  # about one grey level of error


def write_lip_video(path: Path, frames: np.ndarray, *, frames_per_second: int = 25) -> None:
    """Write uint8 pictures, (T, H, W) gray or (T, H, W, 3) RGB, as H.264 in mp4, with little loss and no sound.

    Raises:
        ValueError: sides that are not even, which H.264 cannot store.
    """
    import av

    if frames.shape[1] % 2 or frames.shape[2] % 2:
        raise ValueError(f"{path}: pictures must have even sides for H.264, got {frames.shape[2]} x {frames.shape[1]}")
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=frames_per_second, options=_QUALITY)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        for frame in frames:
            picture = av.VideoFrame.from_ndarray(frame, format="gray" if frame.ndim == 2 else "rgb24")
            container.mux(stream.encode(picture))
        container.mux(stream.encode(None))


def write_sound(path: Path, samples: np.ndarray, *, sample_rate_hz: int = 16_000) -> None:
    """Write float samples (L,) as 16-bit wav; a peak beyond full scale turns the whole clip down."""
    import soundfile

    peak = float(np.abs(samples).max())
    soundfile.write(path, samples / max(1.0, peak / 0.99), sample_rate_hz, subtype="PCM_16")
