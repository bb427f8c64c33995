"""The quick log-mel is the feature extractor's, to the last bit, at every length of a clip."""

import numpy as np
import pytest
import torch
from transformers import WhisperFeatureExtractor

from mllm.transforms.log_mel import FRAME_BLOCK, whisper_log_mel

LENGTHS = [1, 199, 200, 201, 1_600, 16_000, 40_000, 123_457, 240_000, 478_700, 479_999, 480_000]


def expected(samples: np.ndarray, extractor: WhisperFeatureExtractor) -> np.ndarray:
    return extractor(samples, sampling_rate=16_000, return_tensors="np")["input_features"][0]


@pytest.mark.parametrize("num_bins", [80, 128])
def test_every_length_equals_the_feature_extractor(num_bins: int) -> None:
    extractor = WhisperFeatureExtractor(feature_size=num_bins)
    rng = np.random.default_rng(0)
    # Also where the frames that are computed come to just fill a block, or just fail to.
    edges = [FRAME_BLOCK * 160 * blocks - 200 + step for blocks in (1, 5, 46) for step in (-1, 0, 1)]
    for length in [*LENGTHS, *edges, *rng.integers(1, 480_000, 12)]:
        samples = (0.1 * rng.standard_normal(length)).astype(np.float32)
        assert np.array_equal(whisper_log_mel(samples, extractor).numpy(), expected(samples, extractor)), length


def test_the_range_limit_looks_at_the_whole_window() -> None:
    """A loud clip raises the silence after it, a faint one does not, and silence alone is its own loudest value."""
    extractor = WhisperFeatureExtractor()
    tone = np.sin(np.arange(16_000) * 0.2).astype(np.float32)
    silence = (np.log10(1e-10) + 4) / 4
    for level, is_raised in ((1.0, True), (1e-5, False), (0.0, False)):
        mel = whisper_log_mel(level * tone, extractor)
        assert np.array_equal(mel.numpy(), expected(level * tone, extractor))
        assert bool(mel[0, -1] > silence + 1e-6) is is_raised


def test_other_windows_and_other_layouts_of_samples() -> None:
    extractor = WhisperFeatureExtractor(feature_size=40, chunk_length=4)
    samples = np.random.default_rng(0).standard_normal((20_000, 2)).astype(np.float32)[:, 0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mel = whisper_log_mel(samples, extractor)
    assert mel.shape == (40, 400)
    assert np.array_equal(mel.numpy(), expected(samples, extractor))


def test_an_extractor_that_pads_with_audio_is_followed() -> None:
    extractor = WhisperFeatureExtractor(padding_value=0.5)
    samples = np.zeros(16_000, dtype=np.float32)
    assert np.array_equal(whisper_log_mel(samples, extractor).numpy(), expected(samples, extractor))


def test_no_samples_and_too_many_are_refused() -> None:
    for length in (0, 480_001):
        with pytest.raises(ValueError, match=f"a clip must have 1 to 480000 samples, got {length}"):
            whisper_log_mel(np.zeros(length, dtype=np.float32), WhisperFeatureExtractor())
