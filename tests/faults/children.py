"""Runs work in a forked child, which may be killed at a named place or after so many seconds.

The parent has imported everything already, so that a try takes a fork and not seven seconds.
"""

import contextlib
import os
import random
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from free_ports import free_port
from tqdm.std import tqdm

from mllm.utils import fail_points

KILLED = -signal.SIGKILL
TIMED_OUT = 124
"""The exit code of a child that did not end and was killed for it; what it said begins with that."""


@dataclass(frozen=True)
class Ended:
    """Says how a child ended: its exit code, negative after a signal; what it wrote; how long it took."""

    code: int
    said: str
    seconds: float


def run_child(
    work: Callable[[], object],
    log: Path,
    *,
    fail_point: str = "",
    signal_after: tuple[float, int] | None = None,
    timeout: float = 300,
    observe: Callable[[int], object] = lambda child: None,
) -> Ended:
    """Run work in a child of a process group of its own.

    Args:
        log: where its two outputs go.
        fail_point: see `mllm.utils.fail_points`.
        signal_after: seconds, and the signal that the child's whole group gets then.
        timeout: seconds, after which it is killed and its code is `TIMED_OUT`.
        observe: called with the child's process id again and again while it lives.
    """
    started = time.monotonic()
    child = _start(work, log, fail_point, {})
    while True:
        if (code := _exit_code(child)) is not None:
            return Ended(code, log.read_text(errors="replace"), time.monotonic() - started)
        seconds = time.monotonic() - started
        if signal_after is not None and seconds >= signal_after[0]:
            os.killpg(child, signal_after[1])
            signal_after = None
        if seconds > timeout:
            _kill(child)
            return _timed_out(log, seconds)
        observe(child)
        time.sleep(0.002)


def run_pair(
    work: Callable[[], object],
    log: Path,
    *,
    fail_point: str = "",
    kill_after: float | None = None,
    rank: int = 0,
    timeout: float = 300,
) -> list[Ended]:
    """Run work in two children that are the processes of one launcher; as it does, end the other when one has failed.

    Args:
        log: where the outputs of both go, each into a file with its rank as suffix.
        fail_point: of the child `rank` alone.
        kill_after: seconds after which the child `rank` is killed.
        timeout: seconds, after which those that are left are killed and their code is `TIMED_OUT`.
    """
    started, address = time.monotonic(), {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    logs = [log.with_suffix(f".{number}") for number in range(2)]
    children = [
        _start(
            work,
            logs[number],
            fail_point if number == rank else "",
            {**address, "RANK": str(number), "LOCAL_RANK": str(number), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"},
        )
        for number in range(2)
    ]
    ended: dict[int, Ended] = {}
    while len(ended) < 2:
        seconds = time.monotonic() - started
        for number in {0, 1} - ended.keys():
            if (code := _exit_code(children[number])) is not None:
                ended[number] = Ended(code, logs[number].read_text(errors="replace"), seconds)
        left = [children[number] for number in {0, 1} - ended.keys()]
        if kill_after is not None and seconds >= kill_after:
            for child in {children[rank]}.intersection(left):
                os.killpg(child, signal.SIGKILL)
            kill_after = None
        if any(one.code for one in ended.values()):
            for child in left:
                os.killpg(child, signal.SIGKILL)
        if seconds > timeout:
            for number in {0, 1} - ended.keys():
                _kill(children[number])
                ended[number] = _timed_out(logs[number], seconds)
        time.sleep(0.002)
    return [ended[0], ended[1]]


def _timed_out(log: Path, seconds: float) -> Ended:
    said = log.read_text(errors="replace")[-1000:]
    return Ended(TIMED_OUT, f"did not end in {seconds:.0f} seconds: {said}", seconds)


def _start(work: Callable[[], object], log: Path, fail_point: str, environment: dict[str, str]) -> int:
    """Fork a child that works, in a process group of its own; its process id."""
    if (child := os.fork()) == 0:
        os.setpgid(0, 0)
        os.environ.update(environment)
        _run(work, log, fail_point)
    with contextlib.suppress(OSError):  # the child is quicker, or gone; both do it, so that the group is there at once
        os.setpgid(child, child)
    return child


def _exit_code(child: int) -> int | None:
    """Return with what a child has ended, negative after a signal, or None while it lives."""
    done, status = os.waitpid(child, os.WNOHANG)
    if not done:
        return None
    _end_group(child)
    return os.waitstatus_to_exitcode(status)


def _kill(child: int) -> None:
    _end_group(child)
    os.waitpid(child, 0)


def _end_group(child: int) -> None:
    """Kill what a dead child has left behind, such as workers that have not noticed yet."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)


def _run(work: Callable[[], object], log: Path, fail_point: str) -> None:
    code = 1
    try:
        handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(handle, 1)
        os.dup2(handle, 2)
        sys.stdout = sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
        _own_lock_of_bars()
        fail_points.arm(fail_point)
        result = work()
        code = result if isinstance(result, int) else 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def _own_lock_of_bars() -> None:
    """Give the bars of this process a lock of its own; forked ones share one, which one that is killed may hold."""
    lock, kinds = threading.RLock(), [tqdm]
    while kinds:
        kind = kinds.pop()
        kind.set_lock(lock)
        kinds += kind.__subclasses__()


def mutate(content: bytes, rng: random.Random) -> bytes:
    """Damage a file as disks, networks and half copies do: cut, flip, overwrite, repeat, swap or append."""
    size, kind = len(content), rng.randrange(7)
    start = rng.randrange(size) if size else 0
    stop = min(size, start + rng.randrange(1, 64))
    if kind == 0 or not size:
        return content[:start]
    if kind <= 2:
        flipped = bytearray(content)
        flipped[start] ^= 1 << rng.randrange(8)
        return bytes(flipped)
    middle = {3: rng.randbytes(stop - start), 4: bytes(stop - start), 5: content[start:stop] * 2}
    return content[:start] + middle.get(kind, content[start:stop] + rng.randbytes(8)) + content[stop:]
