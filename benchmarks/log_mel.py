"""Times a clip's log-mel features with and without the silence of Whisper's window transformed.

    python benchmarks/log_mel.py [--repeats 15] [--threads 1]

`transformers` is its feature extractor, as the released AVSR code calls it (umbertocappellazzo/Omni-AVSR @7de6be2,
modeling_OmniAVSR.py:528-537), `mllm` is `mllm.transforms.log_mel`. Both are timed in turn, repeat by repeat, so that a
slow moment of the machine hits both; shown are medians and the range of the middle half, of the times and of the ratio
within a repeat. Before anything is timed, both must be equal to the last bit, else the program ends with code 1.
Nothing is
predicted: FLOPs are counted for models, not for what prepares their input.
"""

import sys
from functools import partial

import numpy as np
import torch
from outcomes import append, timed
from rich.console import Console
from rich.table import Table
from transformers import WhisperFeatureExtractor
from turns import in_turns, milliseconds, options, ratio, unprepared

from mllm.transforms.log_mel import whisper_log_mel

SECONDS = (0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 24.0, 30.0)
OUTCOME_SECONDS = 4.0
"""The length whose ratio is handed on: about a sentence."""
RATE_HZ = 16_000


def main() -> int:
    """Compare, time, and print the table."""
    arguments = options(__doc__, 15)
    extractor = WhisperFeatureExtractor()

    def original(samples: np.ndarray) -> np.ndarray:
        return extractor(samples, sampling_rate=RATE_HZ, return_tensors="np")["input_features"][0]

    def ours(samples: np.ndarray) -> np.ndarray:
        return whisper_log_mel(samples, extractor).numpy()

    rng = np.random.default_rng(0)
    clips = {s: (0.1 * rng.standard_normal(round(s * RATE_HZ))).astype(np.float32) for s in SECONDS}
    console = Console(width=100)
    unequal = [seconds for seconds, clip in clips.items() if not np.array_equal(original(clip), ours(clip))]
    if unequal:
        console.print(f"not equal at {unequal} seconds")
        return 1
    table = Table("seconds of audio", "transformers ms", "mllm ms", "times quicker", title="log-mel, equal bit for bit")
    outcomes = []
    for seconds, clip in clips.items():
        runs = {"transformers": partial(original, clip), "mllm": partial(ours, clip)}
        before, after = in_turns(unprepared(runs), arguments.repeats, torch.device("cpu")).values()
        table.add_row(f"{seconds:g}", milliseconds(before), milliseconds(after), ratio(before, after))
        if seconds == OUTCOME_SECONDS:
            what = f"log-mel of {seconds:g} s of audio"
            outcomes.append(timed(what, "transformers' extractor", before, after, check="equal bit for bit"))
    console.print(table)
    append(outcomes, arguments.results)
    return 0


if __name__ == "__main__":
    sys.exit(main())
