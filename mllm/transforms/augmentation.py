"""Augments a decoded clip in training, before its transform: hides stretches of time, mirrors, adds noise.

Each part has a generator of its own, made of one number per sample and the part's name, so that switching one on
changes no other. Does not know files or encoders; crops are cut by the transforms, and `noise.py` mixes noise.

Shapes: L samples of audio, T frames of a video.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from mllm.media import Audio, Video
from mllm.transforms.noise import MixNoise
from mllm.utils.random_generator import random_generator

RngFor = Callable[[str], np.random.Generator]
"""A purpose to its generator."""


def rngs_by_purpose(generator: np.random.Generator) -> RngFor:
    """Return generators by purpose; they depend on the one passed in alone, from which one number is taken."""
    key = int(generator.integers(2**63))  # one number, however many parts there are: each makes a generator of it
    return lambda purpose: random_generator(key, 0, "", purpose)


@dataclass(frozen=True)
class TimeMask:
    """Silences or blackens stretches of a clip: the adaptive time mask of auto_avsr and the systems after it.

    A clip of T steps gets (T + stride - 0.1) // stride stretches, about one per stride begun, each of a random length
    below `window` and of the clip's, at a random place. What is masked is 0 before any normalisation.

    Args:
        window: in frames or samples; a stretch is shorter.
        stride: likewise; how much clip there is per stretch.

    Raises:
        ValueError: either is not above 0.
    """

    window: int
    stride: int

    def __post_init__(self) -> None:
        if self.window < 1 or self.stride < 1:
            raise ValueError(f"a time mask needs a window and a stride above 0, got {self.window} and {self.stride}")

    def count(self, length: int) -> int:
        """Count the stretches that a clip gets."""
        return int((length + self.stride - 0.1) // self.stride)

    def __call__(self, values: np.ndarray, generator: np.random.Generator) -> np.ndarray:
        """Return a masked copy of (L,) samples or (T, ...) frames."""
        masked = values.copy()
        for _ in range(self.count(len(values))):
            length = int(generator.integers(min(self.window, len(values))))  # 0 up to, and not including, the window
            start = int(generator.integers(len(values) - length + 1))
            masked[start : start + length] = 0
        return masked


@dataclass(frozen=True)
class Augmentation:
    """Does everything that is done to audio and video in training, between their files and their transforms.

    Audio is masked first and then gets its noise, as in the published systems, so the ratio is that of the noise to
    what is left of the audio, and the noise is heard through the gaps.

    Args:
        noise: mixed into all audio.
        audio_mask: in samples.
        video_mask: in frames.
        flip_probability: how often a video is mirrored, all frames of it.

    Raises:
        ValueError: a probability outside 0..1.
    """

    noise: MixNoise | None = None
    audio_mask: TimeMask | None = None
    video_mask: TimeMask | None = None
    flip_probability: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.flip_probability <= 1:
            raise ValueError(f"flip_probability must be 0 to 1, got {self.flip_probability}")

    def __call__(self, raw: Any, rng_for: RngFor) -> Any:
        """Return changed audio or video; images stay as they are.

        Raises:
            ValueError: see `MixNoise`.
        """
        if isinstance(raw, Audio):
            return self._audio(raw, rng_for)
        return self._video(raw, rng_for) if isinstance(raw, Video) else raw

    def _audio(self, audio: Audio, rng_for: RngFor) -> Audio:
        if self.audio_mask is not None:
            audio = replace(audio, samples=self.audio_mask(audio.samples, rng_for("audio mask")))
        return audio if self.noise is None else self.noise(audio, rng_for("noise"))

    def _video(self, video: Video, rng_for: RngFor) -> Video:
        if self.video_mask is not None:
            video = replace(video, frames=self.video_mask(video.frames, rng_for("video mask")))
        # The number is taken whatever the probability, which costs nothing since no other part sees this generator.
        if rng_for("flip").random() < self.flip_probability:
            video = replace(video, frames=np.ascontiguousarray(video.frames[:, :, ::-1]))
        return video
