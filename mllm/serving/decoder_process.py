"""Decodes media in a process of its own: a file that ends or stalls a decoder does not reach the server.

    to the child:    a head, {"do": "decode", "size": N, "medium": ..., "loader": ..., "sampling": ...}; N bytes
    from the child:  a head, {"kind": "image" | "audio" | "video", "rate": r, "shape": [...], "size": N} or
                     {"error": kind, "reason": text, "limit": name}; N bytes

A head is JSON behind its own length in four bytes.

Nothing is pickled on the way. `probe` in place of `decode` only reads the header, and answers {"audio", "video"}.

Knows the loaders and pipes. Does not know requests; the parent's side is `serving/decoders.py`.
"""

import json
import resource
import sys
from typing import Any, BinaryIO, Literal

import numpy as np
from PIL import Image

from mllm.media import Audio, FrameSampling, MediaError, MediaLimits, MediaLoader, Video
from mllm.media.audio import AUDIO_CODECS
from mllm.media.containers import open_stream
from mllm.media.limits import open_media, sniff
from mllm.media.video import VIDEO_CODECS

SIZE_BYTES = 4
"""Of the length before a head."""
DTYPES = {"image": np.uint8, "audio": np.float32, "video": np.uint8}


def pack_head(values: dict[str, Any]) -> bytes:
    """Write a head as it goes through a pipe."""
    text = json.dumps(values).encode()
    return len(text).to_bytes(SIZE_BYTES, "big") + text


def serve(source: BinaryIO, target: BinaryIO) -> None:
    """Answer files until there are no more."""
    while size := source.read(SIZE_BYTES):
        order = json.loads(source.read(int.from_bytes(size, "big")))
        content = source.read(order["size"])
        try:
            head, values = probe(content) if order["do"] == "probe" else decode(order, content)
        except MediaError as error:
            head, values = {"error": error.kind, "reason": error.reason, "limit": error.limit}, b""
        except ValueError as error:  # a video with fewer frames than are to be taken
            head, values = {"error": "unsupported", "reason": str(error), "limit": None}, b""
        except MemoryError:
            head, values = {"error": "limit", "reason": "decoding takes too much memory", "limit": None}, b""
        target.write(pack_head({**head, "size": len(values)}))
        target.write(values)
        target.flush()


def decode(order: dict[str, Any], content: bytes) -> tuple[dict[str, Any], bytes | memoryview]:
    """Read one file as the loader does, as a head and bytes."""
    settings = order["loader"]
    loader = MediaLoader(**{**settings, "limits": MediaLimits(**settings["limits"])})
    sampling = order["sampling"]
    raw = (
        loader(order["medium"], content)
        if sampling is None
        else loader.frames(content, FrameSampling(sampling["count"], sampling["per_second"]))
    )
    if isinstance(raw, Image.Image):
        values, rate = np.asarray(raw), 0.0
    elif isinstance(raw, Audio):
        values, rate = raw.samples, float(raw.sample_rate_hz)
    else:
        assert isinstance(raw, Video)
        values, rate = raw.frames, raw.frames_per_second
    kind = "image" if isinstance(raw, Image.Image) else "audio" if isinstance(raw, Audio) else "video"
    values = np.ascontiguousarray(values, DTYPES[kind])
    return {"kind": kind, "rate": rate, "shape": values.shape}, values.reshape(-1).view(np.uint8).data


def probe(content: bytes) -> tuple[dict[str, Any], bytes]:
    """Tell which streams a file holds that can be read, by its header."""
    with open_media(content, sys.maxsize) as file:
        kind = sniff(file)
        if kind is None or kind[0] != "video":
            return {"audio": kind is not None and kind[0] == "audio", "video": False}, b""
        streams = {}
        kinds: tuple[tuple[Literal["audio", "video"], Any], ...] = (("audio", AUDIO_CODECS), ("video", VIDEO_CODECS))
        for kind, codecs in kinds:
            try:
                with open_stream("the file", file, kind, codecs):
                    streams[kind] = True
            except MediaError:
                streams[kind] = False
            file.seek(0)
    return streams, b""


def main(memory_bytes: int) -> None:
    """Limit this process, load what decodes, and serve."""
    import av  # noqa: F401 (the first file shall not wait for it)
    import scipy.signal  # noqa: F401
    import soundfile  # noqa: F401

    resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    sys.stdout.buffer.write(pack_head({}))
    sys.stdout.buffer.flush()
    serve(sys.stdin.buffer, sys.stdout.buffer)


if __name__ == "__main__":
    main(int(sys.argv[1]))
