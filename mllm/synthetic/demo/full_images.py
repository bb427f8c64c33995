"""Runs the long demo of images: elastic models in three styles against separate ones of one count of tokens each.

Knows the synthetic image corpus, training and evaluation, and which models are compared. Does not know how any works.

    out/images/              the corpus, shared by all models
    out/features/            what the frozen encoder makes of it
    out/<model>/<seed>/      a run and its evaluation
    out/comparison.*         see `full_images_report.py`

How they are trained side by side is in `jobs.py`.
"""

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from mllm.config.evaluation import EvaluationConfig
from mllm.synthetic.demo.demo import write_images
from mllm.synthetic.demo.jobs import LongDemoConfig, Work, recipe, run_demo
from mllm.utils.progress import Progress

COUNTS = (64, 16, 4, 1)
STYLES: dict[str, dict[str, Any]] = {
    "m3": {"kind": "pool"},
    "haar": {"kind": "pool", "order": "haar"},
    "mqt": {"kind": "query", "num_queries": COUNTS[0], "start": "pyramid"},
}
"""What makes soft tokens in each style: pooled grids, the same grids nested as prefixes, or Matryoshka queries."""
COMPRESSOR_RATES = {"mqt": 2e-4}
"""Learning rates of compressors that need a smaller one than the rest: queries are four matrices deep, not one."""
STEPS_OF_ELASTIC = len(COUNTS)
"""An elastic model takes so many steps for each step of a separate one: it samples each count as often as they do."""
ROWS_PER_STEP = 12
"""Dialogues of each step, the same number whatever an image costs."""


@dataclass(frozen=True, kw_only=True)
class FullImagesConfig(LongDemoConfig):
    """Say how much the long demo of images does; the defaults take less than an hour on 2 CPU cores."""

    out: str = "runs/demo_full_images"
    steps: int = 200
    """Number of optimizer steps of a separately trained model; an elastic one takes four times as many."""
    num_scenes: int = 2500
    """Number of images to train on, with eight questions each."""
    num_test_scenes: int = 200
    """Number of images to test on, with a question of every kind."""


@dataclass(frozen=True)
class ImageJob:
    """One model to train and evaluate, at all counts (`count` is None) or at one."""

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


def full_images(settings: FullImagesConfig, *, progress: Progress | None = None) -> float:
    """Run the demo, see `run_demo`, or what of it is not there yet."""
    works = [Work(run_settings(job, settings), evaluation_settings(job, settings)) for job in image_jobs(settings)]
    return run_demo(settings, partial(write_corpus, settings), works, progress=progress)


def image_jobs(settings: FullImagesConfig) -> list[ImageJob]:
    """List every model at every seed, seed by seed, in each the longest first."""
    return [ImageJob(style, seed, count) for seed in settings.seeds for count in (None, *COUNTS) for style in STYLES]


def write_corpus(settings: FullImagesConfig, progress: Progress) -> None:
    """Write the image corpus unless it is there."""
    folder = Path(settings.out) / "images"
    if not (folder / "test.jsonl").exists():
        write_images(folder, settings.num_scenes, settings.num_test_scenes, settings.seed, progress)


def run_settings(job: ImageJob, settings: FullImagesConfig) -> Any:
    """Reduce the demo's recipe to images alone, in the job's style and at its counts."""
    from mllm.config.run import read_run_config

    steps = settings.steps * (STEPS_OF_ELASTIC if job.count is None else 1)
    values = recipe(settings, job.name, seed=job.seed, steps=steps, num_reports=20, versions=1)
    model, data = values["model"], values["data"]
    images = Path(settings.out) / "images"
    del model["audio"], model["video"], data["noise"], data["snr_db"]
    compressor = STYLES[job.style]
    if compressor["kind"] != "pool":
        del model["image"]["projector"]
    model["image"] |= {"compressor": compressor, "budgets": job.counts}
    data |= {"train": [str(images / "train.jsonl")], "captions": [str(images / "captions.jsonl")]}
    data |= {"max_rows": ROWS_PER_STEP, "tokens_per_batch": 4096}
    if job.style in COMPRESSOR_RATES:
        values["train"]["part_learning_rates"] = {"compressors": COMPRESSOR_RATES[job.style]}
    return read_run_config(values)


def evaluation_settings(job: ImageJob, settings: FullImagesConfig) -> EvaluationConfig:
    """Ask the test questions at each of the job's counts."""
    return EvaluationConfig(
        model=str(Path(settings.out) / job.name),
        manifest=[str(Path(settings.out) / "images" / "test.jsonl")],
        budgets=[f"image={count}" for count in job.counts],
        max_new_tokens=6,
        batch_size=100,
        seed=settings.seed,
        use_cpu=True,
    )
