"""Noise is mixed at the ratio that was asked for, from all over what is heard of it."""

import math

import numpy as np
import pytest

from mllm.media import Audio
from mllm.transforms.noise import MAX_ESTIMATE_DB, MixNoise, estimated_snr_db
from mllm.utils.random_generator import random_generator


def random_audio(num_samples: int = 16_000, *, rate_hz: int = 16_000, seed: int = 0, level: float = 0.1) -> Audio:
    """Make white noise with an offset."""
    samples = np.random.default_rng(seed).normal(0.01, level, num_samples).astype(np.float32)
    return Audio(samples, rate_hz)


@pytest.mark.parametrize("snr_db", [-20.0, -5.0, 0.0, 7.5, 30.0])
@pytest.mark.parametrize("num_noise", [700, 16_000, 50_000])
def test_the_ratio_after_mixing_is_the_one_asked_for(snr_db: float, num_noise: int) -> None:
    speech, noise = random_audio(), random_audio(num_noise, seed=1, level=0.7)
    mixed = MixNoise(noise, snr_db)(speech, random_generator(0, 0, "a", "noise"))
    added = mixed.samples.astype(np.float64) - speech.samples
    measured = 10 * math.log10(np.mean(speech.samples.astype(np.float64) ** 2) / np.mean(added**2))
    assert measured == pytest.approx(snr_db, abs=0.05)
    assert mixed.samples.dtype == np.float32


def test_the_noise_is_a_contiguous_piece_chosen_at_random() -> None:
    noise = Audio(np.arange(1, 1_001, dtype=np.float32), 16_000)
    mix = MixNoise(noise, 0.0)
    added = [
        mix(random_audio(300, level=1e-3), random_generator(0, epoch, "a", "noise")).samples
        - random_audio(300, level=1e-3).samples
        for epoch in (0, 0, 1)
    ]
    np.testing.assert_array_equal(added[0], added[1])
    assert not np.allclose(added[0], added[2])
    steps = np.diff(added[0])
    assert np.sum(~np.isclose(steps, np.median(steps), rtol=1e-2)) <= 1  # one jump at most: where the noise repeats


def test_one_of_several_ratios_is_taken_and_none_is_clean() -> None:
    speech, mix = random_audio(), MixNoise(random_audio(seed=1), [None, 0.0, 10.0])
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
def test_where_noise_is_silent_another_stretch_is_taken(num_noise: int, gap: tuple[int, int]) -> None:
    """As of a recording with pauses of digital silence: every audio gets its ratio, from all over what is heard."""
    samples = random_audio(num_noise, seed=1).samples.copy()
    samples[slice(*gap)] = 0
    mix, speech = MixNoise(Audio(samples, 16_000), 0.0), random_audio(300)
    firsts = set()
    for number in range(200):
        mixed = mix(speech, random_generator(0, 0, str(number), "noise"))
        added = mixed.samples.astype(np.float64) - speech.samples
        assert 10 * math.log10(np.mean(speech.samples.astype(np.float64) ** 2) / np.mean(added**2)) == pytest.approx(
            0, abs=0.05
        )
        firsts.add(added.tobytes())
    assert len(firsts) > 120


def test_a_stretch_that_is_heard_is_taken_as_ever() -> None:
    """Only silent draws are drawn again: noise without gaps gives what it gave before, to the sample."""
    noise, speech = random_audio(5_000, seed=1), random_audio(300)
    start = int(_advanced(random_generator(0, 0, "a", "noise")).integers(5_000))
    piece = np.take(noise.samples, np.arange(start, start + 300), mode="wrap").astype(np.float64)
    scale = math.sqrt(np.mean(speech.samples.astype(np.float64) ** 2) / np.mean(piece**2))
    mixed = MixNoise(noise, 0.0)(speech, random_generator(0, 0, "a", "noise")).samples
    np.testing.assert_array_equal(mixed, (speech.samples + scale * piece).astype(np.float32))


def _advanced(generator: np.random.Generator) -> np.random.Generator:
    """Advance a generator past the choice of a ratio, of which there is one."""
    generator.integers(1)
    return generator


def test_noise_that_cannot_be_mixed() -> None:
    rng, silence = random_generator(0, 0, "a", "noise"), Audio(np.zeros(100, np.float32), 16_000)
    with pytest.raises(ValueError, match="the audio is silent"):
        MixNoise(random_audio(), 0.0)(silence, rng)
    with pytest.raises(ValueError, match="the noise is silent throughout"):
        MixNoise(silence, 0.0)
    with pytest.raises(ValueError, match="cannot be mixed at 200 dB: rounding would make it"):
        MixNoise(random_audio(), 200.0)(random_audio(seed=1), rng)
    with pytest.raises(ValueError, match="one sample rate, got 16000 and 8000 Hz"):
        MixNoise(random_audio(rate_hz=8_000), 0.0)(random_audio(), rng)
    for bad in (math.inf, math.nan, []):
        with pytest.raises(ValueError, match="snr_db must be"):
            MixNoise(random_audio(), bad)


def test_the_estimate_rises_with_the_ratio_and_not_with_the_level() -> None:
    speech = random_audio().samples.copy()
    speech[4_000:8_000] = 0  # a pause
    steady = random_audio(seed=1)
    estimates = [
        estimated_snr_db(MixNoise(steady, snr_db)(Audio(speech, 16_000), random_generator(0, 0, "a", "noise")))
        for snr_db in (-10.0, 0.0, 10.0, 20.0)
    ]
    assert estimates == sorted(estimates)
    # Speech fills three quarters, so it is 4/3 times as loud there as on average; what is heard is noise beside it.
    assert estimates[2] == pytest.approx(10 * math.log10(1 + 10 * 4 / 3), abs=1)
    clean = Audio(speech, 16_000)
    assert estimated_snr_db(clean) == MAX_ESTIMATE_DB, "digital silence"
    quiet = MixNoise(steady, 30.0)(clean, random_generator(0, 0, "a", "noise"))
    assert estimated_snr_db(quiet) == MAX_ESTIMATE_DB, "how quiet a quiet pause is says nothing"
    noisy = MixNoise(steady, 5.0)(clean, random_generator(0, 0, "a", "noise"))
    assert estimated_snr_db(Audio(4 * noisy.samples, 16_000)) == pytest.approx(estimated_snr_db(noisy))
    assert estimated_snr_db(Audio(np.zeros(100, np.float32), 16_000)) == 0
