"""Fetches the shards of a hub one by one, in threads of their own, and deletes those that are not read any more.

A shard comes whole and by `hf_hub_download`, rather than in ranges by `HfFileSystem`. Ranges would ask the hub for each
image by itself, again in every epoch, and hubs limit how often they are asked. A whole file goes on where the
connection broke, has its name only once all of it is there, with as many bytes as the hub listed, and is then read as
any shard of a disk, by as many processes as like; and what lies on the disk can be counted.

    kept        in the hub's own cache, which other programs share; nothing is deleted, and later runs find it
    bounded     in a folder of this process alone, which is gone when the process ends

Knows shards and who holds them. Does not know what they hold.
"""

import logging
import math
import os
import shutil
import threading
import time
import weakref
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path

from tqdm import tqdm

from mllm.data.hub import HubShard, root_of_snapshot, several_tries
from mllm.utils.activity import note_activity

SECONDS_BETWEEN_LINES = 10.0
"""How often the log says for which shard a run waits."""
MAX_AT_ONCE = 4
"""Shards that are fetched at the same time."""
SECONDS_TO_STOP = 5.0
logger = logging.getLogger(__name__)


@dataclass(eq=False)
class _Fetch:
    """Holds a shard that is on its way or here: the file and the root it will have, and who wants it.

    Args:
        holders: how many read it.
        was_held: whether anybody did; what was fetched ahead is not read yet.
    """

    shard: HubShard
    holders: int = 0
    was_held: bool = False
    num_bytes_here: int = 0
    result: "Future[tuple[Path, Path]]" = field(default_factory=Future)


def counting(fetch: _Fetch, stop: threading.Event) -> type[tqdm]:
    """Make the class of the bars that the client shows, which counts bytes and shows nothing beside a training's.

    Args:
        stop: ends the fetch at the next bytes where it is set.
    """

    class Progress(tqdm):  # pyright: ignore[reportMissingTypeArgument]
        """Counts what one bar would show; the client has two where it fetches by hf_xet, of bytes that come and that
        are written.
        """

        def __init__(self, *arguments: object, **options: object) -> None:
            super().__init__(disable=True)

        def update(self, n: float | None = 1) -> None:
            if stop.is_set():
                raise Stopped
            self.n += n or 0
            fetch.num_bytes_here = max(fetch.num_bytes_here, int(self.n))

    return Progress


class Stopped(BaseException):
    """Ends a fetch whose process ends; no error, since nobody waits for it any more."""


