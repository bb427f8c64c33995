"""What it saves to leave the silence of Whisper's window untransformed: time of a clip's log-mel features, both ways.

    python benchmarks/log_mel.py [--repeats 15] [--threads 1]

`transformers` is its feature extractor, `mllm` is `mllm.log_mel`. Both are timed in turn, repeat by repeat, so that a
slow moment of the machine hits both; shown are medians and the range of the middle half, of the times and of the ratio
within a repeat. Before anything is timed, both must be equal to the last bit, else the program ends with code 1.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from transformers import WhisperFeatureExtractor

sys.path.insert(0, str(Path(__file__).parent.parent))

from mllm.log_mel import whisper_log_mel

SECONDS = (0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 24.0, 30.0)
RATE_HZ = 16_000


def main() -> int:
    """Compare, time, and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    extractor = WhisperFeatureExtractor()

    def original(samples: np.ndarray) -> np.ndarray:
        return extractor(samples, sampling_rate=RATE_HZ, return_tensors="np")["input_features"][0]

    def ours(samples: np.ndarray) -> np.ndarray:
        return whisper_log_mel(samples, extractor).numpy()

    chance = np.random.default_rng(0)
    clips = {s: (0.1 * chance.standard_normal(round(s * RATE_HZ))).astype(np.float32) for s in SECONDS}
    console = Console(width=100)
    unequal = [seconds for seconds, clip in clips.items() if not np.array_equal(original(clip), ours(clip))]
    if unequal:
        console.print(f"not equal at {unequal} seconds")
        return 1
    times = _timed(list(clips.values()), (original, ours), options.repeats)
    table = Table("seconds of sound", "transformers ms", "mllm ms", "times quicker", title="log-mel, equal bit for bit")
    for number, seconds in enumerate(clips):
        before, after = times[0][number], times[1][number]
        ratios = [old / new for old, new in zip(before, after, strict=True)]
        table.add_row(f"{seconds:g}", _spread(before), _spread(after), _spread(ratios))
    console.print(table)
    return 0


def _timed(
    clips: Sequence[np.ndarray], ways: Sequence[Callable[[np.ndarray], np.ndarray]], repeats: int
) -> list[list[list[float]]]:
    """Milliseconds by way, clip and repeat."""
    times: list[list[list[float]]] = [[[] for _ in clips] for _ in ways]
    for _ in range(repeats):
        for number, clip in enumerate(clips):
            for own, way in zip(times, ways, strict=True):
                start = time.perf_counter()
                way(clip)
                own[number].append(1_000 * (time.perf_counter() - start))
    return times


def _spread(values: Sequence[float]) -> str:
    low, middle, high = statistics.quantiles(values, n=4)
    return f"{middle:.2f} ({low:.2f}..{high:.2f})"


if __name__ == "__main__":
    sys.exit(main())
