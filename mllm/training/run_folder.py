"""Writes checkpoint folders that are whole or not there, whenever a run is killed, and holds the lock of a run.

Knows files, digests and step numbers. Does not know tensors or what a file holds.

A checkpoint `checkpoint-00000012` is written beside its name first, every file flushed to the disk; then the manifest
with sizes and digests, last; then the folder gets its name in one step; then older ones are deleted. So at any instant
the newest complete checkpoint is whole. Digests catch what reads back without an error but with other contents.
"""

import contextlib
import logging
import os
import re
import shutil
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from mllm.utils.fail_points import fail_point
from mllm.utils.files import aside_of, flush_to_disk, folder_aside
from mllm.utils.run_paths import BEST, CHECKPOINT_NAME, MODEL_ASIDE, checkpoint_path, list_checkpoints
from mllm.utils.sealing import check_files, files_below, read_manifest, seal_folder

try:
    import fcntl
except ImportError:  # not a POSIX system
    fcntl = None

LOCK = "run.lock"
_ASIDE = re.compile(r"\.(checkpoint-\d{8,})\.(writing|deleting)")

logger = logging.getLogger(__name__)
_held_locks: set[int] = set()
"""Descriptors of the locks this process holds; a lock goes with the last copy of its descriptor, and forks copy it."""


def _let_go_of_locks() -> None:
    """Close this forked process's copies of the locks, which its parent still holds."""
    while _held_locks:
        os.close(_held_locks.pop())


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_let_go_of_locks)


@dataclass(frozen=True)
class Checkpoint:
    """Describes a complete checkpoint: where it is, the step it holds, what its manifest says beside the files."""

    folder: Path
    step: int
    facts: dict[str, Any]


def write_checkpoint(
    run: Path, step: int, write: Callable[[Path], None], facts: dict[str, Any], *, num_bytes: int | None = None
) -> Path:
    """Write one checkpoint so that it is whole or not there.

    Args:
        write: puts the files into the folder it is given; no folders inside it.
        facts: plain values kept in the manifest.
        num_bytes: how many bytes it takes, about; for the message when there are not so many.

    Raises:
        WriteError: the disk is full, read-only or gone; what was there before is untouched, and nothing is left of what
            was begun. The message says how many bytes are needed and free.
    """
    final = checkpoint_path(run, step)
    with folder_aside(aside_of(final), final, num_bytes=num_bytes) as aside:
        write(aside)
        fail_point("checkpoint.written")
        seal_folder(aside, files_below(aside), {"step": step, "facts": facts})
        fail_point("checkpoint.sealed")
        if final.exists():  # left by a run that was resumed from an older step
            _delete(final)
        os.replace(aside, final)
        fail_point("checkpoint.named")
        flush_to_disk(run)
    return final


def read_checkpoint(folder: Path) -> Checkpoint:
    """Read what a checkpoint is, after a check of every byte of it.

    Raises:
        ValueError: not a checkpoint, or one that is incomplete or damaged; the file is named.
    """
    match = CHECKPOINT_NAME.fullmatch(folder.name)
    if match is None or not folder.is_dir():
        raise ValueError(f"{folder} is no checkpoint folder; those are called checkpoint-00000000")
    manifest = read_manifest(folder)
    step = int(match[1])
    if manifest.get("step") != step:
        raise ValueError(f"{folder} is damaged: its manifest is that of step {manifest.get('step')}")
    check_files(folder, manifest["files"])
    return Checkpoint(folder, step, manifest["facts"])


def newest_checkpoint(run: Path) -> Checkpoint | None:
    """Find the newest complete checkpoint of a run; newer ones that are refused are logged with the reason."""
    for folder in reversed(list_checkpoints(run)):
        try:
            return read_checkpoint(folder)
        except ValueError as error:
            logger.warning("not resuming from it: %s", error)
    return None


def delete_old(run: Path, keep: int) -> None:
    """Delete all but the newest `keep` checkpoints; call it after a new one is in place."""
    for folder in list_checkpoints(run)[:-keep]:
        _delete(folder)


def remove_leftovers(run: Path) -> None:
    """Remove what a killed process left half written or half deleted."""
    for path in run.glob(".checkpoint-*"):
        if _ASIDE.fullmatch(path.name):
            _remove_leftover(path)
    for home in (run, run / BEST):
        if (home / MODEL_ASIDE).exists():
            _remove_leftover(home / MODEL_ASIDE)


def _remove_leftover(folder: Path) -> None:
    logger.warning("removing %s, which a run left when it was killed", folder)
    shutil.rmtree(folder)


@contextlib.contextmanager
def run_lock(run: Path) -> Iterator[None]:
    """Hold a run folder; two runs in one folder would overwrite each other's checkpoints.

    The lock is the kernel's, so it goes with the process however that ends: one that was forked meanwhile, such as a
    worker that outlives a killed run for seconds, does not keep it.

    Raises:
        ValueError: another process holds the folder; it is named.
    """
    run.mkdir(parents=True, exist_ok=True)
    with (run / LOCK).open("a+", encoding="utf-8") as file:
        if fcntl is None:
            logger.warning("this system cannot lock %s; take care that no other run uses it", run)
        else:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                file.seek(0)
                raise ValueError(f"{run} is in use by {file.read().strip() or 'another run'}") from error
            _held_locks.add(file.fileno())
        file.truncate(0)
        started = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
        file.write(f"process {os.getpid()} on {socket.gethostname()}, started {started}")
        file.flush()
        try:
            yield
        finally:
            _held_locks.discard(file.fileno())


def _delete(folder: Path) -> None:
    """Take the name away first, so that a half-deleted folder is never taken for a checkpoint."""
    doomed = folder.with_name(f".{folder.name}.deleting")
    shutil.rmtree(doomed, ignore_errors=True)
    os.replace(folder, doomed)
    fail_point("checkpoint.deleting")
    shutil.rmtree(doomed)
