"""Mixes noise into audio at an exact signal-to-noise ratio, and estimates the ratio of audio as it is heard.

Knows samples and decibels. Does not know files, encoders or when noise is wanted.

Shapes: L samples of an utterance.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mllm.media import Audio

MAX_SNR_ERROR_DB = 0.05
"""How far the ratio of mixed audio may lie from the one that was asked for."""
FRAME_SECONDS = 0.02
MAX_ESTIMATE_DB = 20.0
"""Quieter pauses are silence to everybody: how quiet says no more about errors, and would only make recordings of equal
use look unlike each other."""


@dataclass(frozen=True)
class MixNoise:
    """Adds a random piece of a noise recording to audio, at an exact signal-to-noise ratio.

    A piece that is silent is not taken: another one is, each that is not silent with the same probability.
    Power is the mean square over the whole utterance, of the signal and of the very piece that is added, so the ratio
    of what comes out is the one asked for: 0 dB is 0 dB. Nothing is clipped. It stands between reading a file
    and its transform, so that evaluation can add noise without augmenting anything else.

    Args:
        noise: a recording at the rate of the audio it is mixed into; repeated where it is too short.
        snr_db: one ratio, or several of which one is taken at random each time; None among them leaves the audio clean.

    Raises:
        ValueError: no ratio, or one that is not finite; noise that is silent throughout.
    """

    noise: Audio
    snr_db: float | Sequence[float | None]

    def __post_init__(self) -> None:
        if not self.choices or any(choice is not None and not math.isfinite(choice) for choice in self.choices):
            raise ValueError(f"snr_db must be one or several finite numbers (or None for clean), got {self.snr_db!r}")
        if not self.noise.samples.any():
            raise ValueError("the noise is silent throughout, so nothing can be mixed from it")

    @property
    def choices(self) -> tuple[float | None, ...]:
        """Return the ratios, one of which is taken each time."""
        return (self.snr_db,) if isinstance(self.snr_db, int | float) else tuple(self.snr_db)

    def __call__(self, audio: Audio, generator: np.random.Generator) -> Audio:
        """Mix noise into audio.

        Raises:
            ValueError: the rates differ; the audio is silent, so there is no ratio; or the ratio is so extreme that it
                is lost in rounding.
        """
        if audio.sample_rate_hz != self.noise.sample_rate_hz:
            rates = f"{audio.sample_rate_hz} and {self.noise.sample_rate_hz} Hz"
            raise ValueError(f"audio and noise must have one sample rate, got {rates}")
        snr_db = self.choices[generator.integers(len(self.choices))]
        if snr_db is None:
            return audio
        piece = self._piece(len(audio.samples), generator)
        powers = [float(np.mean(np.square(samples, dtype=np.float64))) for samples in (audio.samples, piece)]
        if powers[0] == 0:
            raise ValueError(f"noise cannot be mixed at {snr_db:g} dB: the audio is silent")
        scale = math.sqrt(powers[0] / powers[1] * 10 ** (-snr_db / 10))
        mixed = (audio.samples + scale * piece).astype(np.float32)
        _check_ratio(powers[0], mixed.astype(np.float64) - audio.samples, snr_db)
        return Audio(mixed, audio.sample_rate_hz)

    def _piece(self, length: int, generator: np.random.Generator) -> np.ndarray:
        """Return as many samples of the noise, float64, from a random place on, that are not all zero."""
        noise = self.noise.samples
        start = int(generator.integers(len(noise)))
        piece = np.take(noise, np.arange(start, start + length), mode="wrap").astype(np.float64)
        if piece.any() or not length:
            return piece
        # Drawing again until a piece is heard could take for ever. Instead every start from which something is heard
        # within `length` samples is listed, and one of those is taken.
        heard = np.flatnonzero(noise)
        starts = np.arange(len(noise))
        ahead = np.searchsorted(heard, starts)  # the next sample of each start that is not zero, or the first again
        reach = np.where(ahead < len(heard), heard[ahead % len(heard)], heard[0] + len(noise)) - starts
        starts = starts[reach < length]
        start = int(starts[generator.integers(len(starts))])
        return np.take(noise, np.arange(start, start + length), mode="wrap").astype(np.float64)


def _check_ratio(power: float, added: np.ndarray, snr_db: float) -> None:
    """Measure what came out, in float32, against what was asked for."""
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        measured = 10 * np.log10(power / np.mean(np.square(added)))
    if not abs(measured - snr_db) <= MAX_SNR_ERROR_DB:
        raise ValueError(f"noise cannot be mixed at {snr_db:g} dB: rounding would make it {measured:.2f} dB")


def estimated_snr_db(audio: Audio) -> float:
    """Estimate how far speech stands out of what is heard in its pauses, in decibels.

    The level of loud frames over that of quiet ones: the 90th over the 10th percentile of the power of frames of 20 ms,
    from 0 to `MAX_ESTIMATE_DB`. It rises with the true ratio but is not it (babble at 0 dB reads about 9 dB), and what
    is louder in the pauses than the speech, or never pauses, it cannot tell from speech.
    """
    size = max(round(FRAME_SECONDS * audio.sample_rate_hz), 1)
    frames = np.resize(audio.samples, (max(len(audio.samples) // size, 1), size)).astype(np.float64)
    quiet, loud = np.percentile(np.mean(np.square(frames), axis=1), (10, 90))
    if loud == 0:
        return 0.0
    return float(10 * np.log10(loud / max(quiet, loud * 10 ** (-MAX_ESTIMATE_DB / 10))))
