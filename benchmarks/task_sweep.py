"""Answers a clip at the eight pairs of task and rates of Omni-AVSR's evaluation, beside one pass per pair.

    python benchmarks/task_sweep.py [--repeats 3] [--threads 1] [--beams 15] [--new-tokens 25] [--device cpu]

Omni-AVSR (umbertocappellazzo/Omni-AVSR @0713b85, eval_OmniAVSR.py) tests one model on speech at two rates, on lips at
two, and on both at four pairs of rates, each in a pass of its own over the test set with batches of one clip and 15
beams (modeling_OmniAVSR.py:315-319). A pass encodes what its task reads, so each encoder runs six times per clip; its
search is that of transformers, whose every beam reads the prompt. It tests lips three times over, which is left out.

`by media` does what `mllm evaluate` does: a batch per combination of media, in which a clip is encoded once and
answered at all rates as rows of one search, so each encoder runs twice. `together` answers all eight pairs as rows of
one search behind one run of each encoder.

The model is that of `beam_decoding.py` with an encoder of lips, which costs beside it what AV-HuBERT Large costs
beside Llama-3.2-1B; no adapter. Ids are compared first, and any difference stops the benchmark. Beside the ratio stands
the one that FLOPs (`mllm/evaluation/flops.py`) predict, with the padding of the shorter prompts. Times are CPU time of
the process, or wall time on a GPU.
"""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from beam_decoding import FRAMES_PER_SECOND, SECONDS, build_model, library
from outcomes import Outcome, append, in_float32, table_of, timed
from rich.console import Console
from side_by_side import rows_of, words
from torch import Tensor
from turns import in_turns, options, unprepared

from mllm.budget import Budget
from mllm.config.medium import LipsConfig, VideoConfig
from mllm.encoders import AVHubertConfig
from mllm.evaluation.flops import Item, RequestCost, llm_flops, request_cost
from mllm.model.media_arguments import SIZE_KEYS, VALUE_KEYS
from mllm.model.modeling import ElasticForConditionalGeneration
from mllm.processing.batch import Batch
from mllm.processing.processor import ElasticProcessor, LoadedMedia

AUDIO_RATES, VIDEO_RATES = (4, 16), (2, 5)
FRAMES = {"audio": SECONDS * FRAMES_PER_SECOND, "video": SECONDS * 25}
GOAL = 3.0


@dataclass(frozen=True)
class Pair:
    """One task, by the number of its row in the batch, at its rates."""

    row: int
    media: tuple[str, ...]
    budget: Budget


ASR = [Pair(0, ("audio",), Budget.parse(f"audio=/{rate}")) for rate in AUDIO_RATES]
VSR = [Pair(1, ("video",), Budget.parse(f"video=/{rate}")) for rate in VIDEO_RATES]
AVSR = [
    Pair(2, ("audio", "video"), Budget.parse(f"audio=/{audio},video=/{video}"))
    for video in VIDEO_RATES
    for audio in AUDIO_RATES
]
PAIRS = [*ASR, *VSR, *AVSR]


def example(
    device: torch.device, dtype: torch.dtype
) -> tuple[ElasticForConditionalGeneration, ElasticProcessor, Batch]:
    """Build the model of the head of this file, and the rows of three tasks that show the same clip."""
    av_hubert = AVHubertConfig(
        hidden_size=512,
        num_hidden_layers=7,
        num_attention_heads=8,
        intermediate_size=2048,
        resnet_channels=[16, 32, 64, 128],
    )
    video = VideoConfig(encoder=LipsConfig(source="random"), budgets=[f"/{rate}" for rate in VIDEO_RATES])
    model, processor = build_model(device, dtype, AUDIO_RATES, (video, av_hubert))
    generator = torch.Generator().manual_seed(1)
    log_mel = LoadedMedia("audio", torch.randn(80, 3000, generator=generator), SECONDS * 16_000)
    frames = FRAMES["video"]
    lips = LoadedMedia("video", torch.randn(frames, 1, 88, 88, generator=generator), frames)
    prompt = words(8)
    batch = rows_of(processor, [([log_mel, prompt], ""), ([lips, prompt], ""), ([log_mel, lips, prompt], "")])
    return model, processor, batch


