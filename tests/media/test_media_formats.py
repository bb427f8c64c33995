"""What phones and studios make: files that other tools wrote in AIFF, AAC, ProRes and animated images are read."""

import os
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import soundfile
from numbered_frames import frame_numbers, numbered_frame
from PIL import Image

from mllm.media import FrameSampling, MediaError, MediaLimits, load_audio, load_video, stream_video
from mllm.media.headers import has_audio, header_seconds


def tone(seconds: float = 1.0, rate_hz: int = 44_100) -> np.ndarray:
    """Return (L,) float32 sine of 440 Hz and amplitude 0.5."""
    return 0.5 * np.sin(2 * np.pi * 440 * np.arange(round(seconds * rate_hz)) / rate_hz).astype(np.float32)


def loudest_hz(samples: np.ndarray, rate_hz: int = 16_000) -> float:
    return float(np.argmax(np.abs(np.fft.rfft(samples))) * rate_hz / len(samples))


@pytest.mark.parametrize("subtype", ["PCM_16", "PCM_24", "FLOAT"])
def test_aiff(tmp_path: Path, subtype: str) -> None:
    soundfile.write(tmp_path / "a.aif", tone(), 44_100, format="AIFF", subtype=subtype)
    audio = load_audio(tmp_path / "a.aif", 44_100)
    np.testing.assert_allclose(audio.samples, tone(), atol=1e-4)
    assert header_seconds("audio", tmp_path / "a.aif") == 1.0
    (tmp_path / "cut.aif").write_bytes((tmp_path / "a.aif").read_bytes()[:30_000])
    with pytest.raises(MediaError, match="shorter than its header states") as caught:
        load_audio(tmp_path / "cut.aif")
    assert caught.value.kind == "corrupt"
    with pytest.raises(MediaError, match=r"longer than 0\.5 seconds"):
        load_audio(tmp_path / "a.aif", limits=MediaLimits(audio_seconds=0.5))


@pytest.fixture
def aac(tmp_path: Path) -> Path:
    """Write two seconds of a tone as bare AAC (ADTS)."""
    with av.open(tmp_path / "a.aac", "w", format="adts") as container:
        stream = container.add_stream("aac", rate=44_100, layout="mono")
        frame = av.AudioFrame.from_ndarray(tone(2.0)[None], format="fltp", layout="mono")
        frame.sample_rate, frame.pts = 44_100, 0
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return tmp_path / "a.aac"


@pytest.mark.parametrize("with_tag", [False, True])
def test_bare_aac_also_behind_a_tag(aac: Path, with_tag: bool) -> None:
    if with_tag:
        aac.write_bytes(b"ID3\x04\0\0\0\0\1\x16" + bytes(150) + aac.read_bytes())
    audio = load_audio(aac)
    assert audio.seconds == pytest.approx(2.0, abs=0.1)
    assert loudest_hz(audio.samples) == pytest.approx(440, abs=2)
    assert header_seconds("audio", aac) == pytest.approx(audio.seconds, abs=0.05)
    with pytest.raises(MediaError, match=r"longer than 0\.5 seconds") as caught:
        load_audio(aac, limits=MediaLimits(audio_seconds=0.5))
    assert caught.value.kind == "limit"


def test_an_mp3_behind_a_tag_is_still_one(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "a.mp3", tone(), 44_100, format="MP3")
    (tmp_path / "a.mp3").write_bytes(b"ID3\x04\0\0\0\0\1\x16" + bytes(150) + (tmp_path / "a.mp3").read_bytes())
    assert loudest_hz(load_audio(tmp_path / "a.mp3").samples) == pytest.approx(440, abs=2)


def test_prores_with_its_audio(tmp_path: Path) -> None:
    with av.open(tmp_path / "a.mov", "w") as container:
        video = container.add_stream("prores_ks", rate=25, options={"profile": "3"})
        video.width, video.height, video.pix_fmt = 64, 48, "yuv422p10le"
        audio = container.add_stream("pcm_s24le", rate=48_000, layout="mono")
        for number in range(10):
            image = av.VideoFrame.from_ndarray(numbered_frame(number, 64, 48), format="rgb24")
            image.pts, image.time_base = number, Fraction(1, 25)
            container.mux(video.encode(image))
        container.mux(video.encode(None))
        samples = (tone(0.4, 48_000) * 2**31).astype(np.int32)[None]
        frame = av.AudioFrame.from_ndarray(samples, format="s32", layout="mono")
        frame.sample_rate, frame.pts = 48_000, 0
        container.mux(audio.encode(frame))
        container.mux(audio.encode(None))
    assert frame_numbers(load_video(tmp_path / "a.mov").frames) == list(range(10))
    assert has_audio(tmp_path / "a.mov")
    assert load_audio(tmp_path / "a.mov").seconds == pytest.approx(0.4)
    with pytest.raises(MediaError, match="1 to 100 pixels"):
        load_video(tmp_path / "a.mov", limits=MediaLimits(video_pixels=100))


