"""Transforms equal their plain formulas and the Hugging Face processors; chance is a function of its arguments."""

import math
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
from mllm.transforms.noise import MixNoise
from mllm.utils.random_generator import random_generator


def sound(num_samples: int = 16_000, *, rate_hz: int = 16_000, seed: int = 0, level: float = 0.1) -> Audio:
    """White noise with an offset."""
    samples = np.random.default_rng(seed).normal(0.01, level, num_samples).astype(np.float32)
    return Audio(samples, rate_hz)


def clip(num_frames: int = 4, height: int = 96, width: int = 96, *, colour: bool = False) -> Video:
    """Random frames."""
    shape = (num_frames, height, width, 3) if colour else (num_frames, height, width)
    return Video(np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8), 25.0)


def test_random_generator_is_a_function_of_its_four_arguments() -> None:
    base = (1, 2, "a", "crop")
    draw = random_generator(*base).random(4)
    np.testing.assert_array_equal(draw, random_generator(*base).random(4))
    for other in [(2, 2, "a", "crop"), (1, 3, "a", "crop"), (1, 2, "b", "crop"), (1, 2, "a", "noise")]:
        assert not np.array_equal(draw, random_generator(*other).random(4))
    assert random_generator(1, 2, "a/b", "c").random() != random_generator(1, 2, "a", "b/c").random()
    # Pinned: another hash would silently change what every resumed run draws.
    assert random_generator(0, 0, "id", "noise").integers(0, 1_000_000, 3).tolist() == [894571, 556146, 793140]


def test_random_generators_of_neighbours_are_not_correlated() -> None:
    draws = np.array([random_generator(0, 0, str(i), "crop").random() for i in range(4_000)])
    assert abs(draws.mean() - 0.5) < 0.02
    assert abs(np.corrcoef(draws[:-1], draws[1:])[0, 1]) < 0.05


@pytest.mark.parametrize("snr_db", [-20.0, -5.0, 0.0, 7.5, 30.0])
@pytest.mark.parametrize("num_noise", [700, 16_000, 50_000])
def test_the_ratio_after_mixing_is_the_one_asked_for(snr_db: float, num_noise: int) -> None:
    speech, noise = sound(), sound(num_noise, seed=1, level=0.7)
    mixed = MixNoise(noise, snr_db)(speech, random_generator(0, 0, "a", "noise"))
    added = mixed.samples.astype(np.float64) - speech.samples
    measured = 10 * math.log10(np.mean(speech.samples.astype(np.float64) ** 2) / np.mean(added**2))
    assert measured == pytest.approx(snr_db, abs=0.05)
    assert mixed.samples.dtype == np.float32


def test_the_noise_is_a_contiguous_piece_that_chance_chooses() -> None:
    noise = Audio(np.arange(1, 1_001, dtype=np.float32), 16_000)
    mix = MixNoise(noise, 0.0)
    added = [
        mix(sound(300, level=1e-3), random_generator(0, epoch, "a", "noise")).samples - sound(300, level=1e-3).samples
        for epoch in (0, 0, 1)
    ]
    np.testing.assert_array_equal(added[0], added[1])
    assert not np.allclose(added[0], added[2])
    steps = np.diff(added[0])
    assert np.sum(~np.isclose(steps, np.median(steps), rtol=1e-2)) <= 1  # one jump at most: where the noise repeats


def test_one_of_several_ratios_is_drawn_and_none_is_clean() -> None:
    speech, mix = sound(), MixNoise(sound(seed=1), [None, 0.0, 10.0])
    seen = set()
    for number in range(60):
        added = mix(speech, random_generator(0, 0, str(number), "noise")).samples - speech.samples
        power = np.mean(added.astype(np.float64) ** 2)
        ratio = 10 * math.log10(np.mean(speech.samples.astype(np.float64) ** 2) / power) if power else None
        seen.add(None if ratio is None else round(ratio))
    assert seen == {None, 0, 10}


@pytest.mark.parametrize(
    ("num_noise", "gap"), [(20_000, (3_000, 11_000)), (20_000, (0, 19_990)), (20_000, (15, 20_000))]
)
def test_where_noise_is_silent_another_stretch_is_drawn(num_noise: int, gap: tuple[int, int]) -> None:
    """As of a recording with pauses of digital silence: every sound gets its ratio, from all over what is heard."""
    samples = sound(num_noise, seed=1).samples.copy()
    samples[slice(*gap)] = 0
    mix, speech = MixNoise(Audio(samples, 16_000), 0.0), sound(300)
    firsts = set()
    for number in range(200):
        mixed = mix(speech, random_generator(0, 0, str(number), "noise"))
        added = mixed.samples.astype(np.float64) - speech.samples
        assert 10 * math.log10(np.mean(speech.samples.astype(np.float64) ** 2) / np.mean(added**2)) == pytest.approx(
            0, abs=0.05
        )
        firsts.add(added.tobytes())
    assert len(firsts) > 120