def inputs_of(
    processor: ElasticProcessor, batch: Batch, pairs: Sequence[Pair], device: torch.device
) -> dict[str, Tensor]:
    """Make the inputs of one search, a row per pair, with the media that its rows show and no others."""
    shown = {medium for pair in pairs for medium in pair.media}
    hidden = {keys[medium] for keys in (VALUE_KEYS, SIZE_KEYS) for medium in ("audio", "video") if medium not in shown}
    values = {key: value for key, value in batch.values.items() if key not in hidden}
    rows = Batch([batch.rows[pair.row] for pair in pairs], values)
    inputs = processor.expand(rows, [[pair.budget for pair in pairs]], left_padding=True).inputs
    return {key: value.to(device) for key, value in inputs.items()}


def predicted(config: Any, pair: Pair, length: int, arguments: argparse.Namespace) -> RequestCost:
    """Count FLOPs of one pair by the model of costs, with a prompt that is padded to a length and read once."""
    items = []
    for medium in pair.media:
        frames, size = FRAMES[medium], (88, 88) if medium == "video" else (0, 0)
        items.append(Item(medium, frames, frames // int(pair.budget.amounts[medium].value), *size))
    return request_cost(
        config,
        items,
        num_prompt_tokens=length,
        num_new_tokens=arguments.new_tokens,
        num_beams=arguments.beams,
    )


def flops_of_passes(config: Any, lengths: Sequence[int], arguments: argparse.Namespace) -> int:
    """Count FLOPs of a pass per pair, whose every beam reads the whole prompt, of so many tokens."""
    total = 0
    for pair, length in zip(PAIRS, lengths, strict=True):
        cost = predicted(config, pair, length, arguments)
        prompt = llm_flops(config.text_config, num_tokens=length, num_logits=1, adapter=config.adapter)
        total += cost.encoder + cost.compressor + arguments.beams * prompt + cost.decode
    return total


def flops_of_searches(
    config: Any, searches: Sequence[Sequence[Pair]], longest: Sequence[int], arguments: argparse.Namespace
) -> int:
    """Count FLOPs of searches that each encode once, with prompts padded to the longest of each."""
    total = 0
    for pairs, length in zip(searches, longest, strict=True):
        costs = [predicted(config, pair, length, arguments) for pair in pairs]
        total += max(one.encoder for one in costs) + sum(one.total - one.encoder for one in costs)
    return total


def compare(arguments: argparse.Namespace) -> list[Outcome]:
    """Check equality first, then time in turns.

    Raises:
        SystemExit: ids differ.
    """
    device = torch.device(arguments.device)
    model, processor, batch = example(device, getattr(torch, arguments.dtype))
    options: dict[str, Any] = {"max_new_tokens": arguments.new_tokens, "min_new_tokens": arguments.new_tokens}
    options |= {"do_sample": False, "num_beams": arguments.beams}

    def ours(inputs: dict[str, Tensor]) -> Tensor:
        return model.generate(**inputs, **options)

    def answered(search: Callable[[dict[str, Tensor]], Tensor], searches: Sequence[Sequence[Pair]]) -> list[list[int]]:
        ids = []
        for pairs in searches:
            inputs = inputs_of(processor, batch, pairs, device)
            ids += search(inputs)[:, inputs["input_ids"].shape[1] :].tolist()
        return ids

    searches = {"by media": [ASR, VSR, AVSR], "together": [PAIRS]}
    each = [[pair] for pair in PAIRS]
    runs = {"a pass each": partial(answered, lambda inputs: library(model, inputs, options), each)}
    runs |= {name: partial(answered, ours, of_way) for name, of_way in searches.items()}
    if arguments.dtype == "float32":
        expected, *others = (run() for run in runs.values())
        if any(ids != expected for ids in others):
            raise SystemExit("FAILED: the ids of a sweep differ from those of a pass each")

    def lengths(of_way: Sequence[Sequence[Pair]]) -> list[int]:
        return [inputs_of(processor, batch, pairs, device)["input_ids"].shape[1] for pairs in of_way]

    baseline = flops_of_passes(model.config, lengths(each), arguments)
    times = in_turns(unprepared(runs), arguments.repeats, device)
    return [
        timed(
            f"8 pairs of task and rates of a clip, {arguments.beams} beams, {name}",
            "a pass each, as Omni-AVSR's evaluation",
            times["a pass each"],
            times[name],
            check=in_float32("ids equal", arguments.dtype),
            predicted=baseline / flops_of_searches(model.config, of_way, lengths(of_way), arguments),
            goal=GOAL if name == "by media" else None,
        )
        for name, of_way in searches.items()
    ]


def main() -> None:
    """Compare, print and hand on."""
    arguments = options(__doc__, 3, beams=15, new_tokens=25, with_device=True)
    outcomes = compare(arguments)
    Console(width=200).print(table_of(outcomes))
    append(outcomes, arguments.results)


if __name__ == "__main__":
    main()
