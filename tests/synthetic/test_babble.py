"""What babble promises: a ratio that can be met exactly, zero included, from voices and sentences of one split only."""

import numpy as np
import pytest

from mllm.media import Audio
from mllm.synthetic.speech.babble import make_babble
from mllm.synthetic.speech.synthesis import LEVEL_RMS, synthesise
from mllm.synthetic.speech.voices import VOICES
from mllm.transforms.noise import MixNoise


@pytest.fixture(scope="module")
def babble() -> np.ndarray:
    return make_babble("test", seconds=6, seed=0)


def power(samples: np.ndarray) -> float:
    return float(np.mean(samples.astype(np.float64) ** 2))


@pytest.mark.parametrize("snr_db", [10.0, 0.0, -5.0])
def test_the_ratio_after_mixing_is_the_one_asked(babble: np.ndarray, snr_db: float) -> None:
    speech = synthesise("place blue at f two now", VOICES["test"][0]).samples
    mix = MixNoise(Audio(babble, 16_000), snr_db)
    for seed in range(5):
        noisy = mix(Audio(speech, 16_000), np.random.default_rng(seed)).samples
        measured = 10 * np.log10(power(speech) / power(noisy - speech))
        assert measured == pytest.approx(snr_db, abs=0.05)


def test_babble_differs_between_splits_and_not_between_runs(babble: np.ndarray) -> None:
    assert len(babble) == 6 * 16_000
    assert power(babble) == pytest.approx(LEVEL_RMS**2)
    assert np.array_equal(babble, make_babble("test", seconds=6, seed=0))
    assert not np.array_equal(babble, make_babble("train", seconds=6, seed=0))
    seconds = [power(part) for part in np.split(babble, 6)]
    assert max(seconds) / min(seconds) < 4, "babble of five has no holes"


def test_a_duration_must_be_positive() -> None:
    with pytest.raises(ValueError, match="seconds of babble must be positive, got 0"):
        make_babble("test", seconds=0, seed=0)
