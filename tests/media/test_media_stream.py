"""What streaming and writing promise: the frames of `load_video` one by one, and files that read back as written."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile

from mllm.media import MediaError, MediaLimits, load_video, stream_video, write_audio, write_video


@pytest.mark.parametrize("rate", [25, 10, 60])
@pytest.mark.parametrize("rotation", [0, 90])
def test_streamed_frames_are_the_loaded_ones(write_video: Callable[..., Path], rate: int, rotation: int) -> None:
    generator = np.random.default_rng(rate)
    seconds = np.cumsum(generator.uniform(0.01, 0.08, 40)).tolist()
    path = write_video("a.mp4", 40, seconds=seconds, rotation_degrees=rotation)
    loaded = load_video(path, frames_per_second=rate).frames
    np.testing.assert_array_equal(np.stack(list(stream_video(path, frames_per_second=rate))), loaded)


def test_streams_obey_limits_and_refuse_what_is_no_video(write_video: Callable[..., Path], tmp_path: Path) -> None:
    path = write_video("a.mp4", 30)
    with pytest.raises(MediaError, match="longer than 1 seconds"):
        list(stream_video(path, limits=MediaLimits(video_seconds=1)))
    (tmp_path / "no.mp4").write_bytes(b"no video at all")
    with pytest.raises(MediaError, match="not an MP4"):
        list(stream_video(tmp_path / "no.mp4"))


@pytest.mark.parametrize("channels", [(), (3,)])
def test_written_video_reads_back(tmp_path: Path, channels: tuple[int, ...]) -> None:
    steps = np.linspace(0, 250, 96 * 96).reshape(96, 96).astype(np.uint8)
    frames = np.stack([np.roll(steps, 8 * number, axis=0) for number in range(10)])
    frames = np.broadcast_to(frames[..., *(None for _ in channels)], (*frames.shape, *channels))
    write_video(tmp_path / "a.part", np.ascontiguousarray(frames), frames_per_second=25)
    read = load_video(tmp_path / "a.part", frames_per_second=None, gray=not channels)
    assert read.frames.shape == frames.shape
    assert read.frames_per_second == 25
    assert np.abs(read.frames.astype(int) - frames).mean() < 2


def test_written_audio_reads_back_and_is_never_clipped(tmp_path: Path) -> None:
    loud = np.sin(np.arange(1600) / 5).astype(np.float32) * 1.5
    write_audio(tmp_path / "a.part", loud, 16_000)
    samples, rate_hz = soundfile.read(tmp_path / "a.part")
    assert rate_hz == 16_000
    np.testing.assert_allclose(samples, loud * 0.99 / np.abs(loud).max(), atol=1e-4)
