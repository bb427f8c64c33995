"""Prepares a process that reads data: signals meant for the training leave it alone, and it tells what it is doing.

A terminal or a scheduler sends a signal to every process of a run. The training finishes its step on one, for which it
needs its workers, and these would end at once. And a worker that is stuck inside a decoder cannot be asked for its
samples but by a thread.

Knows signals and threads. Does not know what is read.
"""

import multiprocessing
import os
import signal
import sys
import threading
from multiprocessing.context import BaseContext, DefaultContext
from typing import Any

from mllm.training.interruption import STOPPING
from mllm.training.watchdog import stacks_of_this_process
from mllm.utils.activity import current_activity

SECONDS_BETWEEN_LOOKS = 1.0
BATCHES_PER_WORKER = 2
"""How many a worker is given at once."""


class WorkerProcess(multiprocessing.Process):
    """Starts with the signals blocked that end a run; `prepare_worker` says what becomes of them.

    Until then a worker would end by them, or take itself for the training, and the training would fail for it.
    """

    def start(self) -> None:
        """Start the process, whose first thread inherits what is blocked in this one."""
        before = signal.pthread_sigmask(signal.SIG_BLOCK, STOPPING)
        try:
            super().start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)


class WorkerContext(DefaultContext):
    """Starts processes in the way that is set, and each as a `WorkerProcess`."""

    Process = WorkerProcess


def worker_options(num_workers: int) -> dict[str, Any]:
    """Give the arguments of a DataLoader that say how its workers are started."""
    context: BaseContext | None = None
    if num_workers and hasattr(signal, "sigtimedwait"):
        context = WorkerContext(multiprocessing.get_context())
    return {
        "num_workers": num_workers,
        "worker_init_fn": prepare_worker,
        "multiprocessing_context": context,
        "prefetch_factor": BATCHES_PER_WORKER if num_workers else None,
    }


def max_unloaded(num_workers: int) -> int:
    """Return how many batches that were chosen may not be loaded when the next one is: none where the training process
    itself loads.
    """
    return BATCHES_PER_WORKER * num_workers


def prepare_worker(worker: int) -> None:
    """Leave it to the training process what a signal means; the first thing a worker does.

    SIGTERM is heeded where the training process itself sends it, which is how it ends a worker that does not end.
    """
    if not hasattr(signal, "sigtimedwait"):  # not on macOS
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        return
    ignored = [number for number in STOPPING if number != signal.SIGTERM]
    for number in ignored:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, ignored)
    # Blocked in this thread and in all that it starts, they wait for the one that asks for them.
    answered = {signal.SIGTERM, signal.SIGUSR2}
    signal.pthread_sigmask(signal.SIG_BLOCK, answered)
    threading.Thread(target=_answer, args=(worker, os.getppid(), answered), name="signals", daemon=True).start()


def _answer(worker: int, training_process: int, answered: set[signal.Signals]) -> None:
    """Answer signals, and end with the training process, of whose end a stuck worker would never hear."""
    while os.getppid() == training_process:
        request = signal.sigtimedwait(answered, SECONDS_BETWEEN_LOOKS)
        if request is None:
            continue
        if request.si_signo == signal.SIGUSR2:
            sys.stderr.write(f"worker {worker} of it: {current_activity()}\n{stacks_of_this_process()}")
            sys.stderr.flush()
        elif request.si_pid == training_process:
            break
    os._exit(0)
