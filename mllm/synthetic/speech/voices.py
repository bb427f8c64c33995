"""Says who speaks in the synthetic corpus: voices, and which split each of them belongs to.

Knows the names of the synthesiser's voices. Does not know how they are made to sound, or what they say.

    VOICES["test"]                      -> voices that are heard in the test split only
    random_speaker("train", generator)    -> a voice of that split with a pitch, a speaking rate and a face of its own

A whole voice is held out, not only a speaker: no pitch and no rate of a test voice is heard in training. Kin voices
(the several "steph" or "iven" of the synthesiser) are one family, and a family stands in one split.
"""

from dataclasses import dataclass

import numpy as np

_ACCENTS = ("en-us", "en", "en-gb-x-rp", "en-us-nyc")
_VARIANTS: dict[str, tuple[str, ...]] = {
    "train": (
        "f1", "f2", "f3", "m1", "m2", "m3", "m4", "m7", "klatt3", "Alicia", "Annie", "Denis", "Gene", "Lee", "Mario",
        "Michael", "m8", "adam", "david", "ed", "grandma", "grandpa", "iven2", "iven4", "linda", "marcelo", "miguel",
        "norbert", "pablo", "paul", "rob", "shelby", "steph", "steph2", "sandro", "victor",
    ),
    "validation": ("f5", "belinda", "m5", "Andy", "max"),
    "test": ("f4", "Andrea", "aunty", "m6", "quincy", "michel", "antonio", "john"),
}  # fmt: skip

LOWEST_RATE_WPM, HIGHEST_RATE_WPM = 80, 450  # what the synthesiser can speak
LOWEST_PITCH, HIGHEST_PITCH = 0, 99


@dataclass(frozen=True)
class Voice:
    """A voice is an accent (a language name of the synthesiser) and a variant (its timbre)."""

    accent: str
    variant: str

    def __str__(self) -> str:
        return f"{self.accent}+{self.variant}"


@dataclass(frozen=True)
class Speaker:
    """A speaker is one person: a voice, how it is used, and the seed of the face."""

    voice: Voice
    pitch: int  # 0..99, 50 is the voice's own
    speaking_rate_wpm: int  # words per minute
    face_seed: int


# Accents go round the variants, so that every accent is heard in every split.
VOICES: dict[str, tuple[Voice, ...]] = {
    split: tuple(Voice(_ACCENTS[index % len(_ACCENTS)], variant) for index, variant in enumerate(variants))
    for split, variants in _VARIANTS.items()
}


def random_speaker(split: str, generator: np.random.Generator) -> Speaker:
    """Sample a random speaker of a split.

    Raises:
        ValueError: an unknown split.
    """
    if split not in VOICES:
        raise ValueError(f"split must be one of {', '.join(VOICES)}, got {split!r}")
    voices = VOICES[split]
    return Speaker(
        voice=voices[int(generator.integers(len(voices)))],
        pitch=int(generator.integers(35, 66)),
        speaking_rate_wpm=int(generator.integers(150, 201)),
        face_seed=int(generator.integers(2**31)),
    )
