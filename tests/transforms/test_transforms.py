"""Transforms equal their plain formulas and the Hugging Face processors."""

import pickle

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    HubertConfig,
    Wav2Vec2FeatureExtractor,
    WhisperConfig,
    WhisperFeatureExtractor,
)

from mllm.media import Audio, Video, to_gray
from mllm.transforms.encoder_inputs import (
    ImageTransform,
    LipTransform,
    NotMouthCrops,
    Waveform,
    WhisperMel,
    build_transform,
    standardize,
)
from mllm.utils.random_generator import random_generator


def random_audio(num_samples: int = 16_000, *, rate_hz: int = 16_000, seed: int = 0, level: float = 0.1) -> Audio:
    """Make white noise with an offset."""
    samples = np.random.default_rng(seed).normal(0.01, level, num_samples).astype(np.float32)
    return Audio(samples, rate_hz)


def clip(num_frames: int = 4, height: int = 96, width: int = 96, *, colour: bool = False) -> Video:
    """Make random frames."""
    shape = (num_frames, height, width, 3) if colour else (num_frames, height, width)
    return Video(np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8), 25.0)


def test_standardize_is_the_plain_formula() -> None:
    samples = random_audio().samples
    wide = samples.astype(np.float64)
    expected = torch.nn.functional.layer_norm(torch.from_numpy(wide), wide.shape, eps=1e-8).numpy()
    np.testing.assert_allclose(standardize(samples, 1e-8), expected, atol=1e-5)
    assert not standardize(np.full(10, 0.3, np.float32), 1e-8).any()


@pytest.mark.parametrize("standardized", [False, True])
def test_waveform_equals_the_feature_extractor(standardized: bool) -> None:
    audio = random_audio(5_000)
    values, length = Waveform(standardized=standardized)(audio)
    extractor = Wav2Vec2FeatureExtractor(do_normalize=standardized)
    expected = extractor(audio.samples, sampling_rate=16_000, return_tensors="pt")["input_values"][0]
    torch.testing.assert_close(values, expected)
    assert length == 5_000


@pytest.mark.parametrize("standardized", [False, True])
def test_whisper_mel_equals_the_feature_extractor(standardized: bool) -> None:
    extractor = WhisperFeatureExtractor(feature_size=80, chunk_length=4)
    audio = random_audio(40_000)
    values, length = WhisperMel(extractor, standardized)(audio)
    heard = standardize(audio.samples, 1e-8) if standardized else audio.samples
    expected = extractor(heard, sampling_rate=16_000, return_tensors="pt")["input_features"][0]
    assert values.shape == (80, 400)
    assert length == 40_000
    torch.testing.assert_close(values, expected)


def test_audio_that_does_not_fit_is_refused() -> None:
    mel = WhisperMel(WhisperFeatureExtractor(feature_size=80, chunk_length=2))
    assert mel(random_audio(32_000))[0].shape == (80, 200)
    with pytest.raises(ValueError, match=r"lasts 2\.01 seconds, the encoder's window is 2 seconds"):
        mel(random_audio(32_160))
    for transform in (mel, Waveform()):
        with pytest.raises(ValueError, match="takes audio at 16000 Hz, got 8000 Hz"):
            transform(random_audio(rate_hz=8_000))


@pytest.mark.parametrize("colour", [False, True])
def test_crops_of_evaluation_are_the_normalised_centre(colour: bool) -> None:
    video = clip(colour=colour)
    values, length = LipTransform(size=96, crop_size=88)(video)
    gray = to_gray(video.frames) if colour else video.frames
    expected = (gray[:, None, 4:92, 4:92] / 255 - 0.421) / 0.165
    assert length == 4
    assert values.dtype == torch.float32
    np.testing.assert_allclose(values.numpy(), expected, atol=1e-5)


def test_crops_at_random_are_one_crop_for_the_whole_clip() -> None:
    video = clip(3, 20, 18)
    transform = LipTransform(size=None, crop_size=16)
    pieces = {
        (top, left): torch.from_numpy((video.frames[:, top : top + 16, left : left + 16] / 255 - 0.421) / 0.165)
        for top in range(5)
        for left in range(3)
    }
    positions = set()
    for epoch in range(150):
        crop = transform(video, random_generator(0, epoch, "a", "crop"))[0][:, 0].double()
        result = [index for index, piece in pieces.items() if torch.allclose(crop, piece, atol=1e-5)]
        assert len(result) == 1
        positions.add(result[0])
    assert positions == set(pieces)
    again = [transform(video, random_generator(0, 5, "a", "crop"))[0] for _ in range(2)]
    assert torch.equal(*again)


