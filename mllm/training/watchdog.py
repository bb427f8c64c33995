"""Ends a run in which nothing moves, and says first what every process was doing, with which samples, and where.

A process that hangs takes all others with it: they wait for it in an exchange of gradients, by default for half an hour
and without a word. Each process therefore has a thread that looks at what was noted last (`mllm.utils.activity`).

    nothing new for `minutes` ── stack, phase and sample ids to stderr and to stalled-RANK.txt ── exit status 3
    another process has ended that way ── the same, so that all of them are in the log

Knows threads, processes and files. Does not know what a step is.
"""

import faulthandler
import logging
import math
import multiprocessing
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mllm.utils.activity import current_activity
from mllm.utils.exit_codes import BROKEN_DOWN

STALLED = "stalled-{rank}.txt"
SECONDS_TO_TELL = 5.0
"""How long a process that has told what it did waits for the others to do so; a launcher ends all after the first."""
SECONDS_MORE = 60.0
"""How much later the interpreter's own watchdog ends a process that does not even let this thread run."""
logger = logging.getLogger(__name__)


class Watchdog:
    """Watches this process from `start` to `stop`.

    Args:
        run: the run folder, in which processes tell each other.
        rank: of this process.
        minutes: how long one thing may take, beyond what it was noted to take.
    """

    def __init__(self, run: Path, *, rank: int, minutes: float) -> None:
        self.run, self.rank, self.seconds = run, rank, 60 * minutes
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def start(self) -> None:
        """Begin to watch; what was noted before counts from now on."""
        self._started = time.monotonic()
        self._thread.start()

    def stop(self) -> None:
        """Watch no longer."""
        self._stopped.set()
        self._thread.join()
        faulthandler.cancel_dump_traceback_later()

    def _watch(self) -> None:
        pause = min(1.0, self.seconds / 10)
        while not self._stopped.wait(pause):
            self._arm_last_resort()
            activity = current_activity()
            quiet = time.monotonic() - max(activity.since, self._started)
            if quiet > self.seconds + activity.extra_seconds:
                self._end(f"has not moved for {quiet:.0f} seconds (train.watchdog_minutes)")
            elif others := self._others_that_ended():
                self._end(f"was told by {others[0].name}, after {quiet:.0f} seconds of this")

    def _others_that_ended(self) -> list[Path]:
        own = STALLED.format(rank=self.rank)
        return [path for path in self.run.glob(STALLED.format(rank="*")) if path.name != own]

    def _arm_last_resort(self) -> None:
        """Let the interpreter dump stacks and end the process where a library holds its lock, so that no thread runs.

        It is put off as long as this thread runs.
        """
        seconds = self.seconds + current_activity().extra_seconds + SECONDS_MORE
        if sys.__stderr__ is not None and math.isfinite(seconds):
            faulthandler.dump_traceback_later(seconds, exit=True, file=sys.__stderr__)
        else:
            faulthandler.cancel_dump_traceback_later()

    def _end(self, why: str) -> None:
        report = f"process {self.rank} {why}: {current_activity()}\n{stacks_of_this_process()}"
        sys.stderr.write(report)
        sys.stderr.flush()
        try:
            (self.run / STALLED.format(rank=self.rank)).write_text(report, encoding="utf-8")
        except OSError as error:  # the disk may be why nothing moves
            sys.stderr.write(f"the other processes cannot be told: {error}\n")
        for child in multiprocessing.active_children():
            if child.pid is not None and hasattr(signal, "SIGUSR2"):
                os.kill(child.pid, signal.SIGUSR2)  # see `worker_process`
        time.sleep(SECONDS_TO_TELL)
        sys.stderr.write(f"process {self.rank} ends; the run goes on from its newest checkpoint with --resume auto\n")
        sys.stderr.flush()
        os._exit(BROKEN_DOWN)


@contextmanager
def watched(run: Path, *, rank: int, minutes: float | None) -> Iterator[None]:
    """Watch this process inside the block, or not where there is no limit; see `Watchdog`."""
    if minutes is None:
        yield
        return
    watchdog = Watchdog(run, rank=rank, minutes=minutes)
    watchdog.start()
    try:
        yield
    finally:
        watchdog.stop()


def remove_reports(run: Path) -> None:
    """Remove what processes of an earlier start have told; call it before any watchdog starts."""
    for path in run.glob(STALLED.format(rank="*")):
        path.unlink(missing_ok=True)


def stacks_of_this_process() -> str:
    """Write where every thread of this process is, but for the one that asks."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    told = []
    for number, frame in sys._current_frames().items():
        if number != threading.get_ident():
            told.append(f"thread {names.get(number, number)}:\n{''.join(traceback.format_stack(frame))}")
    return "".join(told)
