"""How far the fullest of eight ranks is above the mean: batches dealt at random beside steps that are dealt out evenly.

    python benchmarks/rank_balance.py [--ranks 8] [--samples 8000]

Counted, not timed: all soft and text tokens of every rank in every step of an epoch, which is what the ranks wait for;
the figures are the same on every machine. Ours are those of `mllm data balance` (`mllm/training/pipeline/balance.py`).

The baseline fills batches in the order of length, shuffles the batches and deals them round robin, as the released AVSR
code does (umbertocappellazzo/Omni-AVSR @7de6be2, datamodule/data_module.py, `CustomBucketDataset` and its shuffled
loader); with `a budget per rank` every rank draws its own, as MQT-LLaVA's do by `random.choice` (gordonhu608/MQT-LLaVA
@92c35d0, llava/model/multimodal_projector/builder.py:58-60), else all ranks draw the same. Both ways have the same
samples, limits and counter. At every budget ours must deal out every token exactly once; the baseline repeats some
batches in its last step, as torch's sampler does. FLOPs predict nothing here.

The samples are simulated: clips of 0.5 to 6 seconds, about as long as those of LRS3, in equal parts for three tasks, at
rates (4, 2) to (16, 5); and images with conversations as in LLaVA's mix of 665k, 576 to 1 tokens each, also with 6 %
of long conversations without an image among them, as there. `grouped` is `data.group_by_media`.
"""

import itertools
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from outcomes import Outcome, append
from rich.console import Console
from rich.table import Table
from side_by_side import Budget, build_processor, words
from transformers import CLIPVisionConfig, PreTrainedConfig, WhisperConfig
from turns import options

sys.path.insert(0, str(Path(__file__).parent.parent))

from mllm.budget.sampler import Sampler
from mllm.config.model import MediumConfig, ModelConfig
from mllm.config.run import DataConfig, RunConfig, SamplerConfig, TrainConfig
from mllm.data.manifest import Media, Medium, Message, Sample, Text
from mllm.encoders import AVHubertConfig
from mllm.training.pipeline.balance import Load, drawn_tokens, simulate
from mllm.training.pipeline.token_scan import Looked, look_all
from mllm.training.run import build_sampler

GOAL = 1.05
TOKENS_PER_BATCH = 4096
COUNTS = (576, 144, 36, 9, 1)
IMAGE_BUDGETS = [Budget.parse(f"image={count}") for count in COUNTS]
AUDIO_RATES, VIDEO_RATES = (4, 16), (2, 5)
SPEECH_BUDGETS = [Budget.parse(f"audio=/{a},video=/{v}") for a, v in itertools.product(AUDIO_RATES, VIDEO_RATES)]
TASK_MEDIA: dict[str, tuple[Medium, ...]] = {"asr": ("audio",), "vsr": ("video",), "avsr": ("audio", "video")}
OWN_DRAWS, SAME_DRAWS = "a budget per rank", "as drawn"
TOKENS_PER_SECOND = 4.0
"""Of speech that is written down."""


@dataclass(frozen=True)
class Case:
    """A run, the encoders of its media, at which budgets its loads are counted, and how even they are to be."""

    settings: RunConfig
    encoders: Mapping[str, PreTrainedConfig]
    budgets: Sequence[Budget]
    goal: float | None


def run_settings(model: ModelConfig) -> RunConfig:
    """A run that draws one budget per step."""
    return RunConfig(
        model=model,
        data=DataConfig(train=["simulated"], tokens_per_batch=TOKENS_PER_BATCH),
        sampler=SamplerConfig(mode="random"),
        train=TrainConfig(out="none", epochs=1),
    )


def sample_of(
    number: int, media: Sequence[Medium], num_tokens: int, *, task: str = "vqa", seconds: float = 0.0
) -> Sample:
    """A short question about media, or none, and an answer of so many tokens."""
    asked = (*(Media(medium, "none") for medium in media), Text(words(8)))
    messages = (Message("user", asked), Message("assistant", (Text(words(num_tokens)),)))
    return Sample(f"s{number}", messages, task=task, meta={"seconds": seconds})


def speech(num_samples: int) -> list[Sample]:
    """Clips and what is said in them; the task goes round."""
    chance = np.random.default_rng(0)
    seconds = np.clip(chance.lognormal(np.log(2.8), 0.6, num_samples), 0.5, 6.0)
    lengths = np.maximum(chance.normal(TOKENS_PER_SECOND, 0.8, num_samples) * seconds, 2).astype(int)
    tasks = itertools.cycle(TASK_MEDIA.items())
    return [
        sample_of(number, media, length, task=task, seconds=float(own))
        for number, (own, length, (task, media)) in enumerate(zip(seconds, lengths.tolist(), tasks, strict=False))
    ]


def images(num_samples: int, fraction_without: float) -> list[Sample]:
    """Conversations about an image, and some about none, which are longer."""
    chance = np.random.default_rng(0)
    about = np.clip(chance.lognormal(np.log(170), 0.8, num_samples), 10, 1400).astype(int)
    alone = np.clip(chance.lognormal(np.log(700), 0.6, num_samples), 50, 2000).astype(int)
    has_none = chance.random(num_samples) < fraction_without
    return [
        sample_of(number, () if none else ("image",), without if none else length)
        for number, (none, length, without) in enumerate(
            zip(has_none.tolist(), about.tolist(), alone.tolist(), strict=True)
        )
    ]


def filled(lengths: Sequence[int], *, max_tokens: int, max_rows: int) -> list[list[int]]:
    """Batches of neighbours in length, as full as the limits allow, padding included."""
    batches: list[list[int]] = [[]]
    for index in sorted(range(len(lengths)), key=lengths.__getitem__):
        full = (len(batches[-1]) + 1) * lengths[index] > max_tokens or len(batches[-1]) == max_rows
        if batches[-1] and full:
            batches.append([])
        batches[-1].append(index)
    return batches


