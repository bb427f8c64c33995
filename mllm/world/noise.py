"""Babble noise at an exact signal-to-noise ratio.

Knows waveforms and decibels. Does not know where speech comes from in a corpus, or what is trained on it.

    noise = make_babble("train", seconds=60, seed=0)          five people of that split, speaking at once
    generator = noise_generator(seed=7, epoch=2, sample_id="train-00012", purpose="noise")
    noisy = add_noise(speech, noise, snr_db=0.0, generator=generator)

`snr_db=0.0` is a ratio of zero decibels, and no noise is `None`: zero is a number here.
Babble of one split holds sentences and voices of that split only, so test noise was never heard in training.
"""

import hashlib

import numpy as np

from mllm.world.sentences import sample_sentences
from mllm.world.speech import SAMPLE_RATE_HZ, synthesise
from mllm.world.voices import draw_speaker

NUM_BABBLERS = 5
_BABBLE_STREAM = 1_000_003  # keeps the sentences of the babble apart from those of a corpus made with the same seed


def noise_generator(*, seed: int, epoch: int, sample_id: str, purpose: str) -> np.random.Generator:
    """The random numbers of one sample in one epoch for one purpose: a function of these four alone."""
    key = f"{seed}/{epoch}/{purpose}/{sample_id}".encode()
    return np.random.default_rng(int.from_bytes(hashlib.sha256(key).digest()[:16], "big"))


def make_babble(split: str, *, seconds: float, seed: int) -> np.ndarray:
    """Five people of one split speaking at once, without a pause.

    Returns:
        float32 (seconds * 16,000,), each speaker at the same level, their sum at root mean square 0.05.

    Raises:
        ValueError: an unknown split, or a duration that is not positive.
    """
    if seconds <= 0:
        raise ValueError(f"seconds of babble must be positive, got {seconds}")
    num_samples = round(seconds * SAMPLE_RATE_HZ)
    speakers = [_monologue(split, num_samples, seed=seed, babbler=babbler) for babbler in range(NUM_BABBLERS)]
    babble = np.sum([speaker / _rms(speaker) for speaker in speakers], axis=0)
    return (babble * (0.05 / _rms(babble))).astype(np.float32)


def add_noise(
    speech: np.ndarray, noise: np.ndarray, *, snr_db: float | None, generator: np.random.Generator
) -> np.ndarray:
    """Add a random stretch of noise to speech so that their powers over the whole clip differ by `snr_db`.

    Args:
        speech: float32 (L,).
        noise: float32 (M,), of any length; a shorter one is repeated.
        snr_db: decibels, any number; None adds nothing.
        generator: decides where in the noise the stretch starts.

    Raises:
        ValueError: silent speech or a silent stretch of noise, between which no ratio exists; a ratio not finite.
    """
    if snr_db is None:
        return speech
    if not np.isfinite(snr_db):
        raise ValueError(f"snr_db must be a finite number of decibels or None, got {snr_db}")
    start = int(generator.integers(len(noise)))
    stretch = np.resize(np.roll(noise, -start), len(speech)).astype(np.float64)
    speech_rms, noise_rms = _rms(speech), _rms(stretch)
    if speech_rms == 0 or noise_rms == 0:
        raise ValueError(f"no signal-to-noise ratio exists: speech has rms {speech_rms}, noise has rms {noise_rms}")
    gain = speech_rms / noise_rms * 10 ** (-snr_db / 20)
    return (speech + gain * stretch).astype(np.float32)


def _monologue(split: str, num_samples: int, *, seed: int, babbler: int) -> np.ndarray:
    """Different speakers of a split one after the other until the time is filled."""
    stream = _BABBLE_STREAM * (seed + 1) + babbler
    generator = np.random.default_rng(stream)
    pieces: list[np.ndarray] = []
    missing = num_samples
    sentences = iter(sample_sentences(num_samples // SAMPLE_RATE_HZ + 2, split=split, seed=stream))  # each > 1 second
    while missing > 0:
        speaker = draw_speaker(split, generator)
        spoken = synthesise(
            next(sentences), speaker.voice, speaking_rate_wpm=speaker.speaking_rate_wpm, pitch=speaker.pitch
        )
        pieces.append(spoken.samples)
        missing -= len(spoken.samples)
    return np.roll(np.concatenate(pieces)[:num_samples], int(generator.integers(num_samples)))


def _rms(samples: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(samples, dtype=np.float64))))
