"""Changes recordings as rooms, lines and other throats would: speed, echo, noise, a narrow band, loudness.

Knows samples. Does not know whose they are. Everything is a function of the samples and the generator.
"""

import numpy as np
from scipy.signal import butter, fftconvolve, resample, sosfilt

from mllm.synthetic.speech.synthesis import SAMPLE_RATE_HZ

SPEEDS = (0.85, 1.25)
"""A recording is played slower or faster, which moves pitch and formants along: another person."""
ECHO_SECONDS = (0.05, 0.4)
"""The time in which the echo of a room falls by 60 dB."""
SNR_DB = (5.0, 30.0)
BANDS_HZ = ((100.0, 7000.0), (200.0, 3400.0), (300.0, 3400.0))
"""A good microphone, and two telephones."""
LEVEL_RMS_DB = (-35.0, -15.0)
CHANGE_PROBABILITY = 1 / 3
"""The probability of an echo, of noise, and of a narrow band."""
MARGIN_SECONDS = (0.02, 0.3)
"""The silence before and after, which the noise fills."""


def change(samples: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Change a clean recording by speed, now and then by echo, noise and a narrow band, and last its loudness.

    Args:
        samples: (L,) float32 at 16 kHz.

    Returns:
        (L',) float32 at 16 kHz, no sample beyond 1.
    """
    samples = np.asarray(resample(samples, round(len(samples) / rng.uniform(*SPEEDS))))
    margins = [np.zeros(int(SAMPLE_RATE_HZ * rng.uniform(*MARGIN_SECONDS))) for _ in range(2)]
    samples = np.concatenate([margins[0], samples, margins[1]])
    if rng.random() < CHANGE_PROBABILITY:
        samples = _with_echo(samples, rng)
    if rng.random() < CHANGE_PROBABILITY:
        samples = _with_noise(samples, rng)
    if rng.random() < CHANGE_PROBABILITY:
        low, high = BANDS_HZ[rng.integers(len(BANDS_HZ))]
        samples = np.asarray(sosfilt(butter(4, (low, high), "bandpass", fs=SAMPLE_RATE_HZ, output="sos"), samples))
    level = 10 ** (rng.uniform(*LEVEL_RMS_DB) / 20)
    samples = samples * (level / max(float(np.sqrt(np.mean(np.square(samples)))), 1e-8))
    return (samples / max(1.0, float(np.abs(samples).max()))).astype(np.float32)


def _with_echo(samples: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Add noise that dies away to the direct sound: a room of random walls."""
    seconds = rng.uniform(*ECHO_SECONDS)
    times = np.arange(int(SAMPLE_RATE_HZ * seconds)) / SAMPLE_RATE_HZ
    response = rng.standard_normal(len(times)) * np.exp(-6.9 * times / seconds)  # exp(-6.9) is -60 dB
    response *= rng.uniform(0.1, 0.6) / np.sqrt(np.square(response).sum())
    response[0] = 1.0
    return fftconvolve(samples, response)[: len(samples)]


def _with_noise(samples: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Add noise whose power falls with frequency by a random slope: from a hiss to a rumble."""
    spectrum = np.fft.rfft(rng.standard_normal(len(samples)))
    frequencies = np.maximum(np.fft.rfftfreq(len(samples), 1 / SAMPLE_RATE_HZ), 50.0)
    noise = np.fft.irfft(spectrum * frequencies ** rng.uniform(-1.0, 0.0), len(samples))
    ratio = 10 ** (rng.uniform(*SNR_DB) / 20)
    speech_rms, noise_rms = np.sqrt(np.mean(np.square(samples))), np.sqrt(np.mean(np.square(noise)))
    return samples + noise * (speech_rms / max(noise_rms * ratio, 1e-8))
