"""The long demo of pictures: elastic models in three styles against separately trained ones of one count of tokens.

Knows the world's picture corpus, training and evaluation, and which models are compared. Does not know how any works.

    out/pictures/            the corpus, shared by all models
    out/features/            what the frozen encoder makes of it
    out/<model>/<seed>/      a run and its evaluation
    out/comparison.*         see `pictures_report.py`

How they are trained side by side is in `full_jobs.py`.
"""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from mllm.evaluation.settings import EvaluateSettings
from mllm.world.demo import RECIPE, claim
from mllm.world.full_jobs import Progress, Work, encode_all, num_processes, run_all
from mllm.world.picture_corpus import write_picture_corpus

COUNTS = (64, 16, 4, 1)
STYLES: dict[str, dict[str, Any]] = {
    "m3": {"compressor": "pool"},
    "haar": {"compressor": "pool", "order": "haar"},
    "mqt": {"compressor": "query", "num_queries": COUNTS[0], "query_start": "pyramid"},
}
"""What makes soft tokens: pooled maps, the same maps nested as prefixes, or Matryoshka queries."""
COMPRESSOR_RATES = {"mqt": 2e-4}
"""Learning rates of compressors that need a smaller one than the rest: queries are four matrices deep, not one."""
STEPS_OF_ELASTIC = len(COUNTS)
"""Steps of an elastic model for each step of a separate one: it draws each count as often as they do."""
ROWS_PER_STEP = 12
"""Dialogues of each step, the same number whatever a picture costs."""


@dataclass(frozen=True, kw_only=True)
class FullPicturesSettings:
    """How much the long demo of pictures does; the defaults take less than an hour on 2 CPU cores."""

    out: str = "runs/demo_full_pictures"
    """Folder of the corpus, the runs, and the comparison."""
    seed: int = 0
    """Of the corpus, and the first of the seeds of training."""
    num_seeds: int = 3
    """How often everything is trained."""
    steps: int = 200
    """Optimizer steps of a separately trained model; an elastic one takes four times as many."""
    num_scenes: int = 2500
    """Pictures to train on, with eight questions each."""
    num_test_scenes: int = 200
    """Pictures to test on, with a question of every kind."""
    num_workers: int | None = None
    """Models trained at a time, one thread each; as many as there are cores when left out."""

    def __post_init__(self) -> None:
        for key in ("num_seeds", "steps", "num_scenes", "num_test_scenes", "num_workers"):
            value = getattr(self, key)
            if value is not None and value < 1:
                raise ValueError(f"{key} is {value}; it must be at least 1")


@dataclass(frozen=True)
class PictureJob:
    """One model to train and evaluate: at all counts (no `count`), or at one."""

    style: str
    seed: int
    count: int | None = None

    @property
    def name(self) -> str:
        """The folder of the run below that of the demo."""
        return (self.style if self.count is None else f"{self.style}-{self.count}") + f"/{self.seed}"

    @property
    def counts(self) -> list[int]:
        """The counts of tokens it is trained and tested at."""
        return list(COUNTS) if self.count is None else [self.count]


def full_pictures(settings: FullPicturesSettings, *, progress: Progress | None = None) -> float:
    """Make the corpus, train and evaluate every model; what is there already is not made again.

    Returns:
        The seconds it took.

    Raises:
        ValueError: the folder holds a demo of other settings.
    """
    report = progress or (lambda *_: None)
    started = time.monotonic()
    claim(Path(settings.out), settings, ignored=("out", "num_workers", "num_seeds"))
    folder = Path(settings.out) / "pictures"
    if not (folder / "test.jsonl").exists():
        report("drawing", 0, 1)
        write_picture_corpus(
            folder, num_train=settings.num_scenes, num_test=settings.num_test_scenes, seed=settings.seed
        )
        report("drawing", 1, 1)
    works = [Work(run_settings(job, settings), evaluation_settings(job, settings)) for job in picture_jobs(settings)]
    num_workers = num_processes(settings.num_workers)
    encode_all(works[0].run, settings.num_scenes, num_workers=num_workers, progress=report)
    run_all(works, num_workers=num_workers, progress=report)
    return time.monotonic() - started


def picture_jobs(settings: FullPicturesSettings) -> list[PictureJob]:
    """Every model at every seed, seed by seed, in each the longest first."""
    return [
        PictureJob(style, seed, count)
        for seed in range(settings.seed, settings.seed + settings.num_seeds)
        for count in (None, *COUNTS)
        for style in STYLES
    ]


def run_settings(job: PictureJob, settings: FullPicturesSettings) -> Any:
    """The demo's recipe on pictures alone, in the job's style and at its counts."""
    from mllm.training.settings import read_run_settings

    values = yaml.safe_load(RECIPE.read_text())
    model, data, train = values["model"], values["data"], values["train"]
    pictures, folder = Path(settings.out) / "pictures", Path(settings.out) / job.name
    del model["audio"], model["video"], data["noise"], data["snr_db"]
    style = STYLES[job.style]
    if style["compressor"] != "pool":
        del model["image"]["projector_size"]
    model["image"] |= {**style, "budgets": job.counts}
    model["seed"] = train["seed"] = job.seed
    data |= {"train": [str(pictures / "train.jsonl")], "captions": [str(pictures / "captions.jsonl")]}
    data |= {"num_workers": 0, "max_rows": ROWS_PER_STEP, "tokens_per_batch": 4096}
    data["features"] = {"folder": str(Path(settings.out) / "features"), "versions": 1, "seed": settings.seed}
    steps = settings.steps * (STEPS_OF_ELASTIC if job.count is None else 1)
    train |= {"max_steps": steps, "warmup_steps": steps // 9, "log_every": max(steps // 20, 1)}
    train |= {"output": str(folder), "progress": False, "tensorboard": False}
    if job.style in COMPRESSOR_RATES:
        train["part_learning_rates"] = {"compressors": COMPRESSOR_RATES[job.style]}
    return read_run_settings(values)


def evaluation_settings(job: PictureJob, settings: FullPicturesSettings) -> EvaluateSettings:
    """The test questions at each of the job's counts."""
    return EvaluateSettings(
        model=str(Path(settings.out) / job.name),
        manifest=[str(Path(settings.out) / "pictures" / "test.jsonl")],
        budgets=[f"image={count}" for count in job.counts],
        max_new_tokens=6,
        batch_size=100,
        seed=settings.seed,
        use_cpu=True,
    )
