"""Times the way from the files of a talking clip to what the encoders take: the released way and ours, in one process.

    python benchmarks/input_pipeline.py [--repeats 9] [--seconds 6] [--threads 1]

The released way is that of Omni-AVSR, Llama-AVSR and auto_avsr: all frames decoded to colour (`read_video` of
torchvision, gone from 0.26, did what `decode_to_colour` does), made float, cropped, made grey and normalised
(Omni-AVSR datamodule/transforms.py:78-128), audio read whole (datamodule/av_dataset.py:40) and turned into a log-mel
window of 30 seconds by transformers' extractor (modeling_OmniAVSR.py:528-537). Ours is `ElasticProcessor`'s: the
brightness plane of the file, cropped before anything is made float, and the mel frames of the audio alone.

Both are timed in turn, repeat by repeat, in CPU seconds; shown are medians and the range of the middle half, of the
times and of the ratio within a repeat. Before anything is timed the mels must be equal to the last bit, and the lips
within rounding of a grey clip, else the program ends with code 1; what they differ by in colour is stated. Nothing is
predicted: FLOPs are counted for models, not for decoding.
"""

import math
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import av
import numpy as np
import soundfile
import torch
from outcomes import append, timed
from PIL import Image
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import WhisperFeatureExtractor
from turns import in_turns, milliseconds, options, ratio, unprepared

from mllm.media import load_audio, load_video, to_gray
from mllm.transforms.encoder_inputs import LIP_MEAN, LIP_STD, LipTransform, WhisperMel

FACE = Path(__file__).parent.parent / "tests" / "fixtures" / "astronaut_face.jpg"
RATE_HZ, FRAMES_PER_SECOND, SIDE, CROP = 16_000, 25, 96, 88
MAX_GRAY_DIFFERENCE = 2
GOAL = 3.5


def write_clip(folder: Path, seconds: float, *, colour: bool) -> Path:
    """Write a face that sways, 96 pixels wide as mouth crops are, and noise beside it; the audio is `.wav` of that
    name."""
    image = np.asarray(Image.open(FACE).convert("RGB").resize((128, 128)))
    if not colour:
        image = np.repeat(to_gray(image)[..., None], 3, axis=-1)
    path = folder / ("colour.mp4" if colour else "gray.mp4")
    with av.open(path, "w") as container:
        stream: Any = container.add_stream("libx264", rate=FRAMES_PER_SECOND)
        stream.width, stream.height, stream.pix_fmt = SIDE, SIDE, "yuv420p"
        for number in range(round(seconds * FRAMES_PER_SECOND)):
            left, top = (round(16 + 10 * wave(number / 9)) for wave in (np.sin, np.cos))
            shown = np.ascontiguousarray(image[top : top + SIDE, left : left + SIDE])
            container.mux(stream.encode(av.VideoFrame.from_ndarray(shown, format="rgb24")))
        container.mux(stream.encode())
    rng = np.random.default_rng(0)
    samples = (0.1 * rng.standard_normal(round(seconds * RATE_HZ))).astype(np.float32)
    soundfile.write(path.with_suffix(".wav"), samples, RATE_HZ, subtype="PCM_16")
    return path


def decode_to_colour(path: Path) -> Tensor:
    """Decode (T, H, W, 3) uint8: every frame converted by itself, then stacked."""
    with av.open(path) as container:
        container.streams.video[0].codec_context.thread_count = 1
        frames = [frame.to_rgb().to_ndarray() for frame in container.decode(video=0)]
    return torch.as_tensor(np.stack(frames))


def released_lips(path: Path) -> Tensor:
    """Make (T, 1, 88, 88): /255, centre crop, Grayscale, Normalize, each over all frames."""
    frames = decode_to_colour(path).permute(0, 3, 1, 2) / 255.0
    edge = (SIDE - CROP) // 2
    frames = frames[..., edge : edge + CROP, edge : edge + CROP]
    red, green, blue = frames.unbind(dim=-3)
    gray = (0.2989 * red + 0.587 * green + 0.114 * blue).unsqueeze(dim=-3)
    return gray.clone().sub_(LIP_MEAN).div_(LIP_STD)


def released_mel(path: Path, extractor: WhisperFeatureExtractor) -> Tensor:
    """Make (80, 3000): the whole audio, and silence up to 30 seconds."""
    samples, rate_hz = soundfile.read(path, dtype="float32")
    return torch.from_numpy(extractor(samples, sampling_rate=rate_hz, return_tensors="np")["input_features"][0])


def our_lips(path: Path) -> Tensor:
    """Read lips as `mllm train` does, without augmentation."""
    return LipTransform(size=None, crop_size=CROP)(load_video(path, gray=True))[0]


def our_mel(path: Path, extractor: WhisperFeatureExtractor) -> Tensor:
    """Read audio as `mllm train` does."""
    return WhisperMel(extractor)(load_audio(path))[0]


def check(gray: Path, colour: Path, extractor: WhisperFeatureExtractor) -> str:
    """Measure what the two ways differ by.

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


def measure(
    colour: Path, extractor: WhisperFeatureExtractor, repeats: int
) -> dict[str, tuple[list[float], list[float]]]:
    """Time every part, and both together, released and ours, in seconds."""
    audio = colour.with_suffix(".wav")
    runs = {
        "released lips": partial(released_lips, colour),
        "our lips": partial(our_lips, colour),
        "released mel": partial(released_mel, audio, extractor),
        "our mel": partial(our_mel, audio, extractor),
    }
    times = in_turns(unprepared(runs), repeats, torch.device("cpu"))
    parts = {part: (times[f"released {part}"], times[f"our {part}"]) for part in ("lips", "mel")}
    before, after = (
        [math.fsum(pair) for pair in zip(*ways, strict=True)] for ways in zip(*parts.values(), strict=True)
    )
    return {**parts, "both": (before, after)}


def main() -> None:
    """Check, time and print."""
    arguments = options(__doc__, 9, seconds=6)
    extractor = WhisperFeatureExtractor()
    with tempfile.TemporaryDirectory() as name:
        gray, colour = (write_clip(Path(name), arguments.seconds, colour=is_colour) for is_colour in (False, True))
        differences = check(gray, colour, extractor)
        times = measure(colour, extractor, arguments.repeats)
    table = Table(f"clip of {arguments.seconds} s", "released ms", "ours ms", "times quicker", title=differences)
    for name, (before, after) in times.items():
        table.add_row(name, milliseconds(before), milliseconds(after), ratio(before, after))
    Console(width=130).print(table)
    equal = f"mel equal bit for bit, lips within {MAX_GRAY_DIFFERENCE} of 255"
    outcome = timed(f"input of a clip of {arguments.seconds} s", "Omni-AVSR's", *times["both"], check=equal, goal=GOAL)
    append([outcome], arguments.results)


if __name__ == "__main__":
    main()