def test_frames_are_brought_to_size_by_their_shorter_side() -> None:
    values, _ = LipTransform(size=24, crop_size=24, mean=0.0, std=1.0)(clip(2, 48, 96))
    assert values.shape == (2, 1, 24, 24)
    flat = Video(np.full((1, 48, 96), 100, np.uint8), 25.0)
    resized, _ = LipTransform(size=24, crop_size=20, mean=0.0, std=1.0)(flat)
    np.testing.assert_allclose(resized.numpy(), 100 / 255, atol=1e-6)


def test_lip_settings_that_make_no_sense() -> None:
    with pytest.raises(ValueError, match=r"at least 88 pixels \(crop_size\) wide and high, got 96 x 80"):
        LipTransform(size=None, crop_size=88)(clip(1, 80, 96))
    with pytest.raises(ValueError, match=r"crop_size must be 1 to size \(64\), got 88"):
        LipTransform(size=64, crop_size=88)
    with pytest.raises(ValueError, match="std must be above 0, got 0"):
        LipTransform(size=None, crop_size=8, std=0)


def test_image_transform_equals_the_processor() -> None:
    processor = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8))
    values, length = ImageTransform(processor)(image)
    assert length == 1
    torch.testing.assert_close(values, processor(images=[image], return_tensors="pt")["pixel_values"][0])


def test_image_processors_that_make_tiles_are_refused() -> None:
    class Tiling(CLIPImageProcessorPil):
        def __call__(self, images, **kwargs):
            return super().__call__(images * 2, **kwargs)

    with pytest.raises(ValueError, match="Tiling must give one image"):
        ImageTransform(Tiling())(Image.new("RGB", (300, 300)))


def test_building_from_plain_settings() -> None:
    preprocessor = CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8))
    built = build_transform("image", CLIPVisionConfig(), preprocessor.to_dict())
    torch.testing.assert_close(built(image)[0], ImageTransform(preprocessor)(image)[0])

    extractor = WhisperFeatureExtractor(feature_size=80, chunk_length=2)
    built = build_transform("audio", WhisperConfig(), {**extractor.to_dict(), "normalize_audio": True})
    torch.testing.assert_close(built(random_audio())[0], WhisperMel(extractor, standardized=True)(random_audio())[0])

    wave = Wav2Vec2FeatureExtractor(do_normalize=True).to_dict()
    assert build_transform("audio", HubertConfig(), wave) == Waveform(16_000, standardized=True)
    plain = {**wave, "do_normalize": False, "normalize_audio": False}
    assert build_transform("audio", HubertConfig(), plain) == Waveform(16_000, standardized=False)
    assert build_transform("video", None, {"crop_pixels": 80}) == LipTransform(size=None, crop_size=80)

    with pytest.raises(ValueError, match="no image processor 'Nope'"):
        build_transform("image", None, {"image_processor_type": "Nope"})
    with pytest.raises(ValueError, match="medium must be one of image, audio, video, got 'smell'"):
        build_transform("smell", None, {})


def test_transforms_travel_to_workers() -> None:
    extractor = WhisperFeatureExtractor(feature_size=80, chunk_length=2)
    for transform, raw in [
        (WhisperMel(extractor), random_audio()),
        (Waveform(standardized=True), random_audio()),
        (LipTransform(size=None, crop_size=88), clip()),
        (ImageTransform(CLIPImageProcessorPil()), Image.new("RGB", (9, 9), "red")),
    ]:
        copy = pickle.loads(pickle.dumps(transform))
        torch.testing.assert_close(copy(raw)[0], transform(raw)[0])


@pytest.mark.parametrize(
    ("crop", "size", "frames", "is_mouth"),
    [
        *((88, None, frames, True) for frames in ((96, 96), (88, 88), (128, 128), (160, 160), (120, 90), (176, 176))),
        *((88, None, frames, False) for frames in ((178, 178), (224, 224), (256, 256), (640, 480), (1080, 1920))),
        *((88, 96, frames, True) for frames in ((96, 96), (512, 512), (256, 192), (640, 512), (240, 180))),
        *((88, 96, frames, False) for frames in ((640, 480), (480, 640), (1920, 1080), (1080, 1920))),
        *((44, None, frames, True) for frames in ((48, 48), (96, 96))),
        (44, None, (160, 160), False),
    ],
)
def test_frames_of_a_whole_face_are_told_from_crops_of_a_mouth(
    crop: int, size: int | None, frames: tuple[int, int], is_mouth: bool
) -> None:
    transform = LipTransform(size=size, crop_size=crop)
    video = Video(np.zeros((1, frames[1], frames[0]), np.uint8), 25.0)
    if is_mouth:
        assert transform(video)[0].shape == (1, 1, crop, crop)
        return
    with pytest.raises(NotMouthCrops, match=rf"{frames[0]} x {frames[1]} pixels, .* middle {crop} x {crop}"):
        transform(video)
