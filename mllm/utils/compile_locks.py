"""Removes what a compiler that was killed has left: torch waits for it without a word, and for ever.

`torch.utils.cpp_extension`, by which DeepSpeed compiles, makes a file `lock` beside what it compiles and removes it
when done. Whoever finds one waits until it is gone; whoever is killed meanwhile leaves it to all that come after.
"""

import logging
import os
import time
from collections.abc import Iterator
from pathlib import Path

COMPILING_SECONDS = 600.0
"""After so long without a new file beside it nobody compiles there; compiling takes a minute or two."""
logger = logging.getLogger(__name__)


def stale_locks() -> Iterator[Path]:
    """Yield the locks of this user beside which nothing has happened for `COMPILING_SECONDS`."""
    for lock in _locks():
        if _seconds_still(lock) > COMPILING_SECONDS:
            yield lock


def free_locks(name: str) -> None:
    """Remove a stale lock of an extension, and tell of one that may be somebody's, for which torch then waits.

    Args:
        name: of the extension, such as deepspeed_shm_comm.
    """
    stale = set(stale_locks())
    for lock in [lock for lock in _locks() if lock.parent.name == name]:
        if lock in stale:
            logger.warning("%s was left by a process that was ended while it compiled; it is removed", lock)
            lock.unlink(missing_ok=True)
        else:
            logger.warning(
                "%s: another process compiles, and this one waits for it; if it was ended, remove that file, or start "
                "again in %d minutes",
                *(lock, COMPILING_SECONDS / 60),
            )


def _locks() -> list[Path]:
    # Without torch, which `mllm doctor` may find broken. Below its own folder torch adds one for the version of Python
    # and the device, below a folder that it is told none.
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or cache / "torch_extensions").resolve()
    return sorted([*root.glob("*/lock"), *root.glob("*/*/lock")])


def _seconds_still(lock: Path) -> float:
    try:
        newest = max(path.stat().st_mtime for path in (lock, *lock.parent.iterdir()))
    except FileNotFoundError:  # it is compiled just now
        return 0.0
    return time.time() - newest
