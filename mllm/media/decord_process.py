"""Runs decord in a process of its own: on some damaged files it does not raise, it ends the process that called it.

The child is started once per process and kept; where a file ends it, that file is refused, and the next gets another.

    to the child:    length of the file (8 bytes), the file
    from the child:  a line of JSON, {"frames": T, "height": H, "width": W, "channels": C} or {"error": text}; frames

Knows decord and pipes. Does not know which frames are wanted.
"""

import io
import json
import os
import select
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from mllm.media.errors import MediaError

CHUNK_FRAMES, CHUNK_BYTES = 32, 64 * 2**20
"""Frames that decord decodes in one call at most, and their bytes; it holds them all before it hands out one."""
_LENGTH_BYTES = 8
_child: tuple[int, subprocess.Popen[bytes]] | None = None


def decord_frames(name: str, file: BinaryIO, num_frames: int, seconds: float) -> Iterator[np.ndarray]:
    """Yield every frame (H, W, 3) of a video, upright.

    Args:
        num_frames: how many the file's timestamps make.
        seconds: longest time until the last frame.

    Raises:
        MediaError: unsupported (decord counts other frames, or hands out padding as pixels), corrupt, or deadline.
    """
    global _child
    child, end = _running(), time.monotonic() + seconds
    is_whole = False
    try:
        head = _request(name, child, file.read(), end)
        if "error" in head:
            is_whole = True  # it waits for the next file
            raise MediaError("corrupt", name, "the decoder could not read the file")
        _check(name, head, num_frames)
        shape = (head["height"], head["width"], head["channels"])
        for _ in range(num_frames):
            yield np.frombuffer(_read(name, child, int(np.prod(shape)), end), np.uint8).reshape(shape)
        is_whole = True
    finally:
        if not is_whole:  # what it still sends would be taken for the next file's
            child.kill()
            child.wait()
            _child = None


def _check(name: str, head: dict[str, int], num_frames: int) -> None:
    if head["frames"] != num_frames:
        raise MediaError("unsupported", name, "decord counts the frames of this file differently: use pyav")
    if head["channels"] != 3:
        # decord 0.6 hands out the padding of narrow rows as pixels (16, 24, 48 and 72 wide).
        raise MediaError("unsupported", name, "decord cannot read frames of this width: use pyav")


def _running() -> subprocess.Popen[bytes]:
    """Return the child of this process; one that was started before a fork belongs to another."""
    global _child
    if _child is None or _child[0] != os.getpid() or _child[1].poll() is not None:
        words = [sys.executable, "-m", __name__]
        paths = [
            str(Path(__file__).parents[2]),
            os.environ.get("PYTHONPATH", ""),
        ]  # this very package, wherever it lies
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
        pipe = subprocess.PIPE
        # In a session of its own: Ctrl-C lets a training finish its step, and that step may need the child.
        child = subprocess.Popen(
            words,
            env=environment,
            stdin=pipe,
            stdout=pipe,
            stderr=subprocess.DEVNULL,
            bufsize=0,
            start_new_session=True,
        )
        _child = (os.getpid(), child)
    return _child[1]


def _request(name: str, child: subprocess.Popen[bytes], content: bytes, end: float) -> dict[str, Any]:
    assert child.stdin is not None
    try:
        child.stdin.write(len(content).to_bytes(_LENGTH_BYTES, "big"))
        view = memoryview(content)
        while view:
            view = view[child.stdin.write(view) :]
    except BrokenPipeError as error:
        raise _ended(name) from error
    line = bytearray()
    while not line.endswith(b"\n"):
        line += _read(name, child, 1, end)
    return json.loads(line)


def _read(name: str, child: subprocess.Popen[bytes], count: int, end: float) -> bytes:
    """Read so many bytes of the child."""
    assert child.stdout is not None
    parts, left = [], count
    while left:
        if not select.select([child.stdout], [], [], max(end - time.monotonic(), 0))[0]:
            raise MediaError("deadline", name, "decord did not answer in time (limits.deadline_seconds)")
        part = os.read(child.stdout.fileno(), left)
        if not part:
            raise _ended(name)
        parts.append(part)
        left -= len(part)
    return b"".join(parts)


def _ended(name: str) -> MediaError:
    return MediaError("corrupt", name, "decord broke down over the file: use pyav")


def serve(source: BinaryIO, target: BinaryIO) -> None:
    """Answer files until there are no more."""
    import decord

    while len(head := source.read(_LENGTH_BYTES)) == _LENGTH_BYTES:
        content = source.read(int.from_bytes(head, "big"))
        try:
            reader = decord.VideoReader(io.BytesIO(content), num_threads=1)
            count, (height, width, channels) = len(reader), reader[0].shape
        except Exception as error:
            target.write(json.dumps({"error": type(error).__name__}).encode() + b"\n")
            target.flush()
            continue
        facts = {"frames": count, "height": height, "width": width, "channels": channels}
        target.write(json.dumps(facts).encode() + b"\n")
        chunk = max(1, min(CHUNK_FRAMES, CHUNK_BYTES // (height * width * channels)))
        for start in range(0, count, chunk):
            target.write(reader.get_batch(range(start, min(start + chunk, count))).asnumpy().tobytes())
        target.flush()


if __name__ == "__main__":
    serve(sys.stdin.buffer, sys.stdout.buffer)
