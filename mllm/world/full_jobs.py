"""Trains and evaluates many models, each in a worker process with one thread; what the long demos share.

Knows runs, evaluations and processes. Does not know which models there are or why.

    <run>/                 a run and its evaluation; one that is there is not made again
    <features>/whole       written when the features of the training set are complete
"""

import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, wait
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from mllm.evaluation.report import RESULTS
from mllm.evaluation.settings import EvaluateSettings

Progress = Callable[[str, int, int], None]
"""Called with what is being done, how much of it is done, and how much there is."""


@dataclass(frozen=True)
class Work:
    """One model: its run (a `RunSettings`), and how it is evaluated afterwards."""

    run: Any
    evaluation: EvaluateSettings

    @property
    def folder(self) -> Path:
        """The run folder."""
        return Path(self.run.train.output)

    @property
    def steps(self) -> int:
        """Optimizer steps of the run."""
        return self.run.train.max_steps


def num_processes(asked: int | None) -> int:
    """How many models are trained at a time: as asked, or one per core."""
    return asked or os.cpu_count() or 1


def encode_all(run: Any, num_rows: int, *, num_workers: int, progress: Progress) -> None:
    """What the frozen encoders make of a training set, once for all models that name the same features."""
    folder = Path(run.data.features.folder)
    done = folder / "whole"
    if done.exists():
        return
    with ProcessPoolExecutor(num_workers, mp_context=get_context("spawn")) as pool:
        waiting = {pool.submit(_encode_share, run, rank, num_workers) for rank in range(num_workers)}
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


def _encode_share(run: Any, rank: int, num_ranks: int) -> None:
    import torch

    from mllm.training.feature_building import make_features

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
    """Every few seconds until all are done, and once more; the first failure stops all."""
    while waiting:
        finished, waiting = wait(waiting, timeout=5, return_when="FIRST_EXCEPTION")
        yield
        for one in finished:
            if (problem := one.exception()) is not None:
                pool.shutdown(cancel_futures=True)
                raise problem


def _step(log: Path) -> int:
    """The last step a run has reported."""
    if not log.exists():
        return 0
    lines = [line for line in log.read_text(encoding="utf-8").split("\n")[:-1] if line]
    return json.loads(lines[-1])["step"] if lines else 0
