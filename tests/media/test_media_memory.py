"""What a file takes while it is decoded is bounded, not only what comes of it."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
from PIL import Image

# Decodes files one after the other, each in a fork of its own, and says how much more memory each took at its peak.
PEAKS = """
import json, os, resource, sys
from mllm.media import load_audio, load_image
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for name in sys.argv[1:]:
    if os.fork() == 0:
        load = load_audio if name.endswith("flac") else load_image
        load(name)
        most = peak()
        os.write(1, (json.dumps([os.path.basename(name), most]) + "\\n").encode())
        os._exit(0)
    os.wait()
"""
MIB = 1024
"""In the unit of `ru_maxrss`, KiB."""


@pytest.mark.slow
def test_the_largest_files_that_are_read_take_a_bounded_multiple_of_what_they_hold(tmp_path: Path) -> None:
    """Pillow keeps 4 bytes per pixel, so one image of 36 million pixels is 137 MiB; 3 bytes of each are 103 MiB."""
    rows = np.zeros((6_000, 6_000), np.uint8)
    Image.fromarray(rows).convert("RGB").save(tmp_path / "plain.png", compress_level=1)
    Image.merge("RGBA", [Image.fromarray(rows)] * 4).save(tmp_path / "alpha.png", compress_level=1)
    Image.fromarray(rows.astype(np.uint16)).save(tmp_path / "deep.png", compress_level=1)
    Image.fromarray(rows[:9, :9]).save(tmp_path / "small.png")
    soundfile.write(tmp_path / "long.flac", np.zeros((170 * 192_000, 1), np.int16), 192_000)
    soundfile.write(tmp_path / "short.flac", np.zeros((192_000, 8), np.int16), 192_000)
    names = ["small.png", "short.flac", "plain.png", "alpha.png", "deep.png", "long.flac"]
    said = subprocess.run(
        [sys.executable, "-c", PEAKS, *(str(tmp_path / name) for name in names)],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    peaks = dict(json.loads(line) for line in said.splitlines())
    assert peaks["plain.png"] - peaks["small.png"] < 200 * MIB  # 303 with the copy that `convert` makes
    assert peaks["alpha.png"] - peaks["small.png"] < 256 * MIB  # 492 with whole layers, 280 with two images
    assert peaks["deep.png"] - peaks["small.png"] < 256 * MIB  # 480 with all of it in 32 bits
    assert peaks["long.flac"] - peaks["short.flac"] < 230 * MIB  # 263 with blocks that are joined
