"""Measures where the time of a run goes: waiting for batches, encoders, the rest of the model, and what is left.

Knows clocks, and the names of parts. Does not know what a part does, data or the optimizer.

Every report has the seconds per optimizer step of `waiting` (for the next batch), `encoding` (encoders, forwards),
`model` (compressors, LLM, loss, backward) and `other` (optimizer, reports, checkpoints), and those that the processes
which prepare batches spent on a step of one training process: `decode`, `transform`, `collate`.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import nn

from mllm.budget import Budget
from mllm.data.manifest import Sample
from mllm.processing.processor import ElasticProcessor, LoadedMedia
from mllm.transforms.augmentation import Augmentation

PARTS = ("waiting", "encoding", "model", "other")
WORK = ("decode", "transform", "collate")
MAX_WAITING_FRACTION = 0.1
"""A run that waits longer than this for its batches is told what would help."""


class Stopwatch:
    """Adds up seconds by name, in one process."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def measure(self, name: str) -> Iterator[None]:
        """Add the time until the end of the block."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - started

    def take(self) -> dict[str, float]:
        """Return the seconds so far; from now on they count from 0."""
        taken, self.seconds = self.seconds, {}
        return taken


class TimedReader:
    """Times a loader of files."""

    def __init__(self, reader: Any, watch: Stopwatch) -> None:
        self.reader = reader
        self.watch = watch
        self.max_mismatch_seconds = reader.max_mismatch_seconds

    def __call__(self, medium: str, path: Any) -> Any:
        """Do as the reader does."""
        with self.watch.measure("decode"):
            return self.reader(medium, path)

    def frames(self, path: Any, sampling: Any) -> Any:
        """Do as the reader does."""
        with self.watch.measure("decode"):
            return self.reader.frames(path, sampling)


class TimedLoad:
    """Times `ElasticProcessor.load_media`: `decode` is reading files, `transform` the rest."""

    def __init__(
        self,
        processor: ElasticProcessor,
        reader: Any,
        watch: Stopwatch,
        *,
        augmentation: Augmentation | None = None,
        budgets: Sequence[Budget] = (),
    ) -> None:
        self.processor = processor
        self.reader = TimedReader(reader, watch)
        self.augmentation = augmentation
        self.budgets = budgets
        self.watch = watch

    def __call__(self, sample: Sample, *, generator: Any) -> list[LoadedMedia]:
        """Load the media of a sample, augmented where there is a generator and an augmentation."""
        before = self.watch.seconds.get("decode", 0.0)
        with self.watch.measure("transform"):
            loaded = self.processor.load_media(
                sample,
                generator=generator,
                loader=cast(Any, self.reader),
                augmentation=self.augmentation,
                budgets=self.budgets,
            )
        self.watch.seconds["transform"] -= self.watch.seconds.get("decode", 0.0) - before
        return loaded


class Pace:
    """Keeps the time of a training process.

    Args:
        encoders: their forward passes are timed, on a GPU by events of its own, without waiting for it.
    """

    def __init__(self, encoders: Sequence[nn.Module] = ()) -> None:
        self.watch = Stopwatch()
        self.work: dict[str, float] = {}
        self.started = time.perf_counter()
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self._begun: Any = None
        for encoder in encoders:
            encoder.register_forward_pre_hook(self._begin)
            encoder.register_forward_hook(self._end)

    def batches(self, iterator: Iterator[Any]) -> Iterator[Any]:
        """Yield the batches of an iterator, timing the wait for each; what their making took is added up."""
        while True:
            with self.watch.measure("waiting"):
                batch = next(iterator, None)
            if batch is None:
                return
            for name, seconds in batch.get("seconds", {}).items():
                self.work[name] = self.work.get(name, 0.0) + seconds
            yield batch

    def take(self) -> dict[str, float]:
        """Return seconds by part since the last time, and of work in the processes that prepare batches."""
        measured, whole = self.watch.take(), time.perf_counter() - self.started
        measured["encoding"] = measured.get("encoding", 0.0) + self._encoding_on_gpu()
        seconds = {name: measured.get(name, 0.0) for name in ("waiting", "encoding")}
        seconds["model"] = max(measured.get("step", 0.0) - seconds["encoding"], 0.0)
        seconds["other"] = max(whole - seconds["waiting"] - measured.get("step", 0.0), 0.0)
        work, self.work, self.started = self.work, {}, time.perf_counter()
        return {f"seconds/{name}": value for name, value in seconds.items()} | {
            f"worker_seconds/{name}": work[name] for name in WORK if name in work
        }

    def _begin(self, module: nn.Module, inputs: Any) -> None:
        if torch.cuda.is_available() and next(module.parameters()).is_cuda:
            self._begun = torch.cuda.Event(enable_timing=True)
            self._begun.record()
        else:
            self._begun = time.perf_counter()

    def _end(self, module: nn.Module, inputs: Any, outputs: Any) -> None:
        if isinstance(self._begun, float):
            seconds = time.perf_counter() - self._begun
            self.watch.seconds["encoding"] = self.watch.seconds.get("encoding", 0.0) + seconds
        else:
            ended = torch.cuda.Event(enable_timing=True)
            ended.record()
            self._events.append((self._begun, ended))

    def _encoding_on_gpu(self) -> float:
        if not self._events:
            return 0.0
        self._events[-1][1].synchronize()
        milliseconds = sum(begun.elapsed_time(ended) for begun, ended in self._events)
        self._events = []
        return milliseconds / 1_000


def mean_of(processes: Sequence[Mapping[str, float]], num_steps: int) -> dict[str, float]:
    """Average seconds per step over processes."""
    names = dict.fromkeys(name for seconds in processes for name in seconds)
    totals = {name: sum(seconds.get(name, 0.0) for seconds in processes) for name in names}
    return {name: total / len(processes) / max(num_steps, 1) for name, total in totals.items()}


def bottleneck(rows: Sequence[Mapping[str, float]], num_workers: int) -> str:
    """Say in one line where the time went, over the reports of a run, and what the run waited for.

    Args:
        rows: reports, each with `steps`, how many it is of, and the seconds per step.
        num_workers: processes that prepare batches, beside each training process.
    """
    totals: dict[str, float] = {}
    for row in rows:
        for name, value in row.items():
            if name.startswith(("seconds/", "worker_seconds/")):
                totals[name] = totals.get(name, 0.0) + row["steps"] * value
    parts = {name: totals.get(f"seconds/{name}", 0.0) for name in PARTS}
    if not (whole := sum(parts.values())):
        return ""
    fractions = ", ".join(
        f"{name} {100 * parts[name] / whole:.0f} %" for name in sorted(parts, key=lambda n: -parts[n])
    )
    line = f"time of a step: {fractions}"
    work = {name: totals[f"worker_seconds/{name}"] for name in WORK if f"worker_seconds/{name}" in totals}
    if parts["waiting"] < MAX_WAITING_FRACTION * whole or not work:
        return f"{line}; the bottleneck is {_words(parts)}"
    slowest = max(work, key=lambda name: work[name])
    line += f"; the bottleneck is data, and {slowest} is {100 * work[slowest] / sum(work.values()):.0f} % of its work"
    enough = sum(work.values()) / max(whole - parts["waiting"], 1e-9)
    if num_workers == 0:
        return f"{line}; it is done by the training process itself (data.num_workers is 0)"
    if enough > num_workers:
        return f"{line}; about {int(enough) + 1} workers per process would keep up (data.num_workers is {num_workers})"
    return f"{line}; its {num_workers} workers could keep up if the machine had cores for them"


def _words(parts: Mapping[str, float]) -> str:
    words = {
        "waiting": "data",
        "encoding": "encoders (data.features encodes once)",
        "model": "the LLM, forwards and back",
        "other": "what is beside the steps (optimizer, reports, checkpoints)",
    }
    return words[max(parts, key=lambda name: parts[name])]
