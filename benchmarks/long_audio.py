"""Times audio of other lengths than Whisper's window: recordings in windows beside their sum, clips without padding.

    python benchmarks/long_audio.py [--repeats 5] [--threads 1] [--recordings 30 60 120] [--new-tokens 25]
        [--device cpu]

The model is that of `beam_decoding.py` with random weights. First recordings of so many seconds are answered as
`--long_audio chunk` does, from the decoded samples on: windows that overlap, their transcripts joined. Against it
stands the sum of what the same windows cost when each is a request of its own; what is said must be the same.
Then an encoder as wide as Whisper-medium (6 layers, 1024 wide) hears a clip of 6 seconds at its own length
and in a window of 30, as every released system does; at its own length it must give what transformers' encoder gives
with so many positions. Both of a pair are run in turns; times are CPU time, or wall time on a GPU.
"""

import argparse
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from beam_decoding import build_model
from outcomes import Outcome, append, in_float32, timed
from rich.console import Console
from rich.table import Table
from transformers import WhisperConfig
from transformers.models.whisper.modeling_whisper import WhisperEncoder
from turns import in_turns, options, ratio, spread, unprepared

from mllm.config.long_audio import LongAudio
from mllm.config.medium import AudioEncoderConfig
from mllm.encoders import wrap_encoder
from mllm.evaluation.flops import Item, encoder_flops
from mllm.inference.answerer import Answerer, Decoding
from mllm.inference.long_audio import lengths_of
from mllm.inference.windows import join_transcripts, window_times
from mllm.media import Audio

RATE_HZ = 16_000
CLIP_SECONDS = 6
BUDGET = "audio=/8"
QUESTION = "transcribe"
MOST_OF_SUM = 1.1
"""The goal of recordings, as a share of the sum of their windows."""
LEAST_UNPADDED = 3.0


def recording(seconds: int) -> Audio:
    """Make noise that swells and ebbs."""
    rng = np.random.default_rng(seconds)
    samples = rng.standard_normal(seconds * RATE_HZ) * (0.1 + 0.09 * np.sin(np.arange(seconds * RATE_HZ) / RATE_HZ))
    return Audio(samples.astype(np.float32), RATE_HZ)


def recordings(arguments: argparse.Namespace, device: torch.device, table: Table) -> list[Outcome]:
    """Compare recordings with their windows.

    Raises:
        SystemExit: what is said of a recording is not what is said of its windows.
    """
    model, processor = build_model(device, getattr(torch, arguments.dtype), rates=(8,))
    decoding = Decoding(max_new_tokens=arguments.new_tokens)
    chunks = LongAudio(mode="chunk")
    answerer = Answerer(model, processor, decoding, long_audio=chunks)
    outcomes = []
    for seconds in arguments.recordings:
        whole = recording(seconds)
        spans = window_times(seconds, *lengths_of(chunks, processor))
        parts = [Audio(whole.samples[round(a * RATE_HZ) : round(b * RATE_HZ)], RATE_HZ) for a, b in spans]

        def one_by_one(parts: list[Audio] = parts) -> list[str]:
            return [answerer(QUESTION, audio=part, budget=BUDGET).text for part in parts]

        def in_windows(whole: Audio = whole) -> str:
            return answerer(QUESTION, audio=whole, budget=BUDGET).text

        overlap = max((before[1] - after[0] for before, after in pairwise(spans)), default=0.0)
        if arguments.dtype == "float32" and in_windows() != join_transcripts(one_by_one(), overlap):
            raise SystemExit(f"FAILED: {seconds} seconds are answered otherwise than their windows")
        times = in_turns(unprepared({"sum": one_by_one, "whole": in_windows}), arguments.repeats, device)
        table.add_row(
            f"{seconds} s in {len(parts)} windows", *map(spread, times.values()), ratio(times["whole"], times["sum"])
        )
        outcomes.append(_share_of_sum(seconds, times, in_float32("texts equal", arguments.dtype)))
    return outcomes


def _share_of_sum(seconds: int, times: dict[str, list[float]], check: str) -> Outcome:
    shares = timed("", "", times["whole"], times["sum"], check=check)
    what, against = f"{seconds} s of audio in windows, share of their sum", "each window a request"
    return Outcome(what, against, shares.ratio, check, shares.low, shares.high, goal=MOST_OF_SUM, at_most=True)


@torch.no_grad()
def unpadded(arguments: argparse.Namespace, device: torch.device, table: Table) -> Outcome:
    """Compare a clip at its own length with its window.

    Raises:
        SystemExit: the features are not those of transformers' encoder with as many positions.
    """
    config = WhisperConfig(d_model=1024, encoder_layers=6, encoder_attention_heads=16, encoder_ffn_dim=4096)
    dtype = getattr(torch, arguments.dtype)
    torch.manual_seed(0)
    backbone: Any = WhisperEncoder(config)
    backbone.to(device=device, dtype=dtype).eval()
    clip = AudioEncoderConfig(source="random", padding="none", untrained_padding=True)
    window = AudioEncoderConfig(source="random")
    short, long = wrap_encoder(backbone, clip).eval(), wrap_encoder(backbone, window).eval()
    mel = torch.randn(1, 2 * config.max_source_positions, config.num_mel_bins, device=device, dtype=dtype)
    length = torch.tensor([CLIP_SECONDS * RATE_HZ], device=device)
    frames = int(length) // 320
    runs: dict[str, Any] = {
        "window": partial(long, mel.transpose(1, 2).contiguous(), length),
        "clip": partial(short, mel[:, : 2 * frames], length),
    }
    if arguments.dtype == "float32":
        _check_library(backbone, mel[:, : 2 * frames], runs["clip"]()[0])
    times = in_turns(unprepared(runs), arguments.repeats, device)
    table.add_row(f"encoder on {CLIP_SECONDS} s", *map(spread, times.values()), ratio(times["window"], times["clip"]))
    item = Item("audio", frames, 0)
    return timed(
        f"Whisper's encoder on {CLIP_SECONDS} s, not padded",
        "padded to 30 s, as released systems",
        times["window"],
        times["clip"],
        check=in_float32("features those of transformers with so many positions", arguments.dtype),
        predicted=encoder_flops(config, item, window) / encoder_flops(config, item, clip),
        goal=LEAST_UNPADDED,
    )


def _check_library(backbone: WhisperEncoder, mel: torch.Tensor, features: torch.Tensor) -> None:
    frames = mel.shape[1] // 2
    weights = {**backbone.state_dict()}
    weights["embed_positions.weight"] = weights["embed_positions.weight"][:frames]
    library: Any = WhisperEncoder(WhisperConfig(**{**backbone.config.to_dict(), "max_source_positions": frames}))
    library.load_state_dict(weights)
    expected = library.to(mel.device).eval()(mel.transpose(1, 2)).last_hidden_state
    if (features - expected).abs().max() > 1e-4 * expected.abs().max():
        raise SystemExit("FAILED: the features differ from those of transformers' encoder")


def main() -> None:
    """Check, time and print."""
    arguments = options(__doc__, 5, with_device=True, recordings=(30, 60, 120), new_tokens=25)
    device = torch.device(arguments.device)
    table = Table("what", "sum, or padded, s", "whole, or not padded, s", "ratio", title="audio of other lengths")
    outcomes = [*recordings(arguments, device, table), unpadded(arguments, device, table)]
    Console(width=140).print(table)
    append(outcomes, arguments.results)


if __name__ == "__main__":
    main()
