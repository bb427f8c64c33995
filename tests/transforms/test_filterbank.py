"""The filterbank AV-HuBERT hears is what its definition says, window by window and bin by bin."""

import itertools
import math

import numpy as np
import pytest

from mllm.transforms.filterbank import log_filterbank, num_stacked_frames, stacked_filterbank


def plain_filterbank(samples: np.ndarray) -> list[list[float]]:
    """Compute the definition in loops: pre-emphasis, 25 ms every 10 ms, power spectrum, triangles, logarithm."""
    scaled = [32768 * float(value) for value in samples]
    signal = [scaled[0]] + [now - 0.97 * before for before, now in itertools.pairwise(scaled)]
    num_frames = 1 if len(signal) <= 400 else 1 + math.ceil((len(signal) - 400) / 160)
    top = 2595 * math.log10(1 + 8000 / 700)
    edges = [math.floor(513 * 700 * (10 ** (top * index / 27 / 2595) - 1) / 16000) for index in range(28)]
    frames = []
    for start in range(0, 160 * num_frames, 160):
        window = np.zeros(512)
        piece = signal[start : start + 400]
        window[: len(piece)] = piece
        power = [abs(value) ** 2 / 512 for value in np.fft.rfft(window)]
        row = []
        for left, centre, right in zip(edges, edges[1:], edges[2:], strict=False):
            rising = sum(power[k] * (k - left) / (centre - left) for k in range(left, centre))
            falling = sum(power[k] * (right - k) / (right - centre) for k in range(centre, right))
            row.append(math.log(rising + falling or np.finfo(float).eps))
        frames.append(row)
    return frames


@pytest.mark.parametrize("num_samples", [1, 400, 401, 560, 561, 3000])
def test_frames_are_those_of_the_definition(num_samples: int) -> None:
    samples = np.random.default_rng(0).normal(0, 0.1, num_samples).astype(np.float32)
    result = log_filterbank(samples)
    np.testing.assert_allclose(result, plain_filterbank(samples), rtol=1e-5, atol=1e-5)
    assert len(stacked_filterbank(samples)) == num_stacked_frames(num_samples) == math.ceil(len(result) / 4)


def test_four_frames_in_their_order_make_one_of_zero_mean_and_unit_variance() -> None:
    samples = np.random.default_rng(1).normal(0, 0.1, 16_000).astype(np.float32)
    frames, stacked = log_filterbank(samples), stacked_filterbank(samples)
    assert stacked.shape == (25, 104)
    row = frames[4:8].reshape(-1)
    np.testing.assert_allclose(stacked[1], (row - row.mean()) / np.sqrt(row.var() + 1e-5), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(stacked.mean(axis=1), 0, atol=1e-4)
    assert num_stacked_frames(10 * 16_000) == 250


def test_silence_is_finite_and_no_audio_is_refused() -> None:
    assert np.isfinite(stacked_filterbank(np.zeros(5000, np.float32))).all()
    with pytest.raises(ValueError, match="audio of 0 samples is too short"):
        num_stacked_frames(0)
