"""Writes the corpus of the real-weights demo: synthesised speech to train on, real recordings to test on.

Knows sentences, voices, rooms, recordings and the manifest format. Does not know models or budgets.

    out/train.jsonl, heldout.jsonl, test.jsonl                   one row per clip, task `asr`
    out/train/<number>.wav, out/heldout/..., out/test/...         16 kHz mono

Sentences are parted by split, and so are clips; voices are not: there are too few. A sentence that is a test sentence
too, word for word, is left out of training.
"""

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soundfile

from mllm.config.model import check_at_least
from mllm.data.manifest import Media, Message, Sample, Text, write_manifest
from mllm.media import write_audio
from mllm.real.packages import fetch_debian
from mllm.real.recordings import Recording, read_recordings
from mllm.real.rooms import change
from mllm.real.sentences import normalise, spoken_number, wordnet_examples
from mllm.real.voices import FLITE_PACKAGES, say
from mllm.synthetic.speech.corpus import write_all
from mllm.synthetic.speech.synthesis import SAMPLE_RATE_HZ

PROMPT = "Transcript:"
"""Short: a clip is worth seven target tokens, and every token of a row costs the same time."""
LONGEST_SECONDS = 6.0
"""What the encoder's window holds."""
SHORTEST_SECONDS = 0.5
"""What one soft token of the coarsest rate stands for: 25 frames of 20 milliseconds."""
NUMBERS_SHARE = 0.05
SYNTHESISER_SHARES = {"piper": 0.6, "flite": 0.35, "espeak": 0.05}
"""How much of the corpus each synthesiser says: the natural ones most."""
SPLITS = ("train", "heldout")

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class CorpusConfig:
    """How much is written."""

    num_train: int = 5000
    num_heldout: int = 60
    num_recordings: int | None = None
    """Recordings to test on, taken evenly from all there are; all when left out."""
    seed: int = 0

    def __post_init__(self) -> None:
        check_at_least(self, ["num_train", "num_heldout", "num_recordings"])


@dataclass(frozen=True)
class _Job:
    path: Path
    sentence: str
    synthesiser: str
    seed: tuple[int, ...]
    packages: Path


def write_corpus(
    out: Path,
    settings: CorpusConfig,
    *,
    packages: Path,
    num_workers: int = 1,
    on_progress: Callable[[int, int], None] | None = None,
) -> dict[str, Path]:
    """Write clips and manifests.

    Args:
        out: folder to write into, which is also the root of the manifests.
        packages: where Debian packages are unpacked.
        num_workers: processes that synthesise.
        on_progress: called with (clips written, clips in all).

    Returns:
        the manifest of every split.

    Raises:
        ImportError, FileNotFoundError, RuntimeError: a package that is not installed or cannot be had.
        ValueError: files of a package that are not those that were tested.
    """
    recordings = read_recordings(packages, longest_seconds=LONGEST_SECONDS)
    sentences = _sentences(packages, settings, tested={found.text for found in recordings})
    for package in FLITE_PACKAGES:  # before there are several processes that would all fetch it
        fetch_debian(package, packages)
    jobs = {split: list(_jobs(out, split, own, settings, packages)) for split, own in sentences.items()}
    every = [job for split in SPLITS for job in jobs[split]]
    for split in (*SPLITS, "test"):
        (out / split).mkdir(parents=True, exist_ok=True)
    seconds = {}
    for done, (job, length) in enumerate(zip(every, write_all(_write_clip, every, num_workers), strict=True), start=1):
        seconds[job.path] = length
        if on_progress is not None:
            on_progress(done, len(every))
    rows = {
        split: [
            _sample(job.path.relative_to(out), job.sentence, job.synthesiser)
            for job in own
            if SHORTEST_SECONDS <= seconds[job.path] <= LONGEST_SECONDS
        ]
        for split, own in jobs.items()
    }
    if (num_left := len(every) - sum(map(len, rows.values()))) > 0:
        bounds = (SHORTEST_SECONDS, LONGEST_SECONDS)
        logger.warning("%d of %d clips do not last %g to %g seconds and are left out", num_left, len(every), *bounds)
    rows["test"] = [_write_recording(out, found) for found in _evenly(recordings, settings.num_recordings)]
    for split, own in rows.items():
        write_manifest(out / f"{split}.jsonl", own)
    return {split: out / f"{split}.jsonl" for split in rows}


def _evenly(recordings: Sequence[Recording], count: int | None) -> list[Recording]:
    """As many recordings as are wanted, as far apart as can be."""
    if count is None:
        return list(recordings)
    if count > len(recordings):
        raise ValueError(f"num_recordings is {count}; there are {len(recordings)}")
    return [recordings[place * len(recordings) // count] for place in range(count)]


def _sentences(packages: Path, settings: CorpusConfig, *, tested: set[str]) -> dict[str, list[str]]:
    """Sentences by split, none in two of them and none that is tested."""
    known = [text for text in wordnet_examples(fetch_debian("wordnet-base", packages)) if normalise(text) not in tested]
    rng = np.random.default_rng([settings.seed, 0])
    chosen = [known[place] for place in rng.permutation(len(known))]
    counts = {"train": settings.num_train, "heldout": settings.num_heldout}
    if sum(counts.values()) > len(chosen):
        raise ValueError(f"num_train + num_heldout is {sum(counts.values())}; WordNet has {len(chosen)} such sentences")
    found = {}
    for split, count in counts.items():
        numbers = int(count * NUMBERS_SHARE)
        own = [chosen.pop() for _ in range(count - numbers)] + [spoken_number(rng) for _ in range(numbers)]
        found[split] = [own[place] for place in rng.permutation(count)]
    return found


def _jobs(out: Path, split: str, sentences: Sequence[str], settings: CorpusConfig, packages: Path) -> Iterator[_Job]:
    for number, sentence in enumerate(sentences):
        seed = (settings.seed, 1 + SPLITS.index(split), number)
        names, shares = zip(*SYNTHESISER_SHARES.items(), strict=True)
        synthesiser = str(np.random.default_rng([*seed, 0]).choice(names, p=shares))
        yield _Job(out / split / f"{number:05d}.wav", sentence, synthesiser, seed, packages)


def _write_clip(job: _Job) -> float:
    """Write one clip, unless it is there from a run that was interrupted; returns its seconds."""
    if job.path.exists():
        return float(soundfile.info(job.path).duration)
    clean, _ = say(job.sentence, job.synthesiser, np.random.default_rng([*job.seed, 1]), packages=job.packages)
    samples = change(clean, np.random.default_rng([*job.seed, 2]))
    aside = job.path.with_suffix(".writing")
    write_audio(aside, samples, SAMPLE_RATE_HZ)
    os.replace(aside, job.path)
    return len(samples) / SAMPLE_RATE_HZ


def _write_recording(out: Path, recording: Recording) -> Sample:
    path = out / "test" / f"{recording.name}.wav"
    write_audio(path, recording.samples, SAMPLE_RATE_HZ)
    return _sample(path.relative_to(out), recording.text, recording.source)


def _sample(path: Path, text: str, source: str) -> Sample:
    asked = (Media("audio", path.as_posix()), Text(PROMPT))
    messages = (Message("user", asked), Message("assistant", (Text(normalise(text)),)))
    return Sample(path.with_suffix("").as_posix(), messages, "asr", meta={"source": source})
