"""Runs processes that decode for the server, each with a limit on its memory and a deadline for every file.

Knows pipes, processes and the loader's interface. Does not know requests or models; the child's side is
`serving/decoder_process.py`.
"""

import contextlib
import fcntl
import json
import os
import queue
import select
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from mllm.media import Audio, FrameSampling, MediaError, MediaLimits, MediaLoader, Video
from mllm.media.limits import MediaFile
from mllm.media.loader import Raw
from mllm.serving.decoder_process import SIZE_BYTES, pack_head

CHILD = "mllm.serving.decoder_process"
START_SECONDS = 60.0
GRACE_SECONDS = 1.0
"""What a file may take beyond its deadline, which the child looks at between blocks only."""
POLL_SECONDS = 0.1
FILES_PER_CHILD = 2_000
_PIPE_BYTES = 1 << 20


class Cancelled(Exception):
    """Says that nobody waits for the file any more."""


class _Broken(Exception):
    """Says that a child ended, was ended, or did not answer in time."""

    def __init__(self, in_time: bool) -> None:
        super().__init__()
        self.in_time = in_time


class _Child:
    """Holds one process that decodes."""

    def __init__(self, memory_bytes: int) -> None:
        package = str(Path(__file__).parents[2])  # this very package, wherever it lies
        path = os.pathsep.join(filter(None, [package, os.environ.get("PYTHONPATH", "")]))
        threads = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
        self.process = subprocess.Popen(
            [sys.executable, "-m", CHILD, str(memory_bytes)],
            env={**os.environ, **threads, "PYTHONPATH": path},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            bufsize=0,
            start_new_session=True,  # Ctrl-C lets the server finish what it does
        )
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self._source, self._target = self.process.stdout.fileno(), self.process.stdin.fileno()
        os.set_blocking(self._target, False)
        for pipe in (self._source, self._target):
            _widen(pipe)
        self._is_ready = False
        self.num_files = 0

    def decode(
        self, head: dict[str, Any], content: bytes, seconds: float, is_cancelled: Callable[[], bool]
    ) -> tuple[dict[str, Any], bytearray]:
        """Send one file and wait for the answer: a head and bytes.

        Raises:
            Cancelled: nobody waits any more; the child must not be used again.
            _Broken: the same, because it ended or took too long.
        """
        if not self._is_ready:
            self._read_head(time.monotonic() + START_SECONDS, is_cancelled)
            self._is_ready = True
        self.num_files += 1
        end = time.monotonic() + seconds
        self._write(pack_head({**head, "size": len(content)}), end, is_cancelled)
        self._write(content, end, is_cancelled)
        answer = self._read_head(end, is_cancelled)
        return answer, self._read(answer["size"], end, is_cancelled)

    def stop(self) -> None:
        """End the process."""
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()

    def _wait(self, end: float, is_cancelled: Callable[[], bool], *, to_write: bool) -> None:
        while True:
            left = end - time.monotonic()
            if is_cancelled():
                raise Cancelled
            if left <= 0:
                raise _Broken(in_time=False)
            pipe = [self._target if to_write else self._source]
            ready = select.select([] if to_write else pipe, pipe if to_write else [], [], min(left, POLL_SECONDS))
            if ready[0] or ready[1]:
                return

    def _write(self, content: bytes, end: float, is_cancelled: Callable[[], bool]) -> None:
        view = memoryview(content)
        while view:
            self._wait(end, is_cancelled, to_write=True)
            try:
                view = view[os.write(self._target, view[:_PIPE_BYTES]) :]
            except BlockingIOError:
                continue
            except OSError as error:
                raise _Broken(in_time=True) from error

    def _read(self, size: int, end: float, is_cancelled: Callable[[], bool]) -> bytearray:
        parts = bytearray(size)
        view = memoryview(parts)
        while view:
            self._wait(end, is_cancelled, to_write=False)
            count = os.readv(self._source, [view[:_PIPE_BYTES]])
            if count == 0:
                raise _Broken(in_time=True)
            view = view[count:]
        return parts

    def _read_head(self, end: float, is_cancelled: Callable[[], bool]) -> dict[str, Any]:
        size = int.from_bytes(self._read(SIZE_BYTES, end, is_cancelled), "big")
        return json.loads(self._read(size, end, is_cancelled))


def _widen(pipe: int) -> None:
    """Let a pipe hold what a file decodes to, as far as the system allows, so that it is handed over in few pieces."""
    with contextlib.suppress(OSError):
        fcntl.fcntl(pipe, fcntl.F_SETPIPE_SZ, _PIPE_BYTES)


