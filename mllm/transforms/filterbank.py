"""Computes log filterbank features of audio, as AV-HuBERT hears: 26 mel bins of 25 ms every 10 ms, four frames stacked
to one.

Knows samples at 16 kHz. Does not know files, encoders or batches.

The recipe is that of the features AV-HuBERT was trained on (16-bit sample values, pre-emphasis, no window, a power
spectrum of 512 points, triangles between whole bins of it); they are stacked by four, to the 25 frames per second of
video, and each stacked frame is normalised.

Shapes: L samples, F frames of 10 ms, T = F / 4 rounded up.
Sources: AV-HuBERT (arXiv 2201.02184), section on inputs.
"""

import numpy as np

SAMPLE_RATE_HZ = 16_000
NUM_MEL_BINS = 26
NUM_STACKED = 4
WINDOW_SAMPLES, HOP_SAMPLES, FFT_SAMPLES = 400, 160, 512
PRE_EMPHASIS = 0.97
FULL_SCALE = 32_768
NORM_EPSILON = 1e-5


def num_stacked_frames(num_samples: int) -> int:
    """Return T of audio of L samples; the last window is filled up with zeros.

    Raises:
        ValueError: audio without samples.
    """
    if num_samples < 1:
        raise ValueError(f"audio of {num_samples} samples is too short: at least 1 is needed")
    return -(-_num_frames(num_samples) // NUM_STACKED)


def log_filterbank(samples: np.ndarray) -> np.ndarray:
    """Turn (L,) in -1..1 into (F, 26) float32, natural logarithms of mel energies of 16-bit sample values."""
    scaled = samples.astype(np.float64) * FULL_SCALE
    emphasised = np.append(scaled[:1], scaled[1:] - PRE_EMPHASIS * scaled[:-1])
    num_frames = _num_frames(len(samples))
    padded = np.zeros((num_frames - 1) * HOP_SAMPLES + WINDOW_SAMPLES)
    padded[: len(emphasised)] = emphasised
    frames = np.lib.stride_tricks.sliding_window_view(padded, WINDOW_SAMPLES)[::HOP_SAMPLES]
    power = np.abs(np.fft.rfft(frames, FFT_SAMPLES)) ** 2 / FFT_SAMPLES
    energies = power @ _triangles().T
    return np.log(np.where(energies == 0, np.finfo(float).eps, energies)).astype(np.float32)


def stacked_filterbank(samples: np.ndarray) -> np.ndarray:
    """Turn (L,) in -1..1 into (T, 104) float32: zeros fill the last stack, and each row has zero mean and unit
    variance.
    """
    frames = log_filterbank(samples)
    missing = -len(frames) % NUM_STACKED
    stacked = np.pad(frames, ((0, missing), (0, 0))).reshape(-1, NUM_STACKED * NUM_MEL_BINS)
    centred = stacked - stacked.mean(axis=1, keepdims=True)
    return centred / np.sqrt(stacked.var(axis=1, keepdims=True) + NORM_EPSILON)


def _num_frames(num_samples: int) -> int:
    """Return F: one frame, and one more for every hop begun beyond the first window."""
    return 1 + max(-(-(num_samples - WINDOW_SAMPLES) // HOP_SAMPLES), 0)


def _triangles() -> np.ndarray:
    """Return the weights (26, 257): each bin rises from its left neighbour's centre to its own and falls to its right
    neighbour's.
    """
    mels = np.linspace(0, 2595 * np.log10(1 + SAMPLE_RATE_HZ / 2 / 700), NUM_MEL_BINS + 2)
    edges = np.floor((FFT_SAMPLES + 1) * 700 * (10 ** (mels / 2595) - 1) / SAMPLE_RATE_HZ).astype(int)
    weights = np.zeros((NUM_MEL_BINS, FFT_SAMPLES // 2 + 1))
    for index, (left, centre, right) in enumerate(zip(edges, edges[1:], edges[2:], strict=False)):
        weights[index, left:centre] = (np.arange(left, centre) - left) / (centre - left)
        weights[index, centre:right] = (right - np.arange(centre, right)) / (right - centre)
    return weights
