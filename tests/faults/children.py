"""Runs work in a forked child, which may be killed at a named place or after so many seconds.

The parent has imported everything already, so that a try takes a fork and not seven seconds.
"""

import contextlib
import os
import random
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from mllm.utils import fail_points

KILLED = -signal.SIGKILL


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
    timeout: float = 120,
) -> Ended:
    """Run work in a child of a process group of its own.

    Args:
        log: where its two outputs go.
        fail_point: see `mllm.utils.fail_points`.
        signal_after: seconds, and the signal that the child's whole group gets then.

    Raises:
        TimeoutError: it did not end; it is killed.
    """
    started = time.monotonic()
    if (child := os.fork()) == 0:
        os.setsid()
        _run(work, log, fail_point)
    end = started + timeout
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            seconds = time.monotonic() - started
            _end_group(child)
            return Ended(os.waitstatus_to_exitcode(status), log.read_text(errors="replace"), seconds)
        if signal_after is not None and time.monotonic() - started >= signal_after[0]:
            os.killpg(child, signal_after[1])
            signal_after = None
        if time.monotonic() > end:
            _end_group(child)
            os.waitpid(child, 0)
            raise TimeoutError(f"nothing after {timeout} seconds: {log.read_text(errors='replace')[-2000:]}")
        time.sleep(0.002)


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
        fail_points.arm(fail_point)
        result = work()
        code = result if isinstance(result, int) else 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


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