class DecoderPool:
    """Shares some processes that decode.

    Args:
        size: how many.
        memory_bytes: address space of each.
    """

    def __init__(self, size: int, memory_bytes: int) -> None:
        self._memory_bytes = memory_bytes
        self._idle: queue.LifoQueue[_Child] = queue.LifoQueue()
        self._lock = threading.Lock()
        self._children: set[_Child] = set()
        self._is_closed = False
        self.num_replaced = 0
        for _ in range(size):
            self._add()

    def run(
        self,
        head: dict[str, Any],
        content: bytes,
        *,
        seconds: float,
        is_cancelled: Callable[[], bool] = lambda: False,
    ) -> tuple[dict[str, Any], bytearray]:
        """Let a child answer about one file.

        Args:
            seconds: longest time the file may take once a child has it.

        Raises:
            Cancelled: nobody waits any more.
            MediaError: what the child found wrong; corrupt, the file ended it; deadline, it took too long.
        """
        child = self._take(is_cancelled)
        is_whole = False
        try:
            answer, values = child.decode(head, content, seconds + GRACE_SECONDS, is_cancelled)
            is_whole = child.num_files < FILES_PER_CHILD
        except _Broken as error:
            name = f"<{len(content):,} bytes>"
            if error.in_time:
                raise MediaError("corrupt", name, "the decoder broke down over the file") from None
            raise MediaError(
                "deadline", name, f"decoding took longer than {seconds:g} seconds (limits.deadline_seconds)"
            ) from None
        finally:
            if is_whole:
                self._idle.put(child)
            else:
                self._replace(child)
        if "error" in answer:
            raise MediaError(answer["error"], f"<{len(content):,} bytes>", answer["reason"], limit=answer.get("limit"))
        return answer, values

    def close(self) -> None:
        """End all processes."""
        with self._lock:
            self._is_closed = True
            children, self._children = self._children, set()
        for child in children:
            child.stop()

    def _take(self, is_cancelled: Callable[[], bool]) -> _Child:
        while True:
            if is_cancelled() or self._is_closed:
                raise Cancelled
            with contextlib.suppress(queue.Empty):
                return self._idle.get(timeout=POLL_SECONDS)

    def _add(self) -> None:
        child = _Child(self._memory_bytes)
        with self._lock:
            is_closed = self._is_closed
            self._children |= set() if is_closed else {child}
        if is_closed:
            child.stop()
        else:
            self._idle.put(child)

    def _replace(self, child: _Child) -> None:
        with self._lock:
            self._children.discard(child)
            self.num_replaced += 1
        child.stop()
        self._add()


@dataclass(frozen=True, kw_only=True, slots=True)
class PooledLoader(MediaLoader):
    """Loads media through a pool of decoders; what comes is what `MediaLoader` gives."""

    pool: DecoderPool
    """The pool that decodes."""
    is_cancelled: Callable[[], bool] = field(default=lambda: False)
    """Tells whether nobody waits any more."""

    def __call__(self, medium: str, path: MediaFile) -> Raw:
        """Read one file, which is given by what it holds.

        Raises:
            MediaError: the file cannot be used.
            Cancelled: nobody waits any more.
        """
        return self._decode(medium, path, None)

    def frames(self, path: MediaFile, sampling: FrameSampling) -> Video:
        """Read a few frames of a video, in colour.

        Raises:
            MediaError: the file cannot be used, or it has fewer frames than are to be taken.
            Cancelled: nobody waits any more.
        """
        video = self._decode("video", path, sampling)
        assert isinstance(video, Video)
        return video

    def until(self, is_cancelled: Callable[[], bool]) -> "PooledLoader":
        """Return the same loader, for one request."""
        return replace(self, is_cancelled=is_cancelled)

    def probe(self, content: bytes) -> dict[str, Any]:
        """Tell whether a file holds `audio` and `video` that can be read.

        Raises:
            MediaError: it cannot be opened.
        """
        head = {"do": "probe"}
        return self.pool.run(head, content, seconds=self.limits.deadline_seconds, is_cancelled=self.is_cancelled)[0]

    def _decode(self, medium: str, content: MediaFile, sampling: FrameSampling | None) -> Raw:
        assert isinstance(content, bytes)  # paths stay with the server
        head = {
            "do": "decode",
            "medium": medium,
            "loader": _settings(self.sample_rate_hz, self.frames_per_second, self.gray, self.backend, self.limits),
            "sampling": None if sampling is None else asdict(sampling),
        }
        answer, values = self.pool.run(
            head, content, seconds=self.limits.deadline_seconds, is_cancelled=self.is_cancelled
        )
        if answer["kind"] == "image":
            return Image.fromarray(np.frombuffer(values, np.uint8).reshape(answer["shape"]))
        if answer["kind"] == "audio":
            return Audio(np.frombuffer(values, np.float32), int(answer["rate"]))
        return Video(np.frombuffer(values, np.uint8).reshape(answer["shape"]), answer["rate"])


@lru_cache(maxsize=16)
def _settings(
    sample_rate_hz: int | None, frames_per_second: float | None, gray: bool, backend: str, limits: MediaLimits
) -> dict[str, Any]:
    """Return the settings of a loader as JSON has them; the same for every file, and slow to take apart."""
    return {
        "sample_rate_hz": sample_rate_hz,
        "frames_per_second": frames_per_second,
        "gray": gray,
        "backend": backend,
        "limits": asdict(limits),
    }
