"""load_video: frames by presentation time, the same from both decoders, under limits; or a typed error."""

import os
import resource
import struct
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from numbered_frames import frame_numbers
from PIL import Image
from videos import needs_decord, turn

from mllm.media import FrameSampling, MediaError, MediaLimits, MediaLoader, decord_process, load_video, to_gray
from mllm.media import video as video_module

Writer = Callable[..., Path]


def nearest(times: list[float], rate: float, count: int) -> list[int]:
    """Apply the plain rule: for each output the earliest of the frames nearest in time."""
    return [min(range(len(times)), key=lambda i: (abs(times[i] - times[0] - k / rate), i)) for k in range(count)]


def test_at_its_own_rate_every_frame_comes_once(write_video: Writer) -> None:
    video = load_video(write_video("a.mp4", 75))
    assert video.frames.shape == (75, 48, 64, 3)
    assert video.frames.dtype == np.uint8
    assert (video.frames_per_second, video.seconds) == (25.0, 3.0)
    assert frame_numbers(video.frames) == list(range(75))


@pytest.mark.parametrize(("rate", "num_frames", "expected"), [(30, 90, 75), (50, 31, 16), (10, 8, 20), (24, 24, 25)])
def test_other_rates_take_the_nearest_frame(write_video: Writer, rate: int, num_frames: int, expected: int) -> None:
    video = load_video(write_video("a.mp4", num_frames, rate=rate))
    assert frame_numbers(video.frames) == nearest([i / rate for i in range(num_frames)], 25.0, expected)


@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
def test_a_variable_rate_is_resampled_by_time_not_by_count(write_video: Writer, suffix: str) -> None:
    gaps = np.random.default_rng(0).integers(10, 90, 39) / 1000  # whole milliseconds, the clock of Matroska
    seconds = [0.2, *(0.2 + np.cumsum(gaps)).tolist()]
    video = load_video(write_video(f"a.{suffix}", 40, seconds=seconds), frames_per_second=20.0)
    assert abs(len(video.frames) - (seconds[-1] - seconds[0]) * 20) < 3
    assert frame_numbers(video.frames) == nearest(seconds, 20.0, len(video.frames))


def test_without_a_rate_the_files_frames_and_their_mean_rate_are_given(write_video: Writer) -> None:
    video = load_video(write_video("a.mp4", 20, rate=30), frames_per_second=None)
    assert frame_numbers(video.frames) == list(range(20))
    assert video.frames_per_second == pytest.approx(30)


@needs_decord
@pytest.mark.parametrize(
    ("name", "codec", "options"),
    [
        ("a.mp4", "libx264", {"bf": "3"}),
        ("a.avi", "libx264", {"bf": "2"}),
        ("a.avi", "mpeg4", {"bf": "2", "b": "4M"}),
        ("a.mpg", "mpeg1video", {"bf": "2", "b": "4M"}),
        ("a.webm", "libvpx-vp9", {"cpu-used": "8", "deadline": "realtime"}),
        ("a.mkv", "libx265", {"preset": "ultrafast", "x265-params": "log-level=none"}),
    ],
)
def test_both_decoders_give_the_same_frames(write_video: Writer, name: str, codec: str, options: dict) -> None:
    path = write_video(name, 40, rate=30, codec=codec, options=options)
    assert frame_numbers(load_video(path, frames_per_second=None).frames) == list(range(40))
    for rate in (25.0, None):
        ours, other = (load_video(path, backend=backend, frames_per_second=rate) for backend in ("pyav", "decord"))
        assert ours.frames_per_second == other.frames_per_second
        np.testing.assert_array_equal(ours.frames, other.frames)


