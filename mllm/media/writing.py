"""Writes what the readers of this package read best: H.264 without audio, and 16-bit wav.

Knows how little loss is asked for. Does not know where frames and samples come from.

Shapes: T frames, H rows and W columns of a frame, L samples.
"""

import os

import numpy as np

_QUALITY = {"preset": "ultrafast", "crf": "10", "threads": "1"}  # about one grey level of error


def write_video(path: str | os.PathLike[str], frames: np.ndarray, *, frames_per_second: int = 25) -> None:
    """Write uint8 frames, (T, H, W) gray or (T, H, W, 3) RGB, as H.264 in mp4, with little loss and no audio.

    Raises:
        ValueError: sides that are not even, which H.264 cannot store.
    """
    import av

    if frames.shape[1] % 2 or frames.shape[2] % 2:
        raise ValueError(f"{path}: images must have even sides for H.264, got {frames.shape[2]} x {frames.shape[1]}")
    with av.open(os.fspath(path), "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=frames_per_second, options=_QUALITY)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        for frame in frames:
            image = av.VideoFrame.from_ndarray(frame, format="gray" if frame.ndim == 2 else "rgb24")
            container.mux(stream.encode(image))
        container.mux(stream.encode(None))


def write_audio(path: str | os.PathLike[str], samples: np.ndarray, sample_rate_hz: int = 16_000) -> None:
    """Write float samples (L,) as 16-bit mono wav; a peak beyond full scale scales all of it down."""
    import soundfile

    peak = float(np.abs(samples).max())
    soundfile.write(os.fspath(path), samples / max(1.0, peak / 0.99), sample_rate_hz, subtype="PCM_16", format="WAV")
