"""What noise promises: the ratio that was asked for, zero included, from material of one split only."""

import numpy as np
import pytest

from mllm.world.noise import add_noise, make_babble, noise_generator
from mllm.world.speech import synthesise
from mllm.world.voices import VOICES


@pytest.fixture(scope="module")
def speech() -> np.ndarray:
    return synthesise("place blue at f two now", VOICES["test"][0]).samples


@pytest.fixture(scope="module")
def babble() -> np.ndarray:
    return make_babble("test", seconds=6, seed=0)


def power(samples: np.ndarray) -> float:
    return float(np.mean(samples.astype(np.float64) ** 2))


@pytest.mark.parametrize("snr_db", [20.0, 0.0, 0, -5.0, -20.0])
def test_the_ratio_after_mixing_is_the_one_asked(speech: np.ndarray, babble: np.ndarray, snr_db: float) -> None:
    for seed in range(5):
        noisy = add_noise(speech, babble, snr_db=snr_db, generator=np.random.default_rng(seed))
        measured = 10 * np.log10(power(speech) / power(noisy - speech))
        assert measured == pytest.approx(snr_db, abs=0.05)


def test_no_noise_is_none_and_not_zero(speech: np.ndarray, babble: np.ndarray) -> None:
    assert np.array_equal(add_noise(speech, babble, snr_db=None, generator=np.random.default_rng(0)), speech)
    assert not np.allclose(add_noise(speech, babble, snr_db=0, generator=np.random.default_rng(0)), speech)


def test_short_noise_is_repeated(speech: np.ndarray, babble: np.ndarray) -> None:
    noisy = add_noise(speech, babble[:8000], snr_db=0.0, generator=np.random.default_rng(1))
    np.testing.assert_allclose((noisy - speech)[:8000], (noisy - speech)[8000:16000], atol=1e-6)


def test_noise_is_a_function_of_seed_epoch_sample_and_purpose() -> None:
    def draw(**changed: object) -> float:
        arguments = {"seed": 1, "epoch": 2, "sample_id": "a", "purpose": "noise"} | changed
        return noise_generator(**arguments).random()

    changes = ({"seed": 2}, {"epoch": 3}, {"sample_id": "b"}, {"purpose": "snr"})
    assert draw() == draw()
    assert len({draw(), *(draw(**change) for change in changes)}) == 5


def test_babble_differs_between_splits_and_not_between_runs(babble: np.ndarray) -> None:
    assert len(babble) == 6 * 16_000
    assert np.array_equal(babble, make_babble("test", seconds=6, seed=0))
    assert not np.array_equal(babble, make_babble("train", seconds=6, seed=0))
    halves = [power(part) for part in np.split(babble, 6)]
    assert max(halves) / min(halves) < 4, "babble of five has no holes"


@pytest.mark.parametrize(
    ("speech_gain", "noise_gain", "snr_db", "message"),
    [(0, 1, 0.0, "speech has rms 0.0"), (1, 0, 0.0, "noise has rms 0.0"), (1, 1, float("inf"), "finite")],
)
def test_a_ratio_that_does_not_exist_is_refused(
    speech: np.ndarray, babble: np.ndarray, speech_gain: int, noise_gain: int, snr_db: float, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        add_noise(speech * speech_gain, babble * noise_gain, snr_db=snr_db, generator=np.random.default_rng(0))
