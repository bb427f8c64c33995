"""Runs the long demo of speech: elastic models against separately trained ones of a fixed rate, with several seeds.

Knows the synthetic speech corpus, training and evaluation, and which models are compared. Does not know how any works.

    out/speech/              the corpus, shared by all models
    out/features/            what the frozen encoders make of it
    out/<model>/<seed>/      a run and its evaluation
    out/comparison.*         see `full_speech_report.py`

How they are trained side by side is in `jobs.py`.
"""

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from mllm.config.evaluation import EvaluationConfig
from mllm.data.manifest import read_manifest, write_manifest
from mllm.data.prompts import SPEECH_TASKS
from mllm.synthetic.demo.demo import write_speech
from mllm.synthetic.demo.jobs import LongDemoConfig, Work, recipe, run_demo
from mllm.utils.progress import Progress

AUDIO_RATES = (4, 16)
VIDEO_RATES = (2, 5)
SNRS_DB = (None, 0.0, -5.0)
ELASTIC = {
    "omni_st": {"kind": "lora_bank", "variant": "st", "rank": 16, "alpha": 32},
    "mome": {"kind": "mome", "placement": "layer", "num_experts": 7, "num_shared": 1, "top_k": 2, "bottleneck": 32},
}
"""The adapters of the models that are trained for all tasks and rates at once."""
SEPARATE = "separate"
STEPS_OF_ELASTIC = len(SPEECH_TASKS)
"""An elastic model takes so many steps for each step of a separate one: it sees every task's rows as often."""
VERSIONS = 3
"""Versions of each training sample, with other noise in its audio; frozen encoders read each once for all models and
seeds."""


@dataclass(frozen=True, kw_only=True)
class FullDemoConfig(LongDemoConfig):
    """Say how much the long demo does; the defaults take less than an hour on 2 CPU cores."""

    out: str = "runs/demo_full"
    steps: int = 270
    """Number of optimizer steps of a separately trained model; an elastic one, for three tasks, takes three times as
    many."""
    num_utterances: int = 2000
    """Number of spoken sentences to train on."""
    num_test_utterances: int = 200
    """Number of spoken sentences to test on, by voices that were not trained on."""


@dataclass(frozen=True)
class Job:
    """One model to train and evaluate, at all tasks and rates (`task` is None) or at one."""

    model: str
    seed: int
    task: str | None = None
    audio_rate: int | None = None
    video_rate: int | None = None

    @property
    def name(self) -> str:
        """The folder of the run below that of the demo."""
        rates = [str(rate) for rate in (self.audio_rate, self.video_rate) if rate is not None]
        return "-".join([self.model, *([self.task] if self.task else []), *rates]) + f"/{self.seed}"

    @property
    def tasks(self) -> list[str]:
        """The tasks it is trained and tested on."""
        return list(SPEECH_TASKS) if self.task is None else [self.task]

    @property
    def rates(self) -> dict[str, list[int]]:
        """Its rates by medium."""
        if self.task is None:
            return {"audio": list(AUDIO_RATES), "video": list(VIDEO_RATES)}
        rates = {"audio": self.audio_rate, "video": self.video_rate}
        return {medium: [rate] for medium, rate in rates.items() if rate is not None}

    @property
    def budgets(self) -> list[str]:
        """The budgets it is tested at; each sample is answered at the media it holds."""
        combinations: list[list[str]] = [[]]
        for medium, rates in self.rates.items():
            combinations = [[*before, f"{medium}=/{rate}"] for before in combinations for rate in rates]
        return [",".join(parts) for parts in combinations]


def full_demo(settings: FullDemoConfig, *, progress: Progress | None = None) -> float:
    """Run the demo, see `run_demo`, or what of it is not there yet.

    Raises:
        ImportError: the speech synthesiser is not installed; the message has the pip line.
    """
    works = [Work(run_settings(job, settings), evaluation_settings(job, settings)) for job in jobs_of(settings)]
    return run_demo(settings, partial(write_corpus, settings), works, progress=progress)


def jobs_of(settings: FullDemoConfig) -> list[Job]:
    """List every model at every seed, the longest first."""
    elastic = [Job(model, seed) for seed in settings.seeds for model in ELASTIC]
    return elastic + [job for seed in settings.seeds for job in separate_jobs(seed)]


def separate_jobs(seed: int) -> list[Job]:
    """List one model for each task and combination of rates."""
    both = [Job(SEPARATE, seed, "avsr", audio, video) for audio in AUDIO_RATES for video in VIDEO_RATES]
    audio = [Job(SEPARATE, seed, "asr", audio_rate=rate) for rate in AUDIO_RATES]
    return both + [Job(SEPARATE, seed, "vsr", video_rate=rate) for rate in VIDEO_RATES] + audio


def write_corpus(settings: FullDemoConfig, progress: Progress) -> None:
    """Write the speech corpus, and of each split a manifest per task beside the whole one."""
    folder = Path(settings.out) / "speech"
    last = folder / "test-avsr.jsonl"
    if last.exists():
        return
    write_speech(folder, settings.num_utterances, settings.num_test_utterances, settings.seed, progress)
    for split in ("train", "test"):
        samples = read_manifest(folder / f"{split}.jsonl", folder)
        for task in SPEECH_TASKS:
            write_manifest(folder / f"{split}-{task}.jsonl", [sample for sample in samples if sample.task == task])


def run_settings(job: Job, settings: FullDemoConfig) -> Any:
    """Reduce the demo's recipe to speech, at the job's tasks, rates and adapter."""
    from mllm.config.run import read_run_config

    steps = steps_of(job, settings)
    values = recipe(settings, job.name, seed=job.seed, steps=steps, num_reports=30, versions=VERSIONS)
    model, data = values["model"], values["data"]
    speech = Path(settings.out) / "speech"
    for medium in ("image", "audio", "video"):
        if medium not in job.rates:
            del model[medium]
        else:
            model[medium]["budgets"] = [f"/{rate}" for rate in job.rates[medium]]
    targets = model["adapter"]["targets"]
    if job.model in ELASTIC:
        model["adapter"] = dict(ELASTIC[job.model])
        if model["adapter"]["kind"] == "lora_bank":
            model["adapter"]["targets"] = targets
    del data["captions"]
    data["train"] = [str(speech / f"train-{task}.jsonl") for task in job.tasks]
    data["noise"] = str(speech / "noise" / "train.wav")
    if "audio" not in job.rates:
        del data["noise"], data["snr_db"]
    return read_run_config(values)


def steps_of(job: Job, settings: FullDemoConfig) -> int:
    """Count the optimizer steps of a job."""
    return settings.steps * (STEPS_OF_ELASTIC if job.task is None else 1)


def evaluation_settings(job: Job, settings: FullDemoConfig) -> EvaluationConfig:
    """Ask for the job's tasks at its budgets; those with audio in quiet and in babble, video alone once."""
    speech = Path(settings.out) / "speech"
    hears = "audio" in job.rates
    return EvaluationConfig(
        model=str(Path(settings.out) / job.name),
        manifest=[str(speech / f"test-{task}.jsonl") for task in job.tasks],
        budgets=job.budgets,
        noise=str(speech / "noise" / "test.wav") if hears else None,
        snr_db=list(SNRS_DB) if hears else [None],
        max_new_tokens=24,
        batch_size=50,
        seed=settings.seed,
        use_cpu=True,
    )
