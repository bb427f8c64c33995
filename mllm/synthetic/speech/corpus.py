"""Writes the speech corpus: audio as wav, lips as mp4, and manifests that ask for the words.

Knows sentences, voices, lips, noise and the manifest format. Does not know tokens, models or budgets.

    out/<split>.jsonl                  three rows per utterance: task `asr` (audio), `vsr` (video), `avsr` (both)
    out/speech/<split>/<number>.wav    16 kHz mono, without noise
    out/speech/<split>/<number>.mp4    25 frames per second, H.264, without audio
    out/noise/<split>.wav              babble of that split, for noise that is mixed in while training or evaluating

Sentences and whole voices are parted by split; faces are everyone's own. The same arguments write the same samples and
images, with any number of workers.
"""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import TypeVar

import numpy as np

from mllm.data.manifest import Media, Message, Sample, Text, write_manifest
from mllm.data.prompts import SPEECH_TASKS
from mllm.media import write_audio, write_video
from mllm.synthetic.prompts import SPEECH_PROMPTS
from mllm.synthetic.speech.babble import make_babble
from mllm.synthetic.speech.lips import LIP_FRAMES_PER_SECOND, draw_lips
from mllm.synthetic.speech.sentences import SPLITS, sample_sentences
from mllm.synthetic.speech.synthesis import SAMPLE_RATE_HZ, say
from mllm.synthetic.speech.voices import Speaker, random_speaker

T = TypeVar("T")


@dataclass(frozen=True)
class SpeechCorpusConfig:
    """Say how much is written, and how it looks and sounds."""

    num_train: int = 1500
    num_validation: int = 60
    num_test: int = 150
    seed: int = 0
    babble_seconds: float = 40.0
    """Seconds of babble of each split."""
    size_pixels: int = 48
    color: bool = False

    def __post_init__(self) -> None:
        for split in SPLITS:
            if self.count(split) < 1:
                raise ValueError(f"num_{split} must be at least 1 utterance, got {self.count(split)}")
        if self.size_pixels % 2:
            raise ValueError(f"size_pixels must be even for H.264, got {self.size_pixels}")

    def count(self, split: str) -> int:
        """Count the utterances of a split."""
        return {"train": self.num_train, "validation": self.num_validation, "test": self.num_test}[split]


@dataclass(frozen=True)
class _Job:
    """One utterance to write; `stem` is its path below the root without a suffix."""

    root: Path
    split: str
    stem: str
    sentence: str
    speaker: Speaker
    settings: SpeechCorpusConfig


def write_speech_corpus(
    out: str | Path,
    settings: SpeechCorpusConfig,
    *,
    num_workers: int = 1,
    on_progress: Callable[[int, int], None] | None = None,
) -> dict[str, Path]:
    """Write wav and mp4 files, babble, and one manifest per split.

    Args:
        out: folder to write into, which is also the root of the manifests.
        settings: how much of what.
        num_workers: processes; 1 works in this one.
        on_progress: called with (utterances written, utterances in all).

    Returns:
        the manifest of every split.

    Raises:
        ImportError: the synthesiser is not installed; the message has the pip line.
    """
    out = Path(out)
    jobs = [job for split in SPLITS for job in _jobs(out, split, settings)]
    for split in SPLITS:
        (out / "speech" / split).mkdir(parents=True, exist_ok=True)
        _write_babble(out, split, settings)
    seconds = []
    for done, written in enumerate(write_all(_write_utterance, jobs, num_workers), start=1):
        seconds.append(written)
        if on_progress is not None:
            on_progress(done, len(jobs))
    manifests = {split: out / f"{split}.jsonl" for split in SPLITS}
    for split, manifest in manifests.items():
        timed = [(job, length) for job, length in zip(jobs, seconds, strict=True) if job.split == split]
        write_manifest(manifest, [sample for job, length in timed for sample in _samples(job, length)])
    return manifests


def _jobs(out: Path, split: str, settings: SpeechCorpusConfig) -> Iterator[_Job]:
    sentences = sample_sentences(settings.count(split), split=split, seed=settings.seed)
    for number, sentence in enumerate(sentences):
        speaker = random_speaker(split, np.random.default_rng([settings.seed, SPLITS.index(split), number]))
        yield _Job(out, split, f"speech/{split}/{number:05d}", sentence, speaker, settings)


def write_all(write: Callable[[T], float], jobs: Sequence[T], num_workers: int) -> Iterator[float]:
    """Write every clip, in `num_workers` processes or in this one; yield their seconds in order."""
    if num_workers == 1:
        yield from map(write, jobs)
        return
    # Not forked: a parent that has started the threads of torch or ffmpeg may leave their locks taken in a child.
    with ProcessPoolExecutor(num_workers, mp_context=get_context("spawn")) as pool:
        yield from pool.map(write, jobs, chunksize=25)


def _write_utterance(job: _Job) -> float:
    utterance = say(job.sentence, job.speaker)
    frames = draw_lips(
        utterance.phones,
        face_seed=job.speaker.face_seed,
        size=job.settings.size_pixels,
        color=job.settings.color,
    )
    write_video(job.root / f"{job.stem}.mp4", frames, frames_per_second=LIP_FRAMES_PER_SECOND)
    write_audio(job.root / f"{job.stem}.wav", utterance.samples, SAMPLE_RATE_HZ)
    return utterance.seconds


def _write_babble(out: Path, split: str, settings: SpeechCorpusConfig) -> None:
    (out / "noise").mkdir(parents=True, exist_ok=True)
    babble = make_babble(split, seconds=settings.babble_seconds, seed=settings.seed)
    write_audio(out / "noise" / f"{split}.wav", babble, SAMPLE_RATE_HZ)


def _samples(job: _Job, seconds: float) -> Iterator[Sample]:
    """Yield the samples of one utterance: one per task."""
    meta = {"voice": str(job.speaker.voice), "seconds": round(seconds, 3)}
    name = job.stem.removeprefix("speech/").replace("/", "-")
    paths = {"audio": f"{job.stem}.wav", "video": f"{job.stem}.mp4"}
    for task, media in SPEECH_TASKS.items():
        prompt = (*(Media(medium, paths[medium]) for medium in media), Text(SPEECH_PROMPTS[media]))
        messages = (Message("user", prompt), Message("assistant", (Text(job.sentence),)))
        yield Sample(f"{name}-{task}", messages, task, meta=meta)
