"""Makes the features of a run by several processes on this machine, which end together.

Knows processes and signals. Does not know what a process encodes (`building.py`), or how it begins (`worker.py`).
"""

import multiprocessing
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from typing import Any

from mllm.config.run import RunConfig
from mllm.training.feature_cache.building import make_features
from mllm.training.feature_cache.worker import encode_share
from mllm.utils.progress import Progress
from mllm.utils.signals import sigterm_as_exit

SECONDS_TO_END = 10.0
"""Before a process that is to end is killed."""


@dataclass(frozen=True)
class Made:
    """Says what a build did: samples and versions it encoded, and the seconds that took."""

    num_samples: int
    seconds: float


def build_features(config: RunConfig, *, processes: int, show: Progress) -> Made:
    """Make all features of a run, by several processes on this machine.

    Raises:
        ValueError: see `filled_stores`; or a process failed.
    """
    assert config.data.features is not None
    started = time.monotonic()
    if processes == 1:
        num_done = 0

        def report(done: int, total: int) -> None:
            nonlocal num_done
            num_done = done
            show("encoding", done, total)

        make_features(config, progress=report)
        return Made(num_done, time.monotonic() - started)
    context = multiprocessing.get_context("spawn")  # forked processes cannot use a GPU
    shared = [(context.Value("q", 0), context.Value("q", 0)) for _ in range(processes)]
    running = [
        context.Process(target=encode_share, args=(config, rank, processes, *shared[rank])) for rank in range(processes)
    ]
    with _ended_together(running):
        running[0].start()
        _wait_for_claim(running[0], shared[0][1])
        for process in running[1:]:
            process.start()
        while any(process.is_alive() for process in running):
            show("encoding", sum(done.value for done, _ in shared), sum(max(total.value, 0) for _, total in shared))
            time.sleep(0.2)
    if failed := [rank for rank, process in enumerate(running) if process.exitcode]:
        raise ValueError(f"process {failed[0]} of {processes} that made features failed; its message stands above")
    return Made(sum(done.value for done, _ in shared), time.monotonic() - started)


@contextmanager
def _ended_together(running: Sequence[BaseProcess]) -> Iterator[None]:
    """End what still runs when the block is left, also by SIGTERM: nobody is left to encode for."""
    with sigterm_as_exit():
        try:
            yield
        finally:
            started = [process for process in running if process.pid is not None]
            for process in started:
                process.terminate()
            for process in started:
                process.join(SECONDS_TO_END)
                if process.is_alive():
                    process.kill()
                    process.join()


def _wait_for_claim(first: Any, total: Any) -> None:
    """Wait until the first process has found that folder and disk will do, or has failed."""
    while first.is_alive() and total.value == 0:
        time.sleep(0.05)
