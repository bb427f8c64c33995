"""Collects real recordings of speech and what is said in them from Debian packages: what the demo is tested on.

Knows the packages' files. Does not know models.

    asterisk-core-sounds-en-g722   one speaker, telephone prompts at 16 kHz in G.722; text in asterisk-core-sounds-en
    pocketsphinx-testdata          sentences of an audio book and names of playing cards, two speakers
    alsa-utils                     names of loudspeakers, one speaker

Texts are compared as lower-case words. A recording is left out where its text has a number of several digits or a sign
that is said in more than one way, or brackets (it is no speech), or where it is longer than the encoder's window.
"""

import gzip
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import av
import numpy as np

from mllm.media import load_audio
from mllm.real.packages import check_digest, digest_of_files, fetch_debian
from mllm.real.sentences import DIGITS, normalise
from mllm.synthetic.speech.synthesis import SAMPLE_RATE_HZ

LEAST_WORDS = 2
"""Single words are told apart by spelling alone ("added", "add it") and are left out."""

PROMPTS = "usr/share/asterisk/sounds/en_US_f_Allison"
PROMPT_TEXTS = "usr/share/doc/asterisk-core-sounds-en/core-sounds-en.txt.gz"
SPHINX = "usr/share/pocketsphinx/test/data"
SPEAKERS = "usr/share/sounds/alsa"
DIGESTS = {
    "texts": "436538195b7c7361bd227036686f1a4039f694648c76573bdaca956655d34450",
    "prompts": "350dbad30f805d8ffb7bf7fb3fed017f4e81f39a531a90d0343129bc6e75e9a2",
    "librivox": "34b9f85682213ac8f5e9357ed32c97895c5609092d1e9f3d8e710cd0cc00d03e",
    "cards": "53d034fc091d1e17fc48c9549109559bbcaabdf4a41372862923d4a9da39177a",
    "loudspeakers": "306947f992ab82e17a2d9484f8a56ba40422c0f17ca48b9391c78101222e242c",
}
"""The SHA-256 over the names and contents of the files of each source."""


@dataclass(frozen=True)
class Recording:
    """A recording: samples (L,) float32 at 16 kHz, the words said, and which source it is of."""

    name: str
    source: str
    samples: np.ndarray
    text: str

    @property
    def seconds(self) -> float:
        """Its length in seconds."""
        return len(self.samples) / SAMPLE_RATE_HZ


def read_recordings(folder: Path, *, longest_seconds: float) -> list[Recording]:
    """Fetch the packages and read every recording that can be used, ordered by source and name.

    Args:
        folder: where packages are unpacked.
        longest_seconds: longer ones are left out.

    Raises:
        FileNotFoundError, RuntimeError: a package cannot be had; see `fetch_debian`.
        ValueError: the files of a package are not those that were tested.
    """
    every = [*_prompts(folder), *_sphinx(folder), *_loudspeakers(folder)]
    return [one for one in every if len(one.text.split()) >= LEAST_WORDS and one.seconds <= longest_seconds]


def spoken(text: str) -> str | None:
    """Write out a prompt as it is said; None where that is not sure.

    >>> spoken("press 1 or *")
    'press one or star'
    >>> spoken("3D audio"), spoken("[ascending tones]")
    (None, None)
    """
    text = re.sub(r"(?<!\S)(\d)(?=[\s,.;]|$)", lambda digit: DIGITS[int(digit[1])], text)
    text = re.sub(r"(?<!\S)\*(?!\S)", "star", text)
    if re.search(r"[^A-Za-z' ,.;:!?\u2026-]", text):
        return None
    return normalise(text)


def _prompts(folder: Path) -> Iterator[Recording]:
    texts_root = fetch_debian("asterisk-core-sounds-en", folder)
    root = fetch_debian("asterisk-core-sounds-en-g722", folder) / PROMPTS
    texts_file = texts_root / PROMPT_TEXTS
    check_digest(texts_file, DIGESTS["texts"])
    lines = [line for line in gzip.decompress(texts_file.read_bytes()).decode().splitlines() if ": " in line]
    texts = {name.strip(): text.strip() for name, _, text in (line.partition(": ") for line in lines)}
    files = {name: root / f"{name}.g722" for name in sorted(texts) if (root / f"{name}.g722").is_file()}
    _check("prompts", files)
    for name, file in files.items():
        text = spoken(texts[name])
        if text is not None:
            yield Recording(name.replace("/", "-"), "prompts", _read_g722(file), text)


def _sphinx(folder: Path) -> Iterator[Recording]:
    root = fetch_debian("pocketsphinx-testdata", folder) / SPHINX
    for source, transcript in (("librivox", "librivox/transcription"), ("cards", "cards/cards.transcription")):
        lines = re.findall(r"<s>(.*)</s>\s*\((.*)\)", (root / transcript).read_text())
        files = {name: root / source / f"{name}.wav" for _, name in sorted(lines, key=lambda line: line[1])}
        _check(source, files)
        texts = {name: normalise(text) for text, name in lines}
        for name, file in files.items():
            yield Recording(f"{source}-{name}", source, load_audio(file, SAMPLE_RATE_HZ).samples, texts[name])


def _loudspeakers(folder: Path) -> Iterator[Recording]:
    root = fetch_debian("alsa-utils", folder) / SPEAKERS
    files = {file.stem: file for file in sorted(root.glob("*.wav")) if file.stem != "Noise"}
    _check("loudspeakers", files)
    for name, file in files.items():
        yield Recording(
            f"loudspeakers-{name}",
            "loudspeakers",
            load_audio(file, SAMPLE_RATE_HZ).samples,
            normalise(name.replace("_", " ")),
        )


def _check(source: str, files: dict[str, Path]) -> None:
    if (digest := digest_of_files(files)) != DIGESTS[source]:
        raise ValueError(f"the recordings of {source} are not those that were tested: SHA-256 {digest}")


def _read_g722(file: Path) -> np.ndarray:
    """Read the samples (L,) float32 of a raw G.722 stream, which has no header and is always at 16 kHz."""
    with av.open(str(file), format="g722") as container:
        frames = [frame.to_ndarray().reshape(-1) for frame in container.decode(audio=0)]
    return np.concatenate(frames).astype(np.float32) / 32768.0
