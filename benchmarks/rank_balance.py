"""Counts how far the fullest of eight ranks is above the mean: batches dealt at random, and steps dealt out evenly.

    python benchmarks/rank_balance.py [--ranks 8] [--samples 8000]

Counted, not timed: all soft and text tokens of every rank in every step of an epoch, which is what the ranks wait for;
the figures are the same on every machine. Ours are those of `mllm data balance` (`mllm/training/pipeline/balance.py`).

The baseline fills batches in the order of length, shuffles the batches and deals them round robin, as the released AVSR
code does (umbertocappellazzo/Omni-AVSR @7de6be2, datamodule/data_module.py, `CustomBucketDataset` and its shuffled
loader); with `a budget per rank` every rank samples its own, as MQT-LLaVA's do by `random.choice`
(gordonhu608/MQT-LLaVA @92c35d0, llava/model/multimodal_projector/builder.py:58-60), else all ranks sample the same.
Both ways have the same samples, limits and counter. At every budget ours must deal out every token exactly once; the
baseline repeats some batches in its last step, as torch's sampler does. FLOPs predict nothing here.

The samples are simulated: clips of 0.5 to 6 seconds, about as long as those of LRS3, in equal parts for three tasks, at
rates (4, 2) to (16, 5); and images with conversations as in LLaVA's mix of 665k, 576 to 1 tokens each, also with 6 %
of long conversations without an image among them, as there. `grouped` is `data.group_by_media`.
"""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from outcomes import Outcome, append
from rich.console import Console
from rich.table import Table
from side_by_side import Budget, build_processor, words
from transformers import CLIPVisionConfig, PreTrainedConfig, WhisperConfig
from turns import options

from mllm.budget.sampler import BudgetSampler
from mllm.config.medium import (
    AudioConfig,
    AudioEncoderConfig,
    ImageConfig,
    ImageEncoderConfig,
    LipsConfig,
    VideoConfig,
)
from mllm.config.model import ModelConfig
from mllm.config.run import DataConfig, RunConfig, SamplerConfig, TrainConfig
from mllm.data.manifest import Media, Medium, Message, Sample, Text
from mllm.encoders import AVHubertConfig
from mllm.training.pipeline.balance import AS_SAMPLED, RankLoad, sampled_tokens, simulate
from mllm.training.pipeline.dataset import build_sampler
from mllm.training.pipeline.token_scan import SampleTokens, measure_samples

GOAL = 1.05
TOKENS_PER_BATCH = 4096
COUNTS = (576, 144, 36, 9, 1)
IMAGE_BUDGETS = [Budget.parse(f"image={count}") for count in COUNTS]
AUDIO_RATES, VIDEO_RATES = (4, 16), (2, 5)
SPEECH_BUDGETS = [Budget.parse(f"audio=/{a},video=/{v}") for a, v in itertools.product(AUDIO_RATES, VIDEO_RATES)]
TASK_MEDIA: dict[str, tuple[Medium, ...]] = {"asr": ("audio",), "vsr": ("video",), "avsr": ("audio", "video")}
BUDGET_PER_RANK = "a budget per rank"
TOKENS_PER_SECOND = 4.0
"""Tokens of a second of speech that is written down."""


@dataclass(frozen=True)
class Case:
    """A run, the encoders of its media, at which budgets its loads are counted, and how even they are to be."""

    settings: RunConfig
    encoders: Mapping[str, PreTrainedConfig]
    budgets: Sequence[Budget]
    goal: float | None


def run_settings(model: ModelConfig) -> RunConfig:
    """Configure a run that samples one budget per step."""
    return RunConfig(
        model=model,
        data=DataConfig(train=["simulated"], tokens_per_batch=TOKENS_PER_BATCH),
        sampler=SamplerConfig(mode="random"),
        train=TrainConfig(out="none", epochs=1),
    )


def sample_of(
    number: int, media: Sequence[Medium], num_tokens: int, *, task: str = "vqa", seconds: float = 0.0
) -> Sample:
    """Make a short question about media, or none, and an answer of so many tokens."""
    prompt = (*(Media(medium, "none") for medium in media), Text(words(8)))
    messages = (Message("user", prompt), Message("assistant", (Text(words(num_tokens)),)))
    return Sample(f"s{number}", messages, task=task, meta={"seconds": seconds})