COLOURS = ("red", "blue", "lime", "white")
RGB = [(255, 0, 0), (0, 0, 255), (0, 255, 0), (255, 255, 255)]


def animation(path: Path, durations: list[int]) -> Path:
    """Write one frame of each colour, for so many milliseconds."""
    frames = [Image.new("RGB", (16, 8), colour) for colour in COLOURS[: len(durations)]]
    lossless = {"lossless": True} if path.suffix == ".webp" else {}
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=durations, **lossless)
    return path


def colours(frames: np.ndarray) -> list[int]:
    """Say which colour each frame is; of two outputs each takes the frame whose time is nearest, as of any video."""
    return [int(np.abs(np.array(RGB) - frame[4, 8]).sum(axis=1).argmin()) for frame in frames]


@pytest.mark.parametrize("suffix", ["gif", "webp", "png"])
def test_an_animation_is_a_video_by_its_durations(tmp_path: Path, suffix: str) -> None:
    path = animation(tmp_path / f"a.{suffix}", [40, 80, 120, 40])
    video = load_video(path, frames_per_second=25)
    assert colours(video.frames) == [0, 1, 1, 2, 2, 3, 3]
    assert video.frames.shape[1:] == (8, 16, 3)
    assert colours(np.stack(list(stream_video(path, frames_per_second=25)))) == [0, 1, 1, 2, 2, 3, 3]
    assert colours(load_video(path, frames_per_second=None).frames) == [0, 1, 2, 3]
    assert colours(load_video(path, frames_per_second=FrameSampling(2)).frames) == [1, 3]
    assert load_video(path, gray=True).frames.shape == (7, 8, 16)
    assert header_seconds("video", path) == pytest.approx(0.28)


def test_a_few_frames_are_taken_of_an_animation_beyond_the_limits(tmp_path: Path) -> None:
    path = animation(tmp_path / "a.gif", [1000, 1000, 1000, 1000])
    for limits in (MediaLimits(video_seconds=3.5), MediaLimits(video_frames=3)):
        with pytest.raises(MediaError, match=r"\(limits\.video_(seconds|frames)\)"):
            load_video(path, limits=limits)
        assert colours(load_video(path, frames_per_second=FrameSampling(2), limits=limits).frames) == [1, 3]


def test_an_animations_frames_are_what_is_seen_on_white(tmp_path: Path) -> None:
    red, spot = Image.new("RGBA", (16, 8), (255, 0, 0, 0)), Image.new("RGBA", (16, 8), (0, 0, 0, 0))
    spot.paste((0, 0, 255, 255), (0, 0, 4, 8))
    red.save(tmp_path / "a.png", save_all=True, append_images=[spot], duration=40, disposal=1)
    frames = load_video(tmp_path / "a.png", frames_per_second=None).frames
    assert frames[0, 4, 8].tolist() == [255, 255, 255]
    assert frames[1, 4, 1].tolist() == [0, 0, 255]


def test_a_large_video_has_the_audio_that_its_header_states(tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    with av.open(path, "w") as container:
        stream = container.add_stream("aac", rate=44_100, layout="mono")
        frame = av.AudioFrame.from_ndarray(tone()[None], format="fltp", layout="mono")
        frame.sample_rate, frame.pts = 44_100, 0
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    unused = MediaLimits().video_bytes
    with path.open("r+b") as file:
        end = file.seek(0, os.SEEK_END)
        file.write(unused.to_bytes(4, "big") + b"free")
        file.truncate(end + unused)
    assert path.stat().st_size > MediaLimits().video_bytes
    assert has_audio(path)


def test_animations_obey_limits_and_still_images_are_no_videos(tmp_path: Path) -> None:
    path = animation(tmp_path / "a.gif", [1000, 1000, 1000, 1000])
    for limits, message in (
        (MediaLimits(video_seconds=3.5), "longer than 3.5 seconds"),
        (MediaLimits(video_frames=3), "more than 3 frames"),
        (MediaLimits(video_pixels=100), "1 to 100 pixels"),
        (MediaLimits(video_bytes=50), "larger than 50 bytes"),
        (MediaLimits(video_decoded_bytes=1000), "more than 1000 bytes"),
    ):
        with pytest.raises(MediaError, match=message) as caught:
            load_video(path, limits=limits)
        assert caught.value.kind == "limit"
    for suffix in ("gif", "png", "webp", "tif"):
        Image.new("RGB", (8, 8)).save(tmp_path / f"still.{suffix}")
        with pytest.raises(MediaError, match="nor an animated image") as caught:
            load_video(tmp_path / f"still.{suffix}")
        assert caught.value.kind == "unsupported"
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(MediaError, match=r"decoder|header|empty"):
        load_video(path)