@pytest.mark.parametrize("backend", ["pyav", pytest.param("decord", marks=needs_decord)])
@pytest.mark.parametrize("degrees", [90, 180, -90])
def test_a_rotation_in_the_header_is_applied(write_video: Writer, backend, degrees: int) -> None:
    flat = load_video(write_video("flat.mp4", 3, size=(96, 64))).frames
    turned = load_video(write_video("turned.mp4", 3, size=(96, 64), rotation_degrees=degrees), backend=backend).frames
    np.testing.assert_array_equal(turned, np.rot90(flat, degrees // 90, axes=(1, 2)))


@needs_decord
def test_gray_is_pillows_luma_of_the_colour_frame(write_video: Writer) -> None:
    colours = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    np.testing.assert_array_equal(to_gray(colours), np.asarray(Image.fromarray(colours).convert("L")))
    path = write_video("a.mp4", 5)
    one = load_video(path, gray=True, backend="decord").frames
    np.testing.assert_array_equal(one, to_gray(load_video(path).frames))


@pytest.mark.parametrize(("pixels", "options"), [("yuv420p", {}), ("yuvj420p", {}), ("yuv444p", {}), ("gray", {})])
@pytest.mark.parametrize("degrees", [0, 90])
def test_gray_of_a_clip_without_colours_is_its_luma_within_rounding(
    tmp_path: Path, pixels: str, options: dict, degrees: int
) -> None:
    rng = np.random.default_rng(0)
    with av.open(tmp_path / "a.mp4", "w") as container:
        stream = container.add_stream("libx264", rate=25, options={"crf": "10"})
        stream.width, stream.height, stream.pix_fmt = 70, 48, pixels  # rows that the decoder pads
        if degrees:
            turn(stream, degrees)
        for _ in range(4):
            coarse = np.kron(rng.integers(0, 256, (6, 7), dtype=np.uint8), np.ones((8, 10), np.uint8))
            frame = av.VideoFrame.from_ndarray(np.repeat(coarse[..., None], 3, -1), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    one, other = load_video(tmp_path / "a.mp4", gray=True).frames, to_gray(load_video(tmp_path / "a.mp4").frames)
    assert one.shape == other.shape == ((4, 70, 48) if degrees else (4, 48, 70))
    assert np.abs(one.astype(int) - other).max() <= 2
    assert np.abs(one.astype(int) - other).mean() < 1


def test_luma_of_another_standard_is_computed_from_the_colours(tmp_path: Path) -> None:
    colours = np.random.default_rng(0).integers(0, 256, (6, 8, 3), dtype=np.uint8).repeat(16, 0).repeat(16, 1)
    with av.open(tmp_path / "a.mp4", "w") as container:
        stream = container.add_stream("libx264", rate=25, options={"crf": "5"})
        stream.width, stream.height, stream.pix_fmt = 128, 96, "yuv444p"
        stream.codec_context.colorspace = 1  # BT.709
        frame = av.VideoFrame.from_ndarray(colours, format="rgb24")
        container.mux(stream.encode(frame.reformat(format="yuv444p", dst_colorspace="itu709")))
        container.mux(stream.encode(None))
    shown = load_video(tmp_path / "a.mp4").frames
    np.testing.assert_array_equal(load_video(tmp_path / "a.mp4", gray=True).frames, to_gray(shown))


def test_hidden_vp8_reference_frames_are_not_counted(write_video: Writer, tmp_path: Path) -> None:
    source = write_video("a.webm", 20, codec="libvpx")
    with av.open(source) as reader, av.open(tmp_path / "b.webm", "w") as writer:
        stream = writer.add_stream_from_template(reader.streams.video[0])
        for number, packet in enumerate(packet for packet in reader.demux(video=0) if packet.size):
            data = bytearray(bytes(packet))
            if number == 7:
                data[0] &= ~0x10 & 0xFF  # the bit that says "show this frame"
            copy = av.Packet(bytes(data))
            copy.pts, copy.dts, copy.time_base = packet.pts, packet.dts, packet.time_base
            copy.is_keyframe, copy.stream = packet.is_keyframe, stream
            writer.mux(copy)
    numbers = frame_numbers(load_video(tmp_path / "b.webm", frames_per_second=None).frames)
    assert numbers == [number for number in range(20) if number != 7]


@pytest.mark.parametrize("backend", ["pyav", pytest.param("decord", marks=needs_decord)])
def test_a_playlist_with_the_name_of_a_video_opens_nothing(write_video: Writer, tmp_path: Path, backend) -> None:
    write_video("real.mp4", 5)
    (tmp_path / "a.mp4").write_text("#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nreal.mp4\n#EXT-X-ENDLIST\n")
    with pytest.raises(MediaError, match="not an MP4") as caught:
        load_video(tmp_path / "a.mp4", backend=backend)
    assert caught.value.kind == "unsupported"


@pytest.mark.parametrize("backend", ["pyav", pytest.param("decord", marks=needs_decord)])
@pytest.mark.parametrize("damage", ["half", "cut after the index", "zeros"])
def test_damaged_files(write_video: Writer, backend, damage: str) -> None:
    path = write_video("a.mp4", 60, options={"movflags": "faststart", "bf": "2"})
    data = path.read_bytes()
    media = data.index(b"mdat")
    if damage == "half":
        data = data[: media // 2]
    elif damage == "cut after the index":
        data = data[: (media + len(data)) // 2]
    else:
        data = data[: media + 1500] + bytes(600) + data[media + 2100 :]
    path.write_bytes(data)
    with pytest.raises(MediaError, match=r"a\.mp4: ") as caught:
        load_video(path, backend=backend)
    assert caught.value.kind == "corrupt"


def test_limits(write_video: Writer) -> None:
    path = write_video("a.mp4", 50)
    exact = {"video_frames": 50, "video_seconds": 2, "video_pixels": 64 * 48, "video_decoded_bytes": 50 * 64 * 48 * 3}
    assert len(load_video(path, limits=MediaLimits(**exact)).frames) == 50
    for name, value in exact.items():
        with pytest.raises(MediaError, match=r"more than|longer than|must have") as caught:
            load_video(path, limits=MediaLimits(**{name: value * 0.98}))
        assert caught.value.kind == "limit"
    with pytest.raises(MediaError, match="larger than 99 bytes"):
        load_video(path, limits=MediaLimits(video_bytes=99))
    with pytest.raises(MediaError, match="more than 3000 frames"):
        load_video(path, frames_per_second=10_000)
    with pytest.raises(MediaError, match="1e-09 seconds") as caught:
        load_video(path, limits=MediaLimits(deadline_seconds=1e-9))
    assert caught.value.kind == "deadline"


def test_a_forged_frame_size_is_refused_before_a_frame_is_allocated(write_video: Writer) -> None:
    path = write_video("a.webm", 5, codec="libvpx")
    start_code = b"\x9d\x01\x2a"  # of a VP8 key frame, before its own width and height
    honest = start_code + struct.pack("<HH", 64, 48)
    assert path.read_bytes().count(honest) == 1
    path.write_bytes(path.read_bytes().replace(honest, start_code + struct.pack("<HH", 16_383, 16_383)))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(MediaError, match=r"a\.webm"):
        load_video(path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # KiB; the frame would take 400 MB


@needs_decord
def test_decord_refuses_widths_that_it_would_garble(write_video: Writer) -> None:
    path = write_video("a.mp4", 3, size=(48, 64))
    assert frame_numbers(load_video(path).frames) == [0, 1, 2]
    with pytest.raises(MediaError, match="use pyav") as caught:
        load_video(path, backend="decord")
    assert caught.value.kind == "unsupported"


def test_one_frame_and_odd_sizes(write_video: Writer) -> None:
    assert load_video(write_video("one.mp4", 1, rate=30)).frames.shape == (1, 48, 64, 3)
    assert load_video(write_video("slow.mp4", 2, rate=1), frames_per_second=0.25).frames.shape[0] == 1
    tall = load_video(write_video("tall.mkv", 2, size=(18, 200), codec="mpeg4"))
    assert tall.frames.shape == (2, 200, 18, 3)


def test_a_codec_that_is_not_on_the_list(write_video: Writer) -> None:
    with pytest.raises(MediaError, match="codec must be one of h264") as caught:
        load_video(write_video("a.mkv", 2, codec="ffv1"))
    assert caught.value.kind == "unsupported"


def test_audio_alone_is_no_video(tmp_path: Path) -> None:
    with av.open(tmp_path / "a.mp4", "w") as container:
        stream = container.add_stream("aac", rate=16_000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 16_000), np.float32), format="fltp", layout="mono")
        frame.sample_rate, frame.pts, frame.time_base = 16_000, 0, Fraction(1, 16_000)
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    with pytest.raises(MediaError, match="no video stream"):
        load_video(tmp_path / "a.mp4")


def test_settings_that_make_no_sense(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="backend must be one of pyav, decord, got 'cv2'"):
        load_video(tmp_path / "a.mp4", backend="cv2")
    with pytest.raises(ValueError, match="frames_per_second must be above 0 or None, got 0"):
        load_video(tmp_path / "a.mp4", frames_per_second=0)
    with pytest.raises(ValueError, match="medium must be one of image, audio, video, got 'smell'"):
        MediaLoader()("smell", tmp_path / "a.mp4")


@needs_decord
def test_the_loader_passes_its_settings_on(write_video: Writer) -> None:
    path = write_video("a.mp4", 20)
    loader = MediaLoader(frames_per_second=10.0, gray=True, backend="decord")
    video = loader("video", path)
    np.testing.assert_array_equal(video.frames, to_gray(load_video(path, frames_per_second=10.0).frames))


@needs_decord
def test_a_file_that_ends_decord_is_one_error_and_the_next_file_is_read(write_video: Writer) -> None:
    """Decord does not raise over this file: it ends its process with a fault of memory."""
    odd = Path(__file__).parent.parent / "fixtures" / "decord-segv-1.avi"
    good = write_video("good.mp4", 10)
    for _ in range(2):
        with pytest.raises(MediaError, match="decord broke down over the file: use pyav") as caught:
            load_video(odd, backend="decord")
        assert caught.value.kind == "corrupt"
        assert frame_numbers(load_video(good, backend="decord").frames) == list(range(10))
    assert load_video(odd).frames.shape == (1, 48, 64, 3)
    with pytest.raises(MediaError, match=r"did not answer in time|decoding took longer") as caught:
        load_video(good, backend="decord", limits=MediaLimits(deadline_seconds=1e-6))
    assert caught.value.kind == "deadline"
    assert frame_numbers(load_video(good, backend="decord").frames) == list(range(10))


def test_ctrl_c_does_not_reach_decord_which_a_step_may_still_need() -> None:
    """A terminal interrupts every process of its foreground group; whoever finishes its step goes on reading."""
    child = decord_process._running()
    try:
        assert os.getpgid(child.pid) != os.getpgrp()
    finally:
        child.kill()
        child.wait()


@pytest.mark.parametrize(
    ("name", "codec", "options"),
    [
        ("a.mp4", "libx264", {"bf": "3", "g": "40"}),
        ("a.mp4", "libx264", {"bf": "0", "g": "400"}),
        ("a.mkv", "libx264", {"bf": "2", "g": "30"}),
        ("a.webm", "libvpx-vp9", {"deadline": "realtime", "cpu-used": "8", "g": "50"}),
        ("a.avi", "mpeg4", {}),
    ],
)
@pytest.mark.parametrize("count", [1, 5, 16])
def test_of_a_video_beyond_the_limits_a_few_frames_are_taken_all_the_same(
    write_video: Writer, name: str, codec: str, options: dict[str, str], count: int
) -> None:
    path = write_video(name, 200, codec=codec, options=options)
    sampling = FrameSampling(count)
    whole = load_video(path, frames_per_second=sampling)
    for limits in (MediaLimits(video_seconds=1), MediaLimits(video_frames=20)):
        with pytest.raises(MediaError, match=r"\(limits\.video_(seconds|frames)\)"):
            load_video(path, limits=limits)
        few = load_video(path, frames_per_second=sampling, limits=limits)
        assert few.frames_per_second == whole.frames_per_second
        np.testing.assert_array_equal(few.frames, whole.frames)
    assert frame_numbers(whole.frames) == [round((k + 0.5) * 200 / count) for k in range(count)]


def test_only_what_leads_to_the_frames_taken_is_decoded(write_video: Writer, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_video("a.mp4", 600, options={"g": "10"})
    decoded = []
    first_from = video_module._first_from
    monkeypatch.setattr(
        video_module,
        "_first_from",
        lambda frames, stamp, deadline: first_from((decoded.append(f.pts) or f for f in frames), stamp, deadline),
    )
    load_video(path, frames_per_second=FrameSampling(4), limits=MediaLimits(video_seconds=5))
    assert 4 <= len(decoded) <= 4 * 20
