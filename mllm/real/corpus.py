"""Writes the corpus of the real-weights demo: synthesised speech to train on, real recordings to test on.

Knows sentences, voices, rooms, recordings and the manifest format. Does not know models or budgets.

    out/train.jsonl, heldout.jsonl, test.jsonl                   one row per clip, task `asr`
    out/train/<number>.wav, out/heldout/..., out/test/...         16 kHz mono
    out/said.tsv                                                  what each synthesised clip is meant to hold

Sentences are parted by split, and so are clips; voices are not: there are too few. A sentence that is a test sentence
too, word for word, is left out of training.
"""

import logging
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
from mllm.real.sentences import MOST_CHARACTERS, in_other_forms, normalise, spoken_number, wordnet_examples
from mllm.real.voices import FLITE_PACKAGES, say
from mllm.synthetic.speech.corpus import write_all
from mllm.synthetic.speech.synthesis import SAMPLE_RATE_HZ
from mllm.utils.files import write_text_whole, written_whole

PROMPT = "Transcript:"
"""Short: a clip has about seven target tokens, and every token of a row costs the same time."""
LONGEST_SECONDS = 6.0
"""The seconds that the encoder's window holds."""
SHORTEST_SECONDS = 0.5
"""The seconds that one soft token of the coarsest rate stands for: 25 frames of 20 milliseconds."""
NUMBERS_FRACTION = 0.05
SYNTHESISER_PROBABILITIES = {"piper": 0.6, "flite": 0.35, "espeak": 0.05}
"""How often each synthesiser speaks: the natural ones most."""
SPLITS = ("train", "heldout")

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class CorpusConfig:
    """Say how much is written."""

    num_train: int = 4000
    num_heldout: int = 60
    num_recordings: int | None = None
    """Number of recordings to test on, taken evenly from all there are; all when left out."""
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
        ValueError: files of a package that are not those that were tested, or a folder with clips of other sentences.
    """
    recordings = read_recordings(packages, longest_seconds=LONGEST_SECONDS)
    sentences = _sentences(packages, settings, tested={recording.text for recording in recordings})
    for package in FLITE_PACKAGES:  # before there are several processes that would all fetch it
        fetch_debian(package, packages)
    jobs = {split: list(_jobs(out, split, texts, settings, packages)) for split, texts in sentences.items()}
    every = [job for split in SPLITS for job in jobs[split]]
    _claim_clips(out, every)
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
            for job in split_jobs
            if SHORTEST_SECONDS <= seconds[job.path] <= LONGEST_SECONDS
        ]
        for split, split_jobs in jobs.items()
    }
    if (num_left := len(every) - sum(map(len, rows.values()))) > 0:
        bounds = (SHORTEST_SECONDS, LONGEST_SECONDS)
        logger.warning("%d of %d clips do not last %g to %g seconds and are left out", num_left, len(every), *bounds)
    rows["test"] = [_write_recording(out, recording) for recording in _evenly(recordings, settings.num_recordings)]
    for split, samples in rows.items():
        write_manifest(out / f"{split}.jsonl", samples)
    return {split: out / f"{split}.jsonl" for split in rows}


def _claim_clips(out: Path, jobs: Sequence[_Job]) -> None:
    """Note what is said in which clip, or find that it is: clips of a run that was interrupted are not said again.

    Raises:
        ValueError: the folder holds clips of other sentences, which would then be taken for these.
    """
    lines = [f"{job.path.relative_to(out).as_posix()}\t{job.synthesiser}\t{job.sentence}\n" for job in jobs]
    note, text = out / "said.tsv", "".join(lines)
    if note.exists() and note.read_text(encoding="utf-8") == text:
        return
    if note.exists() or any(out.glob("*/*.wav")):  # clips without a note are of a release that wrote none
        raise ValueError(f"{out} holds clips of other sentences; choose another folder or remove it")
    out.mkdir(parents=True, exist_ok=True)
    write_text_whole(note, text)


def _evenly(recordings: Sequence[Recording], count: int | None) -> list[Recording]:
    """Take as many recordings as are wanted, as far apart as can be."""
    if count is None:
        return list(recordings)
    if count > len(recordings):
        raise ValueError(f"num_recordings is {count}; there are {len(recordings)}")
    return [recordings[index * len(recordings) // count] for index in range(count)]


def _sentences(packages: Path, settings: CorpusConfig, *, tested: set[str]) -> dict[str, list[str]]:
    """Choose what is said by split, no sentence in two of them and none that is tested."""
    known = [text for text in wordnet_examples(fetch_debian("wordnet-base", packages)) if normalise(text) not in tested]
    rng = np.random.default_rng([settings.seed, 0])
    chosen = [known[index] for index in rng.permutation(len(known))]
    counts = {"train": settings.num_train, "heldout": settings.num_heldout}
    if sum(counts.values()) > len(chosen):
        raise ValueError(f"num_train + num_heldout is {sum(counts.values())}; WordNet has {len(chosen)} such sentences")
    by_split = {}
    for split, count in counts.items():
        numbers = int(count * NUMBERS_FRACTION)
        texts = [chosen.pop() for _ in range(count - numbers)] + [spoken_number(rng) for _ in range(numbers)]
        by_split[split] = [texts[index] for index in rng.permutation(count)]
    spare = [text for text in chosen if len(text) <= MOST_CHARACTERS // 2]
    return {
        split: list(in_other_forms(texts, spare, seed=settings.seed, tested=tested))
        for split, texts in by_split.items()
    }


def _jobs(out: Path, split: str, sentences: Sequence[str], settings: CorpusConfig, packages: Path) -> Iterator[_Job]:
    for number, sentence in enumerate(sentences):
        seed = (settings.seed, 1 + SPLITS.index(split), number)
        names, probabilities = zip(*SYNTHESISER_PROBABILITIES.items(), strict=True)
        synthesiser = str(np.random.default_rng([*seed, 0]).choice(names, p=probabilities))
        yield _Job(out / split / f"{number:05d}.wav", sentence, synthesiser, seed, packages)


def _write_clip(job: _Job) -> float:
    """Write one clip, unless it is there from a run that was interrupted; returns its seconds."""
    if job.path.exists():
        return float(soundfile.info(job.path).duration)
    clean, _ = say(job.sentence, job.synthesiser, np.random.default_rng([*job.seed, 1]), packages=job.packages)
    samples = change(clean, np.random.default_rng([*job.seed, 2]))
    with written_whole(job.path) as aside:
        write_audio(aside, samples, SAMPLE_RATE_HZ)
    return len(samples) / SAMPLE_RATE_HZ


def _write_recording(out: Path, recording: Recording) -> Sample:
    path = out / "test" / f"{recording.name}.wav"
    write_audio(path, recording.samples, SAMPLE_RATE_HZ)
    return _sample(path.relative_to(out), recording.text, recording.source)


def _sample(path: Path, text: str, source: str) -> Sample:
    prompt = (Media("audio", path.as_posix()), Text(PROMPT))
    messages = (Message("user", prompt), Message("assistant", (Text(normalise(text)),)))
    return Sample(path.with_suffix("").as_posix(), messages, "asr", meta={"source": source})
