"""Writes checkpoint folders that are whole or not there, whenever a run is killed, and holds the lock of a run.

Knows files, digests and step numbers. Does not know tensors or what a file holds.

A checkpoint `checkpoint-00000012` is written beside its name first, every file flushed to the disk; then the manifest
with sizes and digests, last; then the folder gets its name in one step; then older ones are deleted. So at any instant
the newest complete checkpoint is whole. Digests catch what reads back without an error but with other contents.
"""

import contextlib
import json
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

from mllm.utils.files import aside_of, digest_of_file, flush_to_disk
from mllm.utils.run_paths import CHECKPOINT_NAME, checkpoint_path, list_checkpoints

try:
    import fcntl
except ImportError:  # not a POSIX system
    fcntl = None

MANIFEST = "manifest.json"
LOCK = "run.lock"
_ASIDE = re.compile(r"\.(checkpoint-\d{8,})\.(writing|deleting)")

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Checkpoint:
    """Describes a complete checkpoint: where it is, the step it holds, what its manifest says beside the files."""

    folder: Path
    step: int
    facts: dict[str, Any]


def write_checkpoint(run: Path, step: int, write: Callable[[Path], None], facts: dict[str, Any]) -> Path:
    """Write one checkpoint so that it is whole or not there.

    Args:
        write: puts the files into the folder it is given; no folders inside it.
        facts: plain values kept in the manifest.

    Raises:
        OSError: the disk is full, read-only or gone; what was there before is untouched. The message says how many
            bytes are free.
    """
    final = checkpoint_path(run, step)
    aside = aside_of(final)
    try:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        write(aside)
        files = {file.name: _seal(file) for file in sorted(aside.iterdir())}
        manifest = {"step": step, "facts": facts, "files": files}
        (aside / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
        flush_to_disk(aside / MANIFEST)
        flush_to_disk(aside)
        if final.exists():  # left by a run that was resumed from an older step
            _delete(final)
        os.replace(aside, final)
        flush_to_disk(run)
    except OSError as error:
        shutil.rmtree(aside, ignore_errors=True)
        with contextlib.suppress(OSError):
            error.add_note(f"while writing {final}; {shutil.disk_usage(run).free:,} bytes are free there")
        raise
    return final


def read_checkpoint(folder: Path) -> Checkpoint:
    """Read what a checkpoint is, after a check of every byte of it.

    Raises:
        ValueError: not a checkpoint, or one that is incomplete or damaged; the file is named.
    """
    match = CHECKPOINT_NAME.fullmatch(folder.name)
    if match is None or not folder.is_dir():
        raise ValueError(f"{folder} is no checkpoint folder; those are called checkpoint-00000000")
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        step, facts, files = manifest["step"], manifest["facts"], manifest["files"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{folder} is incomplete: {MANIFEST} cannot be read ({error})") from error
    if step != int(match[1]):
        raise ValueError(f"{folder} is damaged: {MANIFEST} is that of step {step}")
    for name, sealed in files.items():
        if not (folder / name).is_file():
            raise ValueError(f"{folder} is incomplete: {name} is missing")
        if (now := _size_and_digest(folder / name)) != sealed:
            raise ValueError(
                f"{folder} is damaged: {name} has {now['bytes']} bytes and SHA-256 {now['sha256'][:12]}..., "
                f"written were {sealed['bytes']} and {sealed['sha256'][:12]}..."
            )
    return Checkpoint(folder, step, facts)


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
            logger.warning("removing %s, which a run left when it was killed", path)
            shutil.rmtree(path)


@contextlib.contextmanager
def run_lock(run: Path) -> Iterator[None]:
    """Hold a run folder; two runs in one folder would overwrite each other's checkpoints.

    The lock is the kernel's, so it goes with the process however that ends.

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
        file.truncate(0)
        started = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
        file.write(f"process {os.getpid()} on {socket.gethostname()}, started {started}")
        file.flush()
        yield


def _seal(file: Path) -> dict[str, Any]:
    flush_to_disk(file)
    return _size_and_digest(file)


def _size_and_digest(file: Path) -> dict[str, Any]:
    return {"bytes": file.stat().st_size, "sha256": digest_of_file(file)}


def _delete(folder: Path) -> None:
    """Take the name away first, so that a half-deleted folder is never taken for a checkpoint."""
    doomed = folder.with_name(f".{folder.name}.deleting")
    shutil.rmtree(doomed, ignore_errors=True)
    os.replace(folder, doomed)
    shutil.rmtree(doomed)
