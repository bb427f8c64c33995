"""What is handed over in memory is what the loader gives for a file of the same contents."""

import base64
import io
from pathlib import Path

import numpy as np
import pytest
import soundfile
import tiny
import torch
from PIL import Image

from mllm.media import (
    FrameSampling,
    InMemoryMedium,
    MediaError,
    MediaLoader,
    decode_in_memory,
    items_of,
    load_video,
    path_of,
)
from mllm.media.image import load_image

LOADER = MediaLoader(gray=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write real files, and an image that its EXIF tag turns."""
    folder = tmp_path_factory.mktemp("given")
    tiny.write_media(folder)
    exif = Image.Exif()
    exif[274] = 6
    Image.open(folder / "0.png").save(folder / "turned.jpg", exif=exif)
    return folder


def image(value: object) -> np.ndarray:
    return np.asarray(decode_in_memory(InMemoryMedium("image", value), LOADER))


def samples_of(value: object) -> np.ndarray:
    result = decode_in_memory(InMemoryMedium("audio", value), LOADER)
    assert result.sample_rate_hz == 16_000  # type: ignore[union-attr]
    return result.samples  # type: ignore[union-attr]


def test_every_form_of_an_image_gives_the_same_pixels(folder: Path) -> None:
    pixels = np.asarray(load_image(folder / "0.png"))
    data = (folder / "0.png").read_bytes()
    forms = [
        data,
        bytearray(data),
        io.BytesIO(data),
        f"data:image/png;base64,{base64.b64encode(data).decode()}",
        Image.open(folder / "0.png"),
        pixels,
        torch.from_numpy(pixels.copy()),
        pixels.transpose(2, 0, 1),
        np.dstack([pixels, np.full(pixels.shape[:2], 255, np.uint8)]),
    ]
    for form in forms:
        assert np.array_equal(image(form), pixels), type(form)
    assert np.array_equal(image(pixels[..., 0])[..., 1], pixels[..., 0])


def test_an_image_that_was_opened_is_turned_as_its_file_is(folder: Path) -> None:
    upright = np.asarray(load_image(folder / "turned.jpg"))
    assert upright.shape == (60, 40, 3)
    assert np.array_equal(image(Image.open(folder / "turned.jpg")), upright)


def test_every_form_of_audio_gives_the_same_samples(folder: Path) -> None:
    data = (folder / "0.wav").read_bytes()
    whole, _ = soundfile.read(folder / "0.wav", dtype="int16")
    expected = LOADER("audio", folder / "0.wav").samples  # type: ignore[union-attr]
    forms = [
        data,
        (folder / "0.wav").open("rb"),
        whole,
        (whole, 16_000),
        {"array": whole, "sampling_rate": 16_000},
        whole[None],
        torch.from_numpy(whole / np.float32(32_768)),
    ]
    for form in forms:
        assert np.allclose(samples_of(form), expected, atol=1e-7), type(form)
    assert len(samples_of((whole, 8_000))) == 2 * len(whole)


def test_every_form_of_a_video_gives_the_same_frames(folder: Path) -> None:
    colour = load_video(folder / "0.mp4")
    grey = decode_in_memory(InMemoryMedium("video", (folder / "0.mp4").read_bytes()), LOADER)
    assert np.array_equal(grey.frames, LOADER("video", folder / "0.mp4").frames)  # type: ignore[union-attr]
    forms = [colour, colour.frames, (colour.frames, 25), [Image.fromarray(frame) for frame in colour.frames]]
    for form in forms:
        result = decode_in_memory(InMemoryMedium("video", form), LOADER)
        assert result.frames.shape == (20, 48, 48)  # type: ignore[union-attr]
        assert result.frames[3, 5, 7] == int(np.asarray(Image.fromarray(colour.frames[3]).convert("L"))[5, 7])  # type: ignore[union-attr]
    half = decode_in_memory(InMemoryMedium("video", (colour.frames, 12.5)), LOADER)
    assert len(half.frames) == 40  # type: ignore[union-attr]


def test_frames_are_sampled_as_from_the_file(folder: Path) -> None:
    sampling = FrameSampling(4)
    expected = LOADER.frames(folder / "0.mp4", sampling)
    for form in ((folder / "0.mp4").read_bytes(), load_video(folder / "0.mp4"), load_video(folder / "0.mp4").frames):
        result = decode_in_memory(InMemoryMedium("video", form), LOADER, sampling)
        assert np.array_equal(result.frames, expected.frames)  # type: ignore[union-attr]


REFUSED = [
    ("image", 3, "image is 3; allowed are a path"),
    ("image", np.zeros((4, 4, 3)), r"must be uint8 \(0 to 255\), got float64"),
    ("image", np.zeros((6, 6, 5), np.uint8), r"has shape \(6, 6, 5\); allowed"),
    ("image", Image.new("F", (4, 4)), "pixels of the kind F; allowed are 1, L"),
    ("image", "data:image/png,abc", "a data: URL must be base64"),
    ("audio", np.zeros((2, 9)), r"has shape \(2, 9\); it must be one channel"),
    ("audio", np.zeros(9, np.uint8), "must be float, int16 or int32, got uint8"),
    ("audio", np.full(9, np.nan), "are not all finite numbers"),
    ("audio", (np.zeros(9), 0), "the rate of audio must be a whole number above 0, got 0"),
    ("audio", {"array": np.zeros(9)}, "must hold array and sampling_rate, got array"),
    ("video", np.zeros((8, 8, 3), np.uint8), r"has shape \(8, 8, 3\) of uint8; allowed"),
    ("video", np.zeros((2, 8, 8, 3)), "of float64; allowed"),
    ("video", (np.zeros((2, 8, 8), np.uint8), 0), "the rate of a video must be above 0"),
]


@pytest.mark.parametrize(("medium", "value", "message"), REFUSED)
def test_what_has_no_one_meaning_is_refused(medium: str, value: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        decode_in_memory(InMemoryMedium(medium, value), LOADER)


def test_bytes_are_under_the_limits_of_files() -> None:
    with pytest.raises(MediaError, match=r"<3 bytes>: not an image in one of the formats"):
        image(b"abc")
    with pytest.raises(MediaError, match="the file is empty"):
        samples_of(b"")


def test_one_and_several_are_told_apart() -> None:
    one, grey, clip = np.zeros((4, 4, 3), np.uint8), np.zeros((4, 4), np.uint8), np.zeros((5, 4, 4, 3), np.uint8)
    samples = np.zeros(9)
    frame = Image.new("RGB", (4, 4))
    assert [len(items_of("image", value)) for value in (None, "a.png", one, grey, frame, [one, "a"], clip)] == [
        *(0, 1, 1, 1, 1, 2, 5),
    ]
    assert [len(items_of("audio", value)) for value in (samples, (samples, 8_000), [samples, samples])] == [1, 1, 2]
    assert [len(items_of("video", value)) for value in (clip, (clip, 30.0), [clip, clip], [frame, frame])] == [
        *(1, 1, 2, 1),
    ]
    with pytest.raises(ValueError, match="image is 16; allowed are a path"):
        items_of("image", 16)


def test_nothing_is_fetched() -> None:
    with pytest.raises(ValueError, match=r"image is 'https://a.b/c.png'; nothing is fetched from the network"):
        path_of("image", "https://a.b/c.png")
    assert path_of("image", "file:///a/b.png") == "/a/b.png"