def speech(num_samples: int) -> list[Sample]:
    """Simulate clips and what is said in them; the task goes round."""
    rng = np.random.default_rng(0)
    seconds = np.clip(rng.lognormal(np.log(2.8), 0.6, num_samples), 0.5, 6.0)
    lengths = np.maximum(rng.normal(TOKENS_PER_SECOND, 0.8, num_samples) * seconds, 2).astype(int)
    tasks = itertools.cycle(TASK_MEDIA.items())
    return [
        sample_of(number, media, length, task=task, seconds=float(clip_seconds))
        for number, (clip_seconds, length, (task, media)) in enumerate(
            zip(seconds, lengths.tolist(), tasks, strict=False)
        )
    ]


def images(num_samples: int, fraction_without: float) -> list[Sample]:
    """Simulate conversations about an image, and some about none, which are longer."""
    rng = np.random.default_rng(0)
    about = np.clip(rng.lognormal(np.log(170), 0.8, num_samples), 10, 1400).astype(int)
    alone = np.clip(rng.lognormal(np.log(700), 0.6, num_samples), 50, 2000).astype(int)
    has_none = rng.random(num_samples) < fraction_without
    return [
        sample_of(number, () if none else ("image",), without if none else length)
        for number, (none, length, without) in enumerate(
            zip(has_none.tolist(), about.tolist(), alone.tolist(), strict=True)
        )
    ]


def filled(lengths: Sequence[int], *, max_tokens: int, max_rows: int) -> list[list[int]]:
    """Fill batches with neighbours in length, as full as the limits allow, padding included."""
    batches: list[list[int]] = [[]]
    for index in sorted(range(len(lengths)), key=lengths.__getitem__):
        full = (len(batches[-1]) + 1) * lengths[index] > max_tokens or len(batches[-1]) == max_rows
        if batches[-1] and full:
            batches.append([])
        batches[-1].append(index)
    return batches


def at_random(
    measured: Sequence[SampleTokens],
    sampler: BudgetSampler,
    *,
    data: DataConfig,
    num_ranks: int,
    budgets: Sequence[Budget],
) -> dict[str, RankLoad]:
    """Count the loads of batches that are shuffled and dealt round robin, by who samples the budget, and at each
    budget."""
    space = sampler.space
    largest = [one.tokens(space.largest(), space) for one in measured]
    batches = filled(largest, max_tokens=data.tokens_per_batch, max_rows=data.max_rows)
    np.random.default_rng(0).shuffle(batches)
    batches += batches[: -len(batches) % num_ranks]  # what torch's DistributedSampler does
    fixed = costs_at(measured, budgets, sampler)
    loads = {name: RankLoad() for name in (BUDGET_PER_RANK, AS_SAMPLED, *fixed)}
    for step, start in enumerate(range(0, len(batches), num_ranks)):
        dealt = batches[start : start + num_ranks]
        for name in (BUDGET_PER_RANK, AS_SAMPLED):
            costs = np.zeros(len(measured), np.int64)
            for rank, batch in enumerate(dealt):
                number = step * num_ranks + rank if name == BUDGET_PER_RANK else step
                costs[batch] = [sampled_tokens(measured[index], sampler, number) for index in batch]
            loads[name].add(costs, dealt, num_ranks)
        for name, costs in fixed.items():
            loads[name].add(costs, dealt, num_ranks)
    return loads


def costs_at(
    measured: Sequence[SampleTokens], budgets: Sequence[Budget], sampler: BudgetSampler
) -> dict[str, np.ndarray]:
    """Count the tokens of every sample at each budget."""
    return {str(budget): np.array([one.tokens(budget, sampler.space) for one in measured]) for budget in budgets}


