"""load_audio: one channel at the asked rate whatever the file holds, or a typed error."""

import struct
from collections.abc import Callable
from pathlib import Path

import av
import numpy as np
import pytest
import soundfile

from mllm.media import MediaError, MediaLimits, load_audio


def tone(rate_hz: int, seconds: float = 1.0, frequency_hz: float = 440.0) -> np.ndarray:
    """Return (L,) float32 sine of amplitude 0.5."""
    return 0.5 * np.sin(2 * np.pi * frequency_hz * np.arange(round(seconds * rate_hz)) / rate_hz).astype(np.float32)


@pytest.mark.parametrize(("rate_hz", "suffix"), [(8_000, "wav"), (44_100, "wav"), (48_000, "flac"), (22_050, "flac")])
def test_any_rate_and_channel_count_become_the_same_tone(tmp_path: Path, rate_hz: int, suffix: str) -> None:
    left = tone(rate_hz, frequency_hz=440)
    right = tone(rate_hz, frequency_hz=1_000)
    soundfile.write(tmp_path / f"a.{suffix}", np.stack([left, right], axis=1), rate_hz, subtype="PCM_24")
    audio = load_audio(tmp_path / f"a.{suffix}", 16_000)
    expected = (tone(16_000, frequency_hz=440) + tone(16_000, frequency_hz=1_000)) / 2
    assert audio.samples.dtype == np.float32
    assert (audio.sample_rate_hz, audio.samples.shape, audio.seconds) == (16_000, (16_000,), 1.0)
    np.testing.assert_allclose(audio.samples[500:-500], expected[500:-500], atol=2e-3)


def test_the_files_own_rate_is_left_alone(tmp_path: Path) -> None:
    samples = np.random.default_rng(0).normal(size=100_000).astype(np.float32)  # several blocks, beyond -1..1
    soundfile.write(tmp_path / "a.wav", samples, 16_000, subtype="FLOAT")
    np.testing.assert_array_equal(load_audio(tmp_path / "a.wav").samples, samples)


@pytest.mark.parametrize(("name", "format"), [("a.ogg", "OGG"), ("a.mp3", "MP3"), ("no_suffix", "WAV")])
def test_other_audio_formats(tmp_path: Path, name: str, format: str) -> None:
    soundfile.write(tmp_path / name, tone(16_000), 16_000, format=format)
    samples = load_audio(tmp_path / name).samples
    assert abs(len(samples) - 16_000) < 1_200
    spectrum = np.abs(np.fft.rfft(samples))
    assert np.argmax(spectrum) * 16_000 / len(samples) == pytest.approx(440, abs=2)


@pytest.mark.parametrize(
    ("name", "codec"), [("a.mp4", "aac"), ("a.m4a", "aac"), ("a.mkv", "flac"), ("a.webm", "libopus")]
)
def test_the_audio_of_a_video_file(tmp_path: Path, name: str, codec: str) -> None:
    write_clip_audio(tmp_path / name, codec, tone(48_000, 2.0))
    audio = load_audio(tmp_path / name, 16_000)
    assert audio.seconds == pytest.approx(2.0, abs=0.1)
    spectrum = np.abs(np.fft.rfft(audio.samples))
    assert np.argmax(spectrum) / audio.seconds == pytest.approx(440, abs=2)
    assert np.abs(audio.samples).max() == pytest.approx(0.5, abs=0.05)


def write_clip_audio(path: Path, codec: str, samples: np.ndarray) -> None:
    """Write 48 kHz stereo audio into a video container."""
    with av.open(path, "w") as container:
        stream = container.add_stream(codec, rate=48_000, layout="stereo")
        frame = av.AudioFrame.from_ndarray(np.stack([samples, samples]), format="fltp", layout="stereo")
        frame.sample_rate, frame.pts = 48_000, 0
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def test_a_video_without_audio(write_video: Callable[..., Path]) -> None:
    with pytest.raises(MediaError, match="no audio stream") as caught:
        load_audio(write_video("silent.mp4", 5))
    assert caught.value.kind == "unsupported"


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_samples_that_are_no_numbers(tmp_path: Path, bad: float) -> None:
    samples = tone(16_000)
    samples[100] = bad
    soundfile.write(tmp_path / "a.wav", samples, 16_000, subtype="FLOAT")
    with pytest.raises(MediaError, match="finite") as caught:
        load_audio(tmp_path / "a.wav")
    assert caught.value.kind == "corrupt"


