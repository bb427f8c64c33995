"""Mixes the noise of an evaluation into its samples, and finds that noise again for answers that were given under it.

Knows recordings, samples and ratios. Does not know models or answers.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mllm.media import Audio, MediaLimits, load_audio
from mllm.transforms.noise import MixNoise
from mllm.utils.files import digest_of_file
from mllm.utils.random_generator import random_generator


@dataclass(frozen=True)
class EvaluationNoise:
    """Holds a recording and the seed of what is cut out of it: noise is a function of seed, sample and ratio."""

    recording: Audio
    seed: int

    def of(self, sample_id: str, snr_db: float) -> Callable[[Audio], Audio]:
        """Return what mixes the noise of one sample into its audio."""
        mix = MixNoise(self.recording, snr_db)
        generator = random_generator(self.seed, 0, sample_id, f"evaluation noise {snr_db:g}")
        return lambda audio: mix(audio, generator)


def read_noise(path: str, limits: MediaLimits) -> Audio:
    """Read a recording of noise.

    Raises:
        ValueError: it is silent throughout, or cannot be read.
    """
    noise = load_audio(path, limits=limits)
    try:
        MixNoise(noise, 0.0)
    except ValueError as error:
        raise ValueError(f"noise {path}: {error}") from error
    return noise


def noise_of_answers(
    fingerprint: Mapping[str, Any], files: Sequence[str], limits: MediaLimits, *, folder: str
) -> EvaluationNoise | None:
    """Find the noise that answers were given under, by its bytes, among some files; None where there was none.

    Args:
        fingerprint: of the evaluation.
        folder: of it, for messages.

    Raises:
        ValueError: none of the files is the recording, or it cannot be read.
    """
    noted = fingerprint["noise"]
    if noted is None:
        return None
    matching = [path for path in files if digest_of_file(path) == noted["file"]]
    if not matching:
        given = ", ".join(files) or "none"
        raise ValueError(f"{folder} holds answers under noise; name the recording in noise (given: {given})")
    return EvaluationNoise(read_noise(matching[0], limits), noted["seed"])