def at_random(
    looked: Sequence[Looked], draws: Sampler, *, data: DataConfig, num_ranks: int, budgets: Sequence[Budget]
) -> dict[str, Load]:
    """Loads of batches that are shuffled and dealt round robin, by who draws, and at each budget."""
    space = draws.space
    largest = [one.tokens(space.largest(), space) for one in looked]
    batches = filled(largest, max_tokens=data.tokens_per_batch, max_rows=data.max_rows)
    np.random.default_rng(0).shuffle(batches)
    batches += batches[: -len(batches) % num_ranks]  # what torch's DistributedSampler does
    fixed = costs_at(looked, budgets, draws)
    loads = {name: Load() for name in (OWN_DRAWS, SAME_DRAWS, *fixed)}
    for step, start in enumerate(range(0, len(batches), num_ranks)):
        dealt = batches[start : start + num_ranks]
        for name in (OWN_DRAWS, SAME_DRAWS):
            costs = np.zeros(len(looked), np.int64)
            for rank, batch in enumerate(dealt):
                number = step * num_ranks + rank if name == OWN_DRAWS else step
                costs[batch] = [drawn_tokens(looked[index], draws, number) for index in batch]
            loads[name].add(costs, dealt, num_ranks)
        for name, costs in fixed.items():
            loads[name].add(costs, dealt, num_ranks)
    return loads


def costs_at(looked: Sequence[Looked], budgets: Sequence[Budget], draws: Sampler) -> dict[str, np.ndarray]:
    """Tokens of every sample at each budget."""
    return {str(budget): np.array([one.tokens(budget, draws.space) for one in looked]) for budget in budgets}


def worst(loads: Mapping[str, Load], *, padded: bool = False) -> float:
    """Fullest over mean rank at the budget, or the draws all ranks share, where it is worst."""
    key = "padded_imbalance" if padded else "imbalance"
    return max(float(str(load.facts()[key])) for name, load in loads.items() if name != OWN_DRAWS)


def compare(name: str, samples: Sequence[Sample], case: Case, num_ranks: int, table: Table) -> Outcome:
    """Both ways on the same samples; adds rows to the table.

    Raises:
        SystemExit: tokens that were dealt out twice, or not at all.
    """
    processor = build_processor(case.settings.model, case.encoders)
    draws = build_sampler(case.settings, processor.space)
    looked = look_all(samples, processor)
    shared = {"num_ranks": num_ranks, "budgets": case.budgets}
    theirs = at_random(looked, draws, data=case.settings.data, **shared)
    ours = simulate(samples, processor, draws, settings=case.settings, epochs=1, **shared)
    for budget, costs in costs_at(looked, case.budgets, draws).items():
        if np.sum(ours[budget].tokens) != costs.sum():
            raise SystemExit(f"FAILED: {name}: an epoch at {budget} is not every sample once")
    random_draws = float(str(theirs[OWN_DRAWS].facts()["imbalance"]))
    for way, loads in (("at random", theirs), ("dealt out", ours)):
        own = f"{random_draws:.3f}" if way == "at random" else ""
        steps = str(len(loads[SAME_DRAWS].tokens))
        table.add_row(name, way, steps, own, f"{worst(loads):.3f}", f"{worst(loads, padded=True):.3f}")
    return Outcome(
        f"fullest over mean of {num_ranks} ranks, {name}",
        f"random dealing, a budget per rank: {random_draws:.3f}",
        worst(ours),
        "every token dealt once",
        goal=case.goal,
        at_most=True,
    )


def speech_case() -> Case:
    """Sound at rates 4 and 16, lips at 2 and 5."""
    audio, video = (
        MediumConfig(encoder="random", budgets=[f"/{rate}" for rate in rates]) for rates in (AUDIO_RATES, VIDEO_RATES)
    )
    model = ModelConfig(llm="random", chat_format="plain", audio=audio, video=video)
    return Case(run_settings(model), {"audio": WhisperConfig(), "video": AVHubertConfig()}, SPEECH_BUDGETS, GOAL)


def image_case() -> Case:
    """Images of 24 x 24 patches, pooled."""
    image = MediumConfig(encoder="random", budgets=list(COUNTS))
    model = ModelConfig(llm="random", chat_format="plain", image=image)
    return Case(run_settings(model), {"image": CLIPVisionConfig(image_size=336, patch_size=14)}, IMAGE_BUDGETS, GOAL)


def main() -> None:
    """Count, compare, print."""
    given = options(__doc__, None, ranks=8, samples=8000)
    table = Table(
        title=f"fullest over mean rank, {given.ranks} ranks of {TOKENS_PER_BATCH} tokens", title_justify="left"
    )
    for column in ("samples", "batches", "steps", OWN_DRAWS, "at the worst budget", "the same, padded"):
        table.add_column(column, justify="left" if column in ("samples", "batches") else "right")
    clips, shown = speech_case(), image_case()
    data = replace(shown.settings.data, group_by_media=True)
    grouped = replace(shown, settings=replace(shown.settings, data=data))
    mixed = images(given.samples, 0.06)
    outcomes = [
        compare("clips", speech(given.samples), clips, given.ranks, table),
        compare("images", images(given.samples, 0.0), shown, given.ranks, table),
        compare("6 % without an image", mixed, replace(shown, goal=None), given.ranks, table),
        compare("6 % without an image, grouped", mixed, grouped, given.ranks, table),
    ]
    Console(width=140).print(table)
    append(outcomes, given.results)


if __name__ == "__main__":
    main()
