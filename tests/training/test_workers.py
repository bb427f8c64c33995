"""Processes that read data: their errors read as they were raised, and they tell what they do when nothing moves."""

import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch.utils.data import DataLoader, Dataset

from mllm.data.skipped import TooManyBadSamples
from mllm.training.interruption import STOPPING
from mllm.training.pipeline.worker_errors import readable_errors
from mllm.training.pipeline.worker_process import worker_options


def too_many(index: int) -> Any:
    raise TooManyBadSamples("3 of 3 samples are bad: they are listed in x.jsonl; the last: 'a', ValueError: no")


def two_lines(index: int) -> Any:
    raise ValueError("first line\nsecond line")


def quoted(index: int) -> Any:
    try:
        raise ValueError("no")
    except ValueError as error:
        raise ValueError(f"sample 'a' cannot be used: {type(error).__name__}: {error}") from error


def killed(index: int) -> Any:
    os.kill(os.getpid(), signal.SIGKILL)


class Failing(Dataset[Any]):
    """A data set whose only sample ends as it is told to."""

    def __init__(self, end: Callable[[int], Any]) -> None:
        self.end = end

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> Any:
        return self.end(index)


@pytest.mark.parametrize(
    ("end", "kind", "message"),
    [
        (too_many, TooManyBadSamples, r"^3 of 3 samples are bad: .*; the last: 'a', ValueError: no$"),
        (two_lines, ValueError, r"^first line\nsecond line$"),
        (quoted, ValueError, r"^sample 'a' cannot be used: ValueError: no$"),
        (
            killed,
            ChildProcessError,
            r"^process \d+, which prepares batches, was ended( by Killed)? and could not say why;",
        ),
    ],
)
def test_an_error_in_a_worker_reads_as_it_was_raised(
    end: Callable[[int], Any], kind: type[Exception], message: str
) -> None:
    with pytest.raises(kind, match=message):
        next(readable_errors(iter(DataLoader(Failing(end), num_workers=1))))
    # Nobody waits for the collector to find the loader, which takes five seconds for each process.
    assert not multiprocessing.active_children()


class Numbers(Dataset[int]):
    """Four numbers, in a module that a worker can import."""

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> int:
        return index


SENT_AFTER_FORK: list[int] = []
os.register_at_fork(after_in_child=lambda: [os.kill(os.getpid(), number) for number in SENT_AFTER_FORK])


@pytest.mark.parametrize("number", STOPPING)
def test_a_signal_that_comes_while_a_worker_starts_leaves_it_alone(number: int) -> None:
    """A scheduler sends it to all processes of a run, also in the moment before a worker knows what to do with it."""
    loader = DataLoader(Numbers(), batch_size=None, **worker_options(2))
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    SENT_AFTER_FORK.append(number)
    try:
        numbers = iter(loader)
    finally:
        SENT_AFTER_FORK.clear()
    assert list(numbers) == [0, 1, 2, 3]
    assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == before


# A training process that is stuck, with a worker that is stuck as well. It never wakes up by itself.
STALLS = """
import sys, time
from pathlib import Path
from torch.utils.data import DataLoader, Dataset
from mllm.training import watchdog
from mllm.training.pipeline.worker_process import worker_options
from mllm.utils.activity import note_activity
run, rank, minutes = Path(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])
watchdog.SECONDS_TO_TELL = 1.0

class Clips(Dataset):
    def __len__(self): return 1
    def __getitem__(self, index):
        note_activity("loading media", ["clip-7"])
        (run / f"ready-{rank}").touch()
        stuck_decoder()

def stuck_decoder():
    time.sleep(120)

def wait_for_batches(loader):
    next(iter(loader))

note_activity("waiting for the batches of step 12", ["row-3"])
with watchdog.watched(run, rank=rank, minutes=minutes):
    wait_for_batches(DataLoader(Clips(), **worker_options(1)))
"""


def started(run: Path, rank: int, minutes: float) -> subprocess.Popen[str]:
    words = [sys.executable, "-c", STALLS, str(run), str(rank), str(minutes)]
    return subprocess.Popen(words, stderr=subprocess.PIPE, text=True)


@pytest.mark.slow
def test_a_run_in_which_nothing_moves_tells_what_every_process_does_and_ends(tmp_path: Path) -> None:
    """The second process would wait for ten minutes; it hears of the first one's end."""
    waits, stuck = started(tmp_path, 1, 10.0), None
    try:
        until = time.monotonic() + 100
        while not (tmp_path / "ready-1").exists() and time.monotonic() < until:
            time.sleep(0.05)
        stuck = started(tmp_path, 0, 0.1)
        said = [process.communicate(timeout=100)[1] for process in (stuck, waits)]
    finally:
        for process in filter(None, (stuck, waits)):
            process.kill()
    assert [process.returncode for process in (stuck, waits)] == [3, 3], said
    assert re.search(r"process 0 has not moved for \d+ seconds \(train.watchdog_minutes\): ", said[0])
    assert "process 1 was told by stalled-0.txt" in said[1]
    for rank, text in enumerate(said):
        assert "waiting for the batches of step 12, samples row-3" in text
        assert "in wait_for_batches" in text
        assert "worker 0 of it: loading media, samples clip-7" in text
        assert "in stuck_decoder" in text
        assert "goes on from its newest checkpoint with --resume auto" in text
        assert "in wait_for_batches" in (tmp_path / f"stalled-{rank}.txt").read_text()


# Something that takes two seconds, which is three times as long as anything may that has not said so.
LASTS = """
import sys, time
from pathlib import Path
from mllm.training import watchdog
from mllm.utils.activity import note_activity
watchdog.SECONDS_TO_TELL = 0.0
with watchdog.watched(Path(sys.argv[1]), rank=0, minutes=0.01):
    note_activity("saving", extra_seconds=float(sys.argv[2]))
    time.sleep(2.0)
"""


@pytest.mark.parametrize(("extra_seconds", "code"), [("0", 3), ("60", 0), ("inf", 0)])
def test_what_said_that_it_takes_longer_is_left_alone_for_that_time(
    tmp_path: Path, extra_seconds: str, code: int
) -> None:
    """A checkpoint of a large model takes as long as its disk does."""
    ended = subprocess.run([sys.executable, "-c", LASTS, str(tmp_path), extra_seconds], timeout=100, check=False)
    assert ended.returncode == code