def worst(loads: Mapping[str, RankLoad], *, padded: bool = False) -> float:
    """Compute fullest over mean rank at the budget, or the sampled budgets all ranks share, where it is worst."""
    key = "padded_imbalance" if padded else "imbalance"
    return max(float(str(load.facts()[key])) for name, load in loads.items() if name != BUDGET_PER_RANK)


def compare(name: str, samples: Sequence[Sample], case: Case, num_ranks: int, table: Table) -> Outcome:
    """Compare both ways on the same samples; add rows to the table.

    Raises:
        SystemExit: tokens that were dealt out twice, or not at all.
    """
    processor = build_processor(case.settings.model, case.encoders)
    sampler = build_sampler(case.settings, processor.space)
    measured = measure_samples(samples, processor)
    shared = {"num_ranks": num_ranks, "budgets": case.budgets}
    theirs = at_random(measured, sampler, data=case.settings.data, **shared)
    ours = simulate(samples, processor, sampler, config=case.settings, epochs=1, **shared)
    for budget, costs in costs_at(measured, case.budgets, sampler).items():
        if np.sum(ours[budget].tokens) != costs.sum():
            raise SystemExit(f"FAILED: {name}: an epoch at {budget} is not every sample once")
    of_random_budgets = float(str(theirs[BUDGET_PER_RANK].facts()["imbalance"]))
    for way, loads in (("at random", theirs), ("dealt out", ours)):
        sampled_ratio = f"{of_random_budgets:.3f}" if way == "at random" else ""
        steps = str(len(loads[AS_SAMPLED].tokens))
        table.add_row(name, way, steps, sampled_ratio, f"{worst(loads):.3f}", f"{worst(loads, padded=True):.3f}")
    return Outcome(
        f"fullest over mean of {num_ranks} ranks, {name}",
        f"random dealing, a budget per rank: {of_random_budgets:.3f}",
        worst(ours),
        "every token dealt once",
        goal=case.goal,
        at_most=True,
    )


def speech_case() -> Case:
    """Configure audio at rates 4 and 16, video at 2 and 5."""
    audio_rates, video_rates = ([f"/{rate}" for rate in rates] for rates in (AUDIO_RATES, VIDEO_RATES))
    audio = AudioConfig(encoder=AudioEncoderConfig(source="random"), budgets=[*audio_rates])
    video = VideoConfig(encoder=LipsConfig(source="random"), budgets=[*video_rates])
    model = ModelConfig(llm="random", chat_format="plain", audio=audio, video=video)
    return Case(run_settings(model), {"audio": WhisperConfig(), "video": AVHubertConfig()}, SPEECH_BUDGETS, GOAL)


def image_case() -> Case:
    """Configure images of 24 x 24 patches, pooled."""
    image = ImageConfig(encoder=ImageEncoderConfig(source="random"), budgets=list(COUNTS))
    model = ModelConfig(llm="random", chat_format="plain", image=image)
    return Case(run_settings(model), {"image": CLIPVisionConfig(image_size=336, patch_size=14)}, IMAGE_BUDGETS, GOAL)


def main() -> None:
    """Count, compare and print."""
    arguments = options(__doc__, None, ranks=8, samples=8000)
    table = Table(
        title=f"fullest over mean rank, {arguments.ranks} ranks of {TOKENS_PER_BATCH} tokens", title_justify="left"
    )
    for column in ("samples", "batches", "steps", BUDGET_PER_RANK, "at the worst budget", "the same, padded"):
        table.add_column(column, justify="left" if column in ("samples", "batches") else "right")
    clips, shown = speech_case(), image_case()
    data = replace(shown.settings.data, group_by_media=True)
    grouped = replace(shown, settings=replace(shown.settings, data=data))
    mixed = images(arguments.samples, 0.06)
    outcomes = [
        compare("clips", speech(arguments.samples), clips, arguments.ranks, table),
        compare("images", images(arguments.samples, 0.0), shown, arguments.ranks, table),
        compare("6 % without an image", mixed, replace(shown, goal=None), arguments.ranks, table),
        compare("6 % without an image, grouped", mixed, grouped, arguments.ranks, table),
    ]
    Console(width=140).print(table)
    append(outcomes, arguments.results)


if __name__ == "__main__":
    main()
