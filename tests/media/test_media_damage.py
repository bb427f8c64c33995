"""Randomly damaged files of every kind end as a result or as one MediaError, never as anything else."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile
from PIL import Image

from mllm.media import ERROR_KINDS, MediaError, load_audio, load_image, load_video

MUTANTS = 30


def damaged(data: bytes, generator: np.random.Generator) -> bytes:
    """Cut, overwrite, zero or repeat a random piece; half of the damage goes to the header."""
    reach = len(data) if generator.random() < 0.5 else min(len(data), 200)
    start = int(generator.integers(0, reach))
    stop = min(len(data), start + int(generator.integers(1, 40)))
    middle = {
        0: b"",
        1: generator.bytes(stop - start),
        2: bytes(stop - start),
        3: data[start:stop] * 3,
        4: b"\xff" * (stop - start),
    }[int(generator.integers(0, 5))]
    return data[:start] + middle + (data[stop:] if generator.random() < 0.8 else b"")


def whole_file(name: str, folder: Path, write_video: Callable[..., Path]) -> Path:
    """Write an audio file of the named kind."""
    noise = np.random.default_rng(1)
    path = folder / name
    if name.endswith((".mp4", ".avi")):
        return write_video(name, 12, codec="libx264" if name.endswith("mp4") else "mpeg4")
    if name.endswith((".wav", ".flac", ".mp3", ".ogg")):
        soundfile.write(path, noise.normal(0, 0.1, 8_000), 16_000)
    else:
        Image.fromarray(noise.integers(0, 256, (24, 24, 3), dtype=np.uint8)).save(path)
    return path


@pytest.mark.parametrize(
    ("name", "load"),
    [
        *[(f"a.{suffix}", load_image) for suffix in ("jpg", "png", "webp", "bmp")],
        *[(f"a.{suffix}", load_audio) for suffix in ("wav", "flac", "mp3", "ogg")],
        *[(f"a.{suffix}", load_video) for suffix in ("mp4", "avi")],
    ],
)
def test_damage_gives_one_error_type(tmp_path: Path, write_video, name: str, load) -> None:
    path = whole_file(name, tmp_path, write_video)
    data, generator = path.read_bytes(), np.random.default_rng(7)
    load(path)
    kinds = []
    for _ in range(MUTANTS):
        path.write_bytes(damaged(data, generator))
        try:
            load(path)
        except MediaError as error:
            kinds.append(error.kind)
    assert kinds
    assert set(kinds) <= set(ERROR_KINDS)