def test_a_stretch_that_is_heard_is_drawn_as_ever() -> None:
    """Only silent draws are drawn again: noise without gaps gives what it gave before, to the sample."""
    noise, speech = sound(5_000, seed=1), sound(300)
    start = int(_advanced(random_generator(0, 0, "a", "noise")).integers(5_000))
    piece = np.take(noise.samples, np.arange(start, start + 300), mode="wrap").astype(np.float64)
    scale = math.sqrt(np.mean(speech.samples.astype(np.float64) ** 2) / np.mean(piece**2))
    mixed = MixNoise(noise, 0.0)(speech, random_generator(0, 0, "a", "noise")).samples
    np.testing.assert_array_equal(mixed, (speech.samples + scale * piece).astype(np.float32))


def _advanced(generator: np.random.Generator) -> np.random.Generator:
    """After the draw of a ratio, of which there is one."""
    generator.integers(1)
    return generator


def test_noise_that_cannot_be_mixed() -> None:
    chance, silence = random_generator(0, 0, "a", "noise"), Audio(np.zeros(100, np.float32), 16_000)
    with pytest.raises(ValueError, match="the sound is silent"):
        MixNoise(sound(), 0.0)(silence, chance)
    with pytest.raises(ValueError, match="the noise is silent throughout"):
        MixNoise(silence, 0.0)
    with pytest.raises(ValueError, match="cannot be mixed at 200 dB: rounding would make it"):
        MixNoise(sound(), 200.0)(sound(seed=1), chance)
    with pytest.raises(ValueError, match="one sample rate, got 16000 and 8000 Hz"):
        MixNoise(sound(rate_hz=8_000), 0.0)(sound(), chance)
    for bad in (math.inf, math.nan, []):
        with pytest.raises(ValueError, match="snr_db must be"):
            MixNoise(sound(), bad)


def test_standardize_is_the_plain_formula() -> None:
    samples = sound().samples
    wide = samples.astype(np.float64)
    expected = torch.nn.functional.layer_norm(torch.from_numpy(wide), wide.shape, eps=1e-8).numpy()
    np.testing.assert_allclose(standardize(samples, 1e-8), expected, atol=1e-5)
    assert not standardize(np.full(10, 0.3, np.float32), 1e-8).any()


@pytest.mark.parametrize("standardized", [False, True])
def test_waveform_equals_the_feature_extractor(standardized: bool) -> None:
    audio = sound(5_000)
    values, length = Waveform(standardized=standardized)(audio)
    extractor = Wav2Vec2FeatureExtractor(do_normalize=standardized)
    expected = extractor(audio.samples, sampling_rate=16_000, return_tensors="pt")["input_values"][0]
    torch.testing.assert_close(values, expected)
    assert length == 5_000


@pytest.mark.parametrize("standardized", [False, True])
def test_whisper_mel_equals_the_feature_extractor(standardized: bool) -> None:
    extractor = WhisperFeatureExtractor(feature_size=80, chunk_length=4)
    audio = sound(40_000)
    values, length = WhisperMel(extractor, standardized)(audio)
    heard = standardize(audio.samples, 1e-8) if standardized else audio.samples
    expected = extractor(heard, sampling_rate=16_000, return_tensors="pt")["input_features"][0]
    assert values.shape == (80, 400)
    assert length == 40_000
    torch.testing.assert_close(values, expected)


def test_sound_that_does_not_fit_is_refused() -> None:
    mel = WhisperMel(WhisperFeatureExtractor(feature_size=80, chunk_length=2))
    assert mel(sound(32_000))[0].shape == (80, 200)
    with pytest.raises(ValueError, match=r"lasts 2\.01 seconds, the encoder's window is 2 seconds"):
        mel(sound(32_160))
    for transform in (mel, Waveform()):
        with pytest.raises(ValueError, match="takes sound at 16000 Hz, got 8000 Hz"):
            transform(sound(rate_hz=8_000))


@pytest.mark.parametrize("colour", [False, True])
def test_lips_without_chance_are_the_normalised_centre(colour: bool) -> None:
    video = clip(colour=colour)
    values, length = LipTransform(size=96, crop_size=88)(video)
    gray = to_gray(video.frames) if colour else video.frames
    expected = (gray[:, None, 4:92, 4:92] / 255 - 0.421) / 0.165
    assert length == 4
    assert values.dtype == torch.float32
    np.testing.assert_allclose(values.numpy(), expected, atol=1e-5)


def test_lips_with_chance_are_one_crop_for_the_whole_clip() -> None:
    video = clip(3, 20, 18)
    transform = LipTransform(size=None, crop_size=16)
    pieces = {
        (top, left): torch.from_numpy((video.frames[:, top : top + 16, left : left + 16] / 255 - 0.421) / 0.165)
        for top in range(5)
        for left in range(3)
    }
    places = set()
    for epoch in range(150):
        crop = transform(video, random_generator(0, epoch, "a", "crop"))[0][:, 0].double()
        found = [place for place, piece in pieces.items() if torch.allclose(crop, piece, atol=1e-5)]
        assert len(found) == 1
        places.add(found[0])
    assert places == set(pieces)
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
    torch.testing.assert_close(built(sound())[0], WhisperMel(extractor, standardized=True)(sound())[0])

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
        (WhisperMel(extractor), sound()),
        (Waveform(standardized=True), sound()),
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
