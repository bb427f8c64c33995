"""Makes babble, five people speaking at once, as noise for the speech corpus.

Knows voices and sentences. Does not know how noise is mixed into speech: `mllm.transforms.noise` does
that, at an exact ratio.

    noise = make_babble("train", seconds=60, seed=0)          float32 (960000,) at 16 kHz

Babble of one split holds sentences and voices of that split only, so test noise was never heard in training.
"""

import numpy as np

from mllm.synthetic.speech.sentences import sample_sentences
from mllm.synthetic.speech.synthesis import LEVEL_RMS, SAMPLE_RATE_HZ, say
from mllm.synthetic.speech.voices import random_speaker

NUM_BABBLERS = 5
_BABBLE_STREAM = 1_000_003  # keeps the sentences of the babble apart from those of a corpus made with the same seed


def make_babble(split: str, *, seconds: float, seed: int) -> np.ndarray:
    """Make five people of one split speak at once, without a pause.

    Returns:
        float32 (seconds * 16,000,), each speaker at the same level, their sum at the level of one utterance.

    Raises:
        ValueError: an unknown split, or a duration that is not positive.
    """
    if seconds <= 0:
        raise ValueError(f"seconds of babble must be positive, got {seconds}")
    num_samples = round(seconds * SAMPLE_RATE_HZ)
    speakers = [_monologue(split, num_samples, seed=seed, babbler=babbler) for babbler in range(NUM_BABBLERS)]
    babble = np.sum([speaker / _rms(speaker) for speaker in speakers], axis=0)
    return (babble * (LEVEL_RMS / _rms(babble))).astype(np.float32)


def _monologue(split: str, num_samples: int, *, seed: int, babbler: int) -> np.ndarray:
    """Let different speakers of a split speak one after the other until the time is filled."""
    stream = _BABBLE_STREAM * (seed + 1) + babbler
    generator = np.random.default_rng(stream)
    pieces: list[np.ndarray] = []
    missing = num_samples
    sentences = iter(sample_sentences(num_samples // SAMPLE_RATE_HZ + 2, split=split, seed=stream))  # each > 1 second
    while missing > 0:
        speaker = random_speaker(split, generator)
        spoken = say(next(sentences), speaker)
        pieces.append(spoken.samples)
        missing -= len(spoken.samples)
    return np.roll(np.concatenate(pieces)[:num_samples], int(generator.integers(num_samples)))


def _rms(samples: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(samples, dtype=np.float64))))
