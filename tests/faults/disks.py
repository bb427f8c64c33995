"""Rows of disks that are full, or too small: a write that is refused says so, and what was whole stays whole."""

import ctypes
import os
import random
import sys
from collections.abc import Callable
from pathlib import Path

from children import run_child
from ground import Ground, Outcome
from kills import SAVING, resumed

from mllm.training.run_folder import newest_checkpoint
from mllm.utils.files import WriteError

NEW_MOUNTS, NEW_USER, PRIVATE, REMOUNT = 0x20000, 0x10000000, 0x44000, 0x20  # of <sched.h> and <sys/mount.h>
LARGE = 2**26


def full_disks_in_training(ground: Ground, tries: int, rng: random.Random) -> Outcome:
    """A write fails for want of space at a place of a save: a message with path and bytes, older checkpoints whole."""
    outcome = Outcome()
    for number in range(tries):
        run = ground.fresh("try") / "run"
        point = [*SAVING[:2], "model.written"][number % 3]
        count = 2  # the first checkpoint is there, or the processor, which a run writes before it begins
        ended = run_child(lambda run=run: ground.world.train(run), ground.log, fail_point=f"{point}:full@{count}")
        problems = [] if "WriteError" in ended.said and "are free" in ended.said else [ended.said[-300:]]
        problems += [f"left: {path.name}" for path in run.iterdir() if path.name.startswith(".")]
        problems += [] if newest_checkpoint(run) is not None else ["no checkpoint is whole"]
        outcome.add(problems + resumed(ground, run), point)
    return outcome


def small_disks_in_training(ground: Ground, tries: int, rng: random.Random) -> Outcome:
    """A run folder that is a disk of its own and too small for the run: refused in words, what was whole stays whole,
    and once the disk is larger the run goes on to the same weights.

    The disk is a tmpfs that only the children of one try see, where the system lets a user mount one.
    """
    outcome, num_bytes = Outcome(), sum(path.stat().st_size for path in ground.run.rglob("*") if path.is_file())
    if reason := _cannot_mount(ground):
        outcome.skipped = reason
        return outcome
    for _ in range(tries):
        size, run = int(num_bytes * rng.uniform(0.05, 1.1)), ground.fresh("try") / "run"
        run.mkdir()

        def work(size: int = size, run: Path = run) -> int:
            mount_disk(run, size)
            problems = _problems_of_small_disk(ground, run)
            sys.stderr.write("; ".join(problems))
            return int(bool(problems))

        ended = run_child(work, ground.folder / "outer.log")
        outcome.add([ended.said[-400:]] if ended.code else [], f"{size} of {num_bytes} bytes")
    return outcome


def _problems_of_small_disk(ground: Ground, run: Path) -> list[str]:
    """Train on the disk that is mounted here until it is full, then on a larger one."""
    problems, ended = [], run_child(lambda: ground.world.train(run), ground.log)
    if ended.code:
        problems += [] if f"{WriteError.__name__}: " in ended.said and "are free" in ended.said else [ended.said[-300:]]
        problems += [f"left: {path.name}" for path in run.iterdir() if path.name.startswith(".")]
    mount_disk(run, LARGE, flags=REMOUNT)
    return problems + resumed(ground, run)


def _cannot_mount(ground: Ground) -> str:
    """Say why no disk can be mounted, or nothing."""
    place = ground.fresh("mount")
    ended = run_child(lambda: mount_disk(place, LARGE), ground.log)
    return "" if ended.code == 0 else f"no disk can be mounted here: {ended.said.strip().splitlines()[-1]}"


def mount_disk(place: Path, num_bytes: int, *, flags: int = 0) -> None:
    """Mount a tmpfs that this process alone sees, and its children.

    Args:
        flags: REMOUNT for another size of the one that is there.

    Raises:
        OSError: the system does not let this user.
    """
    libc = ctypes.CDLL(None, use_errno=True)

    def call(function: Callable[..., int], *words: object) -> None:
        if function(*words):
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))

    if not flags:
        user, group = os.getuid(), os.getgid()
        call(libc.unshare, NEW_MOUNTS | NEW_USER)
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"{user} {user} 1")
        Path("/proc/self/gid_map").write_text(f"{group} {group} 1")
        call(libc.mount, b"none", b"/", None, PRIVATE, None)
    call(libc.mount, b"tmpfs", os.fsencode(place), b"tmpfs", flags, f"size={num_bytes}".encode())
