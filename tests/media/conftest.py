"""Writer of real video files whose frames can be told apart."""

from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path

import av
import pytest
from numbered_frames import numbered_frame
from videos import turn

TICKS_PER_SECOND = 90_000


@pytest.fixture
def write_video(tmp_path: Path) -> Callable[..., Path]:
    """Write numbered frames at a constant rate, or at `seconds` when these are given."""

    def write(
        name: str,
        num_frames: int = 30,
        *,
        rate: int = 25,
        seconds: Sequence[float] | None = None,
        size: tuple[int, int] = (64, 48),
        codec: str = "libx264",
        rotation_degrees: int = 0,
        options: dict[str, str] | None = None,
    ) -> Path:
        path = tmp_path / name
        with av.open(path, "w") as container:
            stream = container.add_stream(codec, rate=rate, options=options or {})
            stream.width, stream.height, stream.pix_fmt = *size, "yuv420p"
            if seconds is not None:
                stream.codec_context.time_base = stream.time_base = Fraction(1, TICKS_PER_SECOND)
            if rotation_degrees:
                turn(stream, rotation_degrees)
            for number in range(num_frames):
                frame = av.VideoFrame.from_ndarray(numbered_frame(number, *size), format="rgb24")
                frame.pts, frame.time_base = number, Fraction(1, rate)
                if seconds is not None:
                    frame.pts, frame.time_base = round(seconds[number] * TICKS_PER_SECOND), stream.time_base
                container.mux(stream.encode(frame))
            container.mux(stream.encode(None))
        return path

    return write
