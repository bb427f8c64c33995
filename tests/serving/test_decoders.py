"""Decoding in processes gives what the loader gives, and nothing a file does to a decoder reaches the server."""

import os
import signal
import threading
import time
from collections.abc import Iterator

import numpy as np
import pytest

from mllm.media import FrameSampling, MediaError, MediaLimits, MediaLoader
from mllm.serving.decoders import Cancelled, DecoderPool, PooledLoader

Files = list[dict[str, bytes]]
MEMORY = 3 * 2**30


@pytest.fixture(scope="module")
def pool() -> Iterator[DecoderPool]:
    decoders = DecoderPool(1, MEMORY)
    yield decoders
    decoders.close()


def values(raw: object) -> np.ndarray:
    return np.asarray(getattr(raw, "samples", getattr(raw, "frames", raw)))


def child_of(pool: DecoderPool) -> int:
    """The process that decodes."""
    (child,) = pool._children
    return child.process.pid


@pytest.mark.parametrize("medium", ["image", "audio", "video"])
def test_what_is_decoded_apart_is_what_is_decoded_here(pool: DecoderPool, files: Files, medium: str) -> None:
    for gray in (True, False):
        here, apart = MediaLoader(gray=gray), PooledLoader(gray=gray, pool=pool)
        one, other = (loader(medium, files[0][medium]) for loader in (here, apart))
        assert type(one) is type(other)
        assert np.array_equal(values(one), values(other))
        for rate in ("sample_rate_hz", "frames_per_second"):
            assert getattr(one, rate, None) == getattr(other, rate, None)


def test_a_few_frames_and_the_header(pool: DecoderPool, files: Files, clip: bytes) -> None:
    loader = PooledLoader(pool=pool)
    sampling = FrameSampling(4)
    assert np.array_equal(loader.frames(clip, sampling).frames, MediaLoader().frames(clip, sampling).frames)
    with pytest.raises(MediaError, match="frames"):
        loader.frames(clip, FrameSampling(4_000))
    streams = {name: loader.probe(content) for name, content in {**files[0], "clip": clip}.items()}
    held = {name: (held_streams["audio"], held_streams["video"]) for name, held_streams in streams.items()}
    assert held == {"image": (False, False), "audio": (True, False), "video": (False, True), "clip": (True, True)}
    assert loader.probe(b"hello")["audio"] is False


def test_a_file_is_refused_for_the_same_reason(pool: DecoderPool, files: Files) -> None:
    limits = MediaLimits(image_pixels=100, audio_seconds=0.1)
    for medium, content in (("image", b"hello"), ("image", files[0]["image"]), ("audio", files[0]["audio"])):
        refusals = []
        for loader in (MediaLoader(limits=limits), PooledLoader(limits=limits, pool=pool)):
            with pytest.raises(MediaError, match=r"\S") as caught:
                loader(medium, content)
            refusals.append((caught.value.kind, caught.value.reason, caught.value.limit))
        assert refusals[0] == refusals[1]


def test_a_decoder_that_ends_is_replaced_and_its_file_refused(pool: DecoderPool, files: Files) -> None:
    loader = PooledLoader(pool=pool)
    before = pool.num_replaced
    for number in (signal.SIGSEGV, signal.SIGKILL):
        pid = child_of(pool)
        os.kill(pid, signal.SIGSTOP)
        threading.Timer(
            0.2, lambda pid=pid, number=number: (os.kill(pid, number), os.kill(pid, signal.SIGCONT))
        ).start()
        with pytest.raises(MediaError, match="the decoder broke down over the file"):
            loader("image", files[0]["image"])
        assert values(loader("image", files[0]["image"])).shape == (40, 60, 3)
        assert child_of(pool) != pid
    assert pool.num_replaced == before + 2


def test_a_decoder_that_stalls_is_ended_at_its_deadline(pool: DecoderPool, files: Files) -> None:
    loader = PooledLoader(pool=pool, limits=MediaLimits(deadline_seconds=0.5))
    loader("image", files[0]["image"])
    os.kill(child_of(pool), signal.SIGSTOP)
    start = time.monotonic()
    with pytest.raises(MediaError, match=r"decoding took longer than 0.5 seconds") as caught:
        loader("image", files[0]["image"])
    assert caught.value.kind == "deadline"
    assert 1 < time.monotonic() - start < 4
    assert PooledLoader(pool=pool)("image", files[0]["image"])


def test_a_decoder_stops_when_nobody_waits(pool: DecoderPool, files: Files) -> None:
    PooledLoader(pool=pool)("image", files[0]["image"])
    os.kill(child_of(pool), signal.SIGSTOP)
    start = time.monotonic()
    loader = PooledLoader(pool=pool).until(lambda: time.monotonic() - start > 0.3)
    with pytest.raises(Cancelled):
        loader("image", files[0]["image"])
    assert time.monotonic() - start < 2
    assert PooledLoader(pool=pool)("image", files[0]["image"])


@pytest.mark.slow
def test_memory_of_a_decoder_is_bounded(files: Files) -> None:
    import io

    import soundfile

    audio = io.BytesIO()
    soundfile.write(audio, np.zeros(600 * 16_000, np.float32), 16_000, format="FLAC")
    small = DecoderPool(1, 450 * 2**20)
    loader = PooledLoader(pool=small, sample_rate_hz=192_000)
    try:
        with pytest.raises(MediaError, match=r"memory|could not read|broke down"):
            loader("audio", audio.getvalue())
        assert PooledLoader(pool=small)("audio", files[0]["audio"])
    finally:
        small.close()
