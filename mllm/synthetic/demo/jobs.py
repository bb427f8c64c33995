"""Trains and evaluates many models, each in a worker process with one thread, for the long demos.

Knows the demo's recipe, runs, evaluations and processes. Does not know which models there are or why.

    <out>/demo.json        the settings that the folder was made with
    <run>/                 a run and its evaluation; one that is there is not made again
    <features>/whole       written when the features of the training set are complete
"""

import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, wait
from dataclasses import dataclass, fields
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import yaml

from mllm.config.evaluation import EvaluationConfig
from mllm.config.model import check_at_least
from mllm.evaluation.report import RESULTS
from mllm.synthetic.demo.demo import RECIPE, claim
from mllm.utils.progress import Progress


@dataclass(frozen=True, kw_only=True)
class LongDemoConfig:
    """Hold what the configs of all long demos share; the rest are sizes of a corpus."""

    out: str
    """Folder for the corpus, the runs, and the comparison."""
    seed: int = 0
    """Random seed of the corpus, and the first of the seeds of training."""
    num_seeds: int = 3
    """Number of seeds that everything is trained with."""
    steps: int
    """Number of optimizer steps of a separately trained model."""
    num_workers: int | None = None
    """Number of models trained at a time, one thread each; as many as there are cores when left out."""

    def __post_init__(self) -> None:
        check_at_least(self, [field.name for field in fields(self) if field.name not in ("out", "seed")])

    @property
    def seeds(self) -> range:
        """The seeds that everything is trained with."""
        return range(self.seed, self.seed + self.num_seeds)


@dataclass(frozen=True)
class Work:
    """One model: its run (a `RunConfig`), and how it is evaluated afterwards."""

    run: Any
    evaluation: EvaluationConfig

    @property
    def folder(self) -> Path:
        """The run folder."""
        return Path(self.run.train.out)

    @property
    def steps(self) -> int:
        """Optimizer steps of the run."""
        return self.run.train.max_steps


def run_demo(
    settings: LongDemoConfig,
    write_corpus: Callable[[Progress], None],
    works: Sequence[Work],
    *,
    progress: Progress | None,
) -> float:
    """Make the corpus, train and evaluate every model; what is there already is not made again.

    Args:
        write_corpus: what makes the corpus, unless it is there.
        works: all models; the first is trained on all there is.

    Returns:
        The seconds it took.

    Raises:
        ValueError: the folder holds a demo of other settings.
    """
    report = progress or (lambda *_: None)
    started = time.monotonic()
    claim(Path(settings.out), settings, ignored=("out", "num_workers", "num_seeds"))
    write_corpus(report)
    num_workers = settings.num_workers or os.cpu_count() or 1
    encode_all(works[0].run, num_workers=num_workers, progress=report)
    run_all(works, num_workers=num_workers, progress=report)
    return time.monotonic() - started


def recipe(
    settings: LongDemoConfig, name: str, *, seed: int, steps: int, num_reports: int, versions: int
) -> dict[str, Any]:
    """Turn the demo's recipe into a run of a long demo: seeds, steps, features and folder; the rest is the caller's.

    Args:
        name: folder of the run below that of the demo.
        num_reports: how often the run tells its loss.
        versions: of each training sample, see `FeatureConfig`.
    """
    values = yaml.safe_load(RECIPE.read_text())
    model, data, train = values["model"], values["data"], values["train"]
    model["seed"] = train["seed"] = seed
    data["num_workers"] = 0
    data["share_media"] = False  # models of one task have nothing to share, and all are to see batches made alike
    data["features"] = {"folder": str(Path(settings.out) / "features"), "versions": versions, "seed": settings.seed}
    train |= {"max_steps": steps, "warmup_steps": steps // 9, "log_every": max(steps // num_reports, 1)}
    train |= {"out": str(Path(settings.out) / name), "progress": False, "tensorboard": False}
    return values


def encode_all(run: Any, *, num_workers: int, progress: Progress) -> None:
    """Encode a run's training set with the frozen encoders, once for all models that name the same features."""
    folder = Path(run.data.features.folder)
    done = folder / "whole"
    if done.exists():
        return
    num_rows = sum(Path(manifest).read_bytes().count(b"\n") for manifest in run.data.train)
    with ProcessPoolExecutor(num_workers, mp_context=get_context("spawn")) as pool:
        waiting = {pool.submit(_encode_part, run, rank, num_workers) for rank in range(num_workers)}
        for _ in _finished(pool, waiting):
            rows = sum(file.read_bytes().count(b"\n") for file in folder.glob("index-*.jsonl"))
            progress("encoding", rows, num_rows * run.data.features.versions)
    done.touch()


def run_all(works: Sequence[Work], *, num_workers: int, progress: Progress) -> float:
    """Train and evaluate all, and tell how many optimizer steps of how many are done.

    Returns:
        The seconds it took.
    """
    started = time.monotonic()
    total = sum(work.steps for work in works)
    with ProcessPoolExecutor(num_workers, mp_context=get_context("spawn")) as pool:
        for _ in _finished(pool, {pool.submit(_run_one, work) for work in works}):
            done = sum(min(_step(work.folder / "log.jsonl"), work.steps) for work in works)
            progress(f"training {len(works)} models", done, total)
    return time.monotonic() - started


def _encode_part(run: Any, rank: int, num_ranks: int) -> None:
    import torch

    from mllm.training.feature_cache.building import make_features

    torch.set_num_threads(1)
    make_features(run, rank=rank, num_ranks=num_ranks)


def _run_one(work: Work) -> None:
    import torch

    from mllm.evaluation.run import evaluate
    from mllm.training.run import train

    torch.set_num_threads(1)
    if (work.folder / "evaluation" / RESULTS).exists():
        return
    if not (work.folder / "trainables.safetensors").exists():
        train(work.run, resume="auto")
    evaluate(work.evaluation)


def _finished(pool: ProcessPoolExecutor, waiting: set[Future[None]]) -> Iterator[None]:
    """Yield every few seconds until all are done, and once more; the first failure stops all."""
    while waiting:
        finished, waiting = wait(waiting, timeout=5, return_when="FIRST_EXCEPTION")
        yield
        for one in finished:
            if (problem := one.exception()) is not None:
                pool.shutdown(cancel_futures=True)
                raise problem


def _step(log: Path) -> int:
    """Read the last step a run has reported."""
    if not log.exists():
        return 0
    lines = [line for line in log.read_text(encoding="utf-8").split("\n")[:-1] if line]
    return json.loads(lines[-1])["step"] if lines else 0