class HubCache:
    """Keeps the shards that one process reads.

    A shard is held before it is waited for, as often as there are readers of it, and let go as often. Only where
    `max_bytes` is set does letting go matter.

    Args:
        folder: new and of this process alone, for shards that are deleted again; the hub's own cache when None.
        max_bytes: how much may lie in the folder; goes with it.
    """

    def __init__(self, folder: Path | None = None, max_bytes: int | None = None) -> None:
        assert (folder is None) == (max_bytes is None)
        self.folder, self.max_bytes = folder, max_bytes
        self._fetches: dict[HubShard, _Fetch] = {}
        self._turn = threading.Semaphore(MAX_AT_ONCE)
        self._stop = threading.Event()
        self._threads: weakref.WeakSet[threading.Thread] = weakref.WeakSet()
        # Imported here and not by a thread: a worker that is forked while one imports would wait for it for ever.
        from huggingface_hub import hf_hub_download

        self._download = hf_hub_download
        self._end = weakref.finalize(self, _end, os.getpid(), self._stop, self._threads, folder)

    def fetch_ahead(self, shard: HubShard) -> None:
        """Begin to fetch a shard that is read later, where there is room beside those that are read or wait for it."""
        if shard not in self._fetches and self._has_room(shard, is_needed=False):
            self._start(shard)

    def hold(self, shard: HubShard) -> None:
        """Begin to fetch a shard, unless it is here or on its way, and keep it until it is let go.

        Raises:
            ValueError: with the others that are held it is more than `max_bytes`.
        """
        if shard not in self._fetches:
            if not self._has_room(shard, is_needed=True):
                raise self._too_little_room(shard)
            self._start(shard)
        fetch = self._fetches[shard]
        fetch.holders, fetch.was_held = fetch.holders + 1, True

    def wait_for(self, shard: HubShard) -> tuple[Path, Path]:
        """Return the file of a shard that is held, and the root that paths in it are relative to, once it is here.

        Raises:
            FileNotFoundError, PermissionError, ConnectionError, OSError: see `several_tries`; the shard is named.
        """
        fetch, started = self._fetches[shard], time.monotonic()
        if not fetch.result.done():
            note_activity(f"fetching {shard.name}", extra_seconds=math.inf)  # tries and time-outs end it
        while not fetch.result.done():
            try:
                fetch.result.exception(timeout=SECONDS_BETWEEN_LINES)
            except TimeoutError:
                logger.info(
                    "waiting for %s: %.1f of %.1f MB in %.0f seconds",
                    *(shard.name, fetch.num_bytes_here / 1e6, shard.num_bytes / 1e6, time.monotonic() - started),
                )
        note_activity(f"reading {shard.name}")
        return fetch.result.result()

    def let_go(self, shard: HubShard) -> None:
        """Say that one reader reads nothing of a shard any more; where room is needed it may go then."""
        fetch = self._fetches.pop(shard)
        fetch.holders -= 1
        self._fetches[shard] = fetch  # the one that was let go last goes last

    def _start(self, shard: HubShard) -> None:
        fetch = self._fetches[shard] = _Fetch(shard)
        thread = threading.Thread(target=self._run, args=(fetch,), name=f"fetch {shard.path}", daemon=True)
        self._threads.add(thread)
        thread.start()

    def _has_room(self, shard: HubShard, *, is_needed: bool) -> bool:
        """Delete shards that nobody holds until one more fits: first those that were read, the oldest first, and for a
        shard that is needed also those that are ahead.
        """
        if self.max_bytes is None:
            return True
        idle = [fetch for fetch in self._fetches.values() if not fetch.holders and (is_needed or fetch.was_held)]
        room = self.max_bytes - shard.num_bytes - sum(one.num_bytes for one in self._fetches)
        for fetch in sorted(idle, key=lambda fetch: not fetch.was_held):
            if room >= 0:
                break
            del self._fetches[fetch.shard]
            room += fetch.shard.num_bytes
            if fetch.result.exception() is None:  # waits for one that is on its way
                fetch.result.result()[0].unlink()
        return room >= 0

    def _too_little_room(self, shard: HubShard) -> ValueError:
        assert self.max_bytes is not None
        others = sum(one.num_bytes for one in self._fetches)
        return ValueError(
            f"data.stream.max_disk_gb is {self.max_bytes / 1e9:g}, and the samples that are shuffled together lie in "
            f"{len(self._fetches)} shards of {others / 1e9:.3g} GB, beside which {shard.name} of "
            f"{shard.num_bytes / 1e9:.3g} GB does not fit; raise it, or lower data.stream.shuffle_samples"
        )

    def _run(self, fetch: _Fetch) -> None:
        """Fetch a shard; whoever waits gets the error if there is one."""
        with self._turn:
            try:
                fetch.result.set_result(self._fetched(fetch))
            except BaseException as error:
                fetch.result.set_exception(error)

    def _fetched(self, fetch: _Fetch) -> tuple[Path, Path]:
        shard, stop = fetch.shard, self._stop
        progress = counting(fetch, stop)

        def download() -> Path:
            if stop.is_set():
                raise Stopped
            file = self._download(
                shard.repo,
                shard.path,
                repo_type="dataset",
                revision=shard.commit,
                local_dir=self.folder,
                tqdm_class=progress,
            )
            if (size := os.path.getsize(file)) != shard.num_bytes:
                raise OSError(
                    f"{file} has {size} bytes, and the hub lists {shard.num_bytes}; delete it if it is damaged"
                )
            return Path(file)

        file = several_tries(shard.name, shard.repo, shard.commit, download, stop.wait)
        return file, self.folder or root_of_snapshot(file.parents[shard.path.count("/")], [file])


def _end(
    process: int, stop: threading.Event, threads: "weakref.WeakSet[threading.Thread]", folder: Path | None
) -> None:
    """End what is on its way, and delete what a process has kept for itself; a process that it forked has no part."""
    if os.getpid() != process:
        return
    stop.set()
    deadline = time.monotonic() + SECONDS_TO_STOP
    for thread in list(threads):
        thread.join(max(0.0, deadline - time.monotonic()))
    if folder is not None:
        shutil.rmtree(folder, ignore_errors=True)
