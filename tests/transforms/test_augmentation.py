"""Augmentation does what its settings say, exactly, and each part of it draws for itself."""

import math

import numpy as np
import pytest

from mllm.media import Audio, Video
from mllm.transforms.augmentation import Augmentation, TimeMask, rngs_by_purpose
from mllm.transforms.encoder_inputs import LIP_MEAN, LIP_STD, LipTransform, Waveform, standardize
from mllm.transforms.noise import MixNoise
from mllm.utils.random_generator import random_generator


def random_audio(num_samples: int = 32_000, seed: int = 0) -> Audio:
    return Audio(np.random.default_rng(seed).normal(0, 0.1, num_samples).astype(np.float32), 16_000)


def video(num_frames: int = 60) -> Video:
    frames = np.random.default_rng(0).integers(1, 255, (num_frames, 8, 8), dtype=np.uint8)
    return Video(frames, 25.0)


def masked_runs(is_masked: np.ndarray) -> list[int]:
    """Return the lengths of the runs of True."""
    edges = np.flatnonzero(np.diff(np.r_[0, is_masked.astype(int), 0]))
    return (edges[1::2] - edges[::2]).tolist()


@pytest.mark.parametrize(("length", "expected"), [(1, 1), (24, 1), (25, 1), (26, 2), (50, 2), (51, 3), (250, 10)])
def test_a_clip_gets_a_stretch_per_stride_begun(length: int, expected: int) -> None:
    assert TimeMask(10, 25).count(length) == expected == int((length + 25 - 0.1) // 25)
    values = np.ones((length, 2))
    runs = [masked_runs(TimeMask(10, 25)(values, np.random.default_rng(n))[:, 0] == 0) for n in range(50)]
    assert max(map(len, runs)) <= expected
    assert sum(map(sum, runs)) <= 50 * expected * 9
    assert values.all()  # the clip itself is left alone


def test_stretches_are_shorter_than_the_window_of_every_length_and_everywhere() -> None:
    mask, values = TimeMask(10, 100), np.ones(100)
    masked = [mask(values, np.random.default_rng(number)) == 0 for number in range(2_000)]
    lengths = [int(one.sum()) for one in masked]
    assert set(lengths) == set(range(10))
    assert abs(np.mean(lengths) - 4.5) < 0.25
    hits = np.mean(masked, axis=0)
    assert hits[0] > 0
    assert hits[-1] > 0
    assert abs(hits[10:90].mean() - 4.5 / 95) < 0.01


def test_a_short_clip_is_never_masked_as_a_whole() -> None:
    for number in range(200):
        assert TimeMask(6_400, 16_000)(np.ones(3), np.random.default_rng(number)).any()
    with pytest.raises(ValueError, match="window and a stride above 0, got 0 and 5"):
        TimeMask(0, 5)


def test_masked_steps_are_zero_before_normalisation() -> None:
    augmentation = Augmentation(audio_mask=TimeMask(6_400, 16_000), video_mask=TimeMask(10, 25))
    rng = rngs_by_purpose(np.random.default_rng(3))
    heard = augmentation(random_audio(), rng)
    silent = heard.samples == 0
    assert 0 < silent.sum() < 12_800
    values, _ = Waveform(standardized=True)(heard)
    np.testing.assert_array_equal(values.numpy(), standardize(heard.samples, 1e-7))
    seen = augmentation(video(), rng)
    black = ~seen.frames.any(axis=(1, 2))
    assert 0 < black.sum() < 30
    crops, _ = LipTransform(size=None, crop_size=8)(seen)
    assert np.allclose(crops.numpy()[black], -LIP_MEAN / LIP_STD)
    np.testing.assert_array_equal(seen.frames[~black], video().frames[~black])


@pytest.mark.parametrize("snr_db", [-5.0, 0, 20.0])
def test_noise_is_mixed_into_the_masked_audio_at_the_ratio_asked(snr_db: float) -> None:
    noise, mask = random_audio(4_000, seed=1), TimeMask(6_400, 16_000)
    only_masked = Augmentation(audio_mask=mask)(random_audio(), rngs_by_purpose(np.random.default_rng(0))).samples
    both = Augmentation(MixNoise(noise, [snr_db]), mask)(
        random_audio(), rngs_by_purpose(np.random.default_rng(0))
    ).samples
    added = both.astype(np.float64) - only_masked
    measured = 10 * math.log10(np.mean(np.square(only_masked.astype(np.float64))) / np.mean(np.square(added)))
    assert measured == pytest.approx(snr_db, abs=0.05)
    np.testing.assert_allclose(added[:24_000], added[4_000:28_000], atol=1e-6)  # the noise is shorter and repeats
    assert np.abs(both).max() > 0  # and is heard through the gaps
    assert np.any(both[only_masked == 0] != 0)


def test_videos_are_mirrored_as_often_as_asked_all_frames_alike() -> None:
    clip = video(3)
    mirrored = clip.frames[:, :, ::-1]
    augmentation = Augmentation(flip_probability=0.5)
    seen = [augmentation(clip, rngs_by_purpose(random_generator(0, 0, str(n), "x"))).frames for n in range(60)]
    flips = [np.array_equal(frames, mirrored) for frames in seen]
    assert all(flip or np.array_equal(frames, clip.frames) for flip, frames in zip(flips, seen, strict=True))
    assert 15 < sum(flips) < 45
    assert Augmentation(flip_probability=1.0)(clip, rngs_by_purpose(np.random.default_rng(0))).frames.flags[
        "C_CONTIGUOUS"
    ]
    with pytest.raises(ValueError, match="flip_probability must be 0 to 1, got 2"):
        Augmentation(flip_probability=2)


def test_switching_one_part_on_changes_no_other() -> None:
    noise, mask = MixNoise(random_audio(4_000, seed=1), [0.0]), TimeMask(10, 25)
    alone = Augmentation(video_mask=mask)(video(), rngs_by_purpose(np.random.default_rng(5)))
    rng = rngs_by_purpose(np.random.default_rng(5))
    together = Augmentation(noise, TimeMask(6_400, 16_000), mask)
    together(random_audio(), rng)
    np.testing.assert_array_equal(together(video(), rng).frames, alone.frames)


def test_images_pass() -> None:
    image = object()
    assert Augmentation(flip_probability=1.0)(image, rngs_by_purpose(np.random.default_rng(0))) is image
