"""From the files of a talking clip to what the encoders take: time of the released way and of ours, in one process.

    python benchmarks/input_pipeline.py [--repeats 9] [--seconds 6] [--threads 1]

The released way is that of Omni-AVSR, Llama-AVSR and auto_avsr: all frames decoded to colour (`read_video` of
torchvision, gone from 0.26, did what `decode_to_colour` does), made float, cropped, made grey and normalised
(Omni-AVSR datamodule/transforms.py:78-128), sound read whole (datamodule/av_dataset.py:40) and turned into a log-mel
window of 30 seconds by transformers' extractor (modeling_OmniAVSR.py:528-537). Ours is `ElasticProcessor`'s: the
brightness plane of the file, cropped before anything is made float, and the mel frames of the sound alone.

Both are timed in turn, repeat by repeat, in CPU seconds; shown are medians and the range of the middle half, of the
times and of the ratio within a repeat. Before anything is timed the mels must be equal to the last bit, and the lips
within rounding of a grey clip, else the program ends with code 1; what they differ by in colour is stated.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import av
import numpy as np
import soundfile
import torch
from PIL import Image
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import WhisperFeatureExtractor

sys.path.insert(0, str(Path(__file__).parent.parent))

from mllm.media import load_audio, load_video, to_gray
from mllm.transforms import LIP_MEAN, LIP_STD, LipTransform, WhisperMel

FACE = Path(__file__).parent.parent / "tests" / "fixtures" / "astronaut_face.jpg"
RATE_HZ, FRAMES_PER_SECOND, SIDE, CROP = 16_000, 25, 96, 88
MAX_GRAY_DIFFERENCE = 2
GOAL = 3.5


def write_clip(folder: Path, seconds: float, *, colour: bool) -> Path:
    """A face that sways, 96 pixels wide as mouth crops are, and noise beside it; the sound is `.wav` of that name."""
    picture = np.asarray(Image.open(FACE).convert("RGB").resize((128, 128)))
    if not colour:
        picture = np.repeat(to_gray(picture)[..., None], 3, axis=-1)
    path = folder / ("colour.mp4" if colour else "gray.mp4")
    with av.open(path, "w") as container:
        stream: Any = container.add_stream("libx264", rate=FRAMES_PER_SECOND)
        stream.width, stream.height, stream.pix_fmt = SIDE, SIDE, "yuv420p"
        for number in range(round(seconds * FRAMES_PER_SECOND)):
            left, top = (round(16 + 10 * wave(number / 9)) for wave in (np.sin, np.cos))
            shown = np.ascontiguousarray(picture[top : top + SIDE, left : left + SIDE])
            container.mux(stream.encode(av.VideoFrame.from_ndarray(shown, format="rgb24")))
        container.mux(stream.encode())
    chance = np.random.default_rng(0)
    samples = (0.1 * chance.standard_normal(round(seconds * RATE_HZ))).astype(np.float32)
    soundfile.write(path.with_suffix(".wav"), samples, RATE_HZ, subtype="PCM_16")
    return path


def decode_to_colour(path: Path) -> Tensor:
    """(T, H, W, 3) uint8: every frame converted by itself, then stacked."""
    with av.open(path) as container:
        container.streams.video[0].codec_context.thread_count = 1
        frames = [frame.to_rgb().to_ndarray() for frame in container.decode(video=0)]
    return torch.as_tensor(np.stack(frames))


def released_lips(path: Path) -> Tensor:
    """(T, 1, 88, 88): /255, centre crop, Grayscale, Normalize, each over all frames."""
    frames = decode_to_colour(path).permute(0, 3, 1, 2) / 255.0
    edge = (SIDE - CROP) // 2
    frames = frames[..., edge : edge + CROP, edge : edge + CROP]
    red, green, blue = frames.unbind(dim=-3)
    gray = (0.2989 * red + 0.587 * green + 0.114 * blue).unsqueeze(dim=-3)
    return gray.clone().sub_(LIP_MEAN).div_(LIP_STD)


def released_mel(path: Path, extractor: WhisperFeatureExtractor) -> Tensor:
    """(80, 3000): the whole sound, and silence up to 30 seconds."""
    samples, rate_hz = soundfile.read(path, dtype="float32")
    return torch.from_numpy(extractor(samples, sampling_rate=rate_hz, return_tensors="np")["input_features"][0])


def our_lips(path: Path) -> Tensor:
    """As `mllm train` reads them, without augmentation."""
    return LipTransform(size=None, crop_size=CROP)(load_video(path, gray=True))[0]


def our_mel(path: Path, extractor: WhisperFeatureExtractor) -> Tensor:
    """As `mllm train` reads it."""
    return WhisperMel(extractor)(load_audio(path))[0]


def check(gray: Path, colour: Path, extractor: WhisperFeatureExtractor) -> str:
    """What the two ways differ by.

    Raises:
        SystemExit: mels that differ, or lips of a grey clip by more than rounding.
    """
    if not torch.equal(released_mel(gray.with_suffix(".wav"), extractor), our_mel(gray.with_suffix(".wav"), extractor)):
        raise SystemExit("FAILED: the mels differ")
    words = []
    for path in (gray, colour):
        apart = (released_lips(path) - our_lips(path)).abs() * LIP_STD * 255
        words.append(f"{path.stem} clip: at most {apart.max():.1f}, on average {apart.mean():.2f}")
        if path is gray and apart.max() > MAX_GRAY_DIFFERENCE:
            raise SystemExit(f"FAILED: lips differ; {words[0]} of 255")
    return f"mel equal bit for bit; lips of 255, {'; '.join(words)}"


def timed(
    ways: dict[str, tuple[Callable[[], object], Callable[[], object]]], repeats: int
) -> dict[str, tuple[list[float], list[float]]]:
    """Milliseconds of CPU time of every part, released and ours in turn, after one round that does not count."""
    times: dict[str, tuple[list[float], list[float]]] = {name: ([], []) for name in ways}
    for repeat in range(repeats + 1):
        for name, both in ways.items():
            for own, way in zip(times[name], both, strict=True):
                started = time.process_time()
                way()
                if repeat:
                    own.append(1_000 * (time.process_time() - started))
    return times


def spread(values: Sequence[float]) -> str:
    """Median and middle half."""
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return f"{middle:.2f} ({low:.2f}..{high:.2f})"


def main(arguments: Sequence[str] | None = None) -> int:
    """Check, time, print; code 1 where the goal is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--seconds", type=float, default=6.0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", help="also write the figures into this file")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    extractor = WhisperFeatureExtractor()
    with tempfile.TemporaryDirectory() as name:
        gray, colour = (write_clip(Path(name), options.seconds, colour=own) for own in (False, True))
        differences = check(gray, colour, extractor)
        sound = colour.with_suffix(".wav")
        times = timed(
            {
                "lips": (lambda: released_lips(colour), lambda: our_lips(colour)),
                "mel": (lambda: released_mel(sound, extractor), lambda: our_mel(sound, extractor)),
            },
            options.repeats,
        )
    sums = [[sum(own) for own in zip(*(both[way] for both in times.values()), strict=True)] for way in (0, 1)]
    times["both"] = (sums[0], sums[1])
    table = Table("clip of " + f"{options.seconds:g} s", "released ms", "ours ms", "times quicker", title=differences)
    ratios = {name: [old / new for old, new in zip(*both, strict=True)] for name, both in times.items()}
    for name, (before, after) in times.items():
        table.add_row(name, spread(before), spread(after), spread(ratios[name]))
    Console(width=130).print(table)
    if options.json:
        facts = {name: {"released_ms": both[0], "ours_ms": both[1]} for name, both in times.items()}
        Path(options.json).write_text(json.dumps({"differences": differences, **facts}, indent=1), encoding="utf-8")
    return 0 if statistics.median(ratios["both"]) >= GOAL else 1


if __name__ == "__main__":
    sys.exit(main())