def test_no_samples(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "a.wav", np.zeros(0), 16_000)
    with pytest.raises(MediaError, match="no audio samples") as caught:
        load_audio(tmp_path / "a.wav")
    assert caught.value.kind == "empty"


@pytest.mark.parametrize(("suffix", "part"), [("wav", 0.5), ("wav", 0.999), ("flac", 0.5), ("mp4", 0.7)])
def test_files_that_were_cut_off(tmp_path: Path, suffix: str, part: float) -> None:
    path = tmp_path / f"a.{suffix}"
    samples = np.random.default_rng(0).normal(0, 0.1, 48_000).astype(np.float32)
    if suffix == "mp4":
        write_clip_audio(path, "aac", samples)
    else:
        soundfile.write(path, samples, 16_000)
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * part)])
    with pytest.raises(MediaError, match="a\\.") as caught:
        load_audio(path)
    assert caught.value.kind == "corrupt"


@pytest.mark.parametrize("rate_hz", [0, 1, 7_999, 192_001, 2**31 - 1])
def test_a_forged_rate(tmp_path: Path, rate_hz: int) -> None:
    soundfile.write(tmp_path / "a.wav", tone(16_000), 16_000)
    data = bytearray((tmp_path / "a.wav").read_bytes())
    data[24:28] = struct.pack("<I", rate_hz)
    (tmp_path / "a.wav").write_bytes(data)
    with pytest.raises(MediaError, match=r"sample rate|decoder"):
        load_audio(tmp_path / "a.wav")


def test_limits(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "a.flac", np.zeros((160_000, 3)), 16_000)
    path = tmp_path / "a.flac"
    assert load_audio(path, limits=MediaLimits(audio_seconds=10, audio_samples=160_000)).seconds == 10
    for limits, message in [
        (MediaLimits(audio_seconds=9.9), "longer than 9.9 seconds"),
        (MediaLimits(audio_samples=159_999), "more than 159999 samples"),
        (MediaLimits(audio_channels=2), "1 to 2 channels"),
        (MediaLimits(audio_bytes=100), "larger than 100 bytes"),
        (MediaLimits(audio_max_hz=15_999), "8000 to 15999 Hz"),
    ]:
        with pytest.raises(MediaError, match=message) as caught:
            load_audio(path, limits=limits)
        assert caught.value.kind == "limit"


def test_more_samples_than_the_header_states(tmp_path: Path) -> None:
    write_clip_audio(tmp_path / "a.mkv", "flac", tone(48_000, 4.0))
    data = (tmp_path / "a.mkv").read_bytes()
    duration = data.index(b"\x44\x89\x88") + 3  # Matroska's element "Duration", a float64
    (tmp_path / "a.mkv").write_bytes(data[:duration] + struct.pack(">d", 1.0) + data[duration + 8 :])
    with pytest.raises(MediaError, match="longer than 3 seconds"):
        load_audio(tmp_path / "a.mkv", limits=MediaLimits(audio_seconds=3))


def test_the_deadline(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "a.wav", tone(16_000), 16_000)
    with pytest.raises(MediaError, match="longer than 1e-09 seconds") as caught:
        load_audio(tmp_path / "a.wav", limits=MediaLimits(deadline_seconds=1e-9))
    assert caught.value.kind == "deadline"


def test_an_image_is_no_audio(tmp_path: Path) -> None:
    (tmp_path / "a.wav").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(100))
    with pytest.raises(MediaError, match="neither an audio nor a video"):
        load_audio(tmp_path / "a.wav")
    with pytest.raises(ValueError, match="sample_rate_hz must be above 0"):
        load_audio(tmp_path / "a.wav", 0)
