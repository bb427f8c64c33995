"""A whole training run at toy size: rows with random media, noise that depends on the epoch, the real trainer."""

import dataclasses
import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import tiny
import torch
from torch.utils.data import DataLoader, Dataset

from mllm.budget import Budget
from mllm.budget.sampler import BudgetSampler
from mllm.checkpoints.pretrained import unsharded
from mllm.config.model import ModelConfig
from mllm.config.run import DataConfig, RunConfig, SamplerConfig, TrainConfig
from mllm.data.manifest import Media, Message, Sample, Text
from mllm.model.trainables import set_trainables
from mllm.processing.processor import LoadedMedia
from mllm.training.arguments import build_arguments
from mllm.training.llm_shards import mesh_of_all, shard_llm
from mllm.training.trainer import ElasticTrainer, Validation
from mllm.utils.random_generator import random_generator

ANSWERS = ["red", "two circles", "the cat sat", "left of the blue square", "no"]
AUDIO_VISUAL = [("audio", "video"), ("audio",), ("video", "audio"), ("video",)]
EVERYTHING = [("image",), ("audio", "video"), (), ("video",), ("image", "image"), ("audio",)]


class Rows(Dataset[tuple[Sample, list[LoadedMedia]]]):
    """Conversations over random media of different lengths; training noise is a function of epoch and sample."""

    def __init__(self, kinds: Sequence[tuple[str, ...]], size: int, *, seed: int = 0) -> None:
        self.kinds = [kinds[index % len(kinds)] for index in range(size)]
        self.seed = seed

    def __len__(self) -> int:
        return len(self.kinds)

    def __getitem__(self, key: tuple[int, int]) -> tuple[Sample, list[LoadedMedia]]:
        epoch, index = key
        rng = random_generator(self.seed, epoch, str(index), "noise")
        loaded = []
        for number, medium in enumerate(self.kinds[index]):
            clean = tiny.random_media(medium, 20 + 3 * (index % 4), seed=100 * index + number)
            noise = torch.from_numpy(rng.standard_normal(tuple(clean.values.shape), dtype="float32"))
            loaded.append(dataclasses.replace(clean, values=clean.values + 0.1 * noise))
        parts = (*(Media(medium, "x") for medium in self.kinds[index]), Text(f"question {index}"))
        answer = ANSWERS[index % len(ANSWERS)]
        messages = (Message("user", parts), Message("assistant", (Text(answer),)))
        return Sample(f"sample{index}", messages, task="test"), loaded


class FixedBatches:
    """Assigns the micro-batches of every epoch in turn to the processes; like `RankBatches`, but of fixed rows."""

    def __init__(self, of_epoch: Callable[[int], Sequence[Sequence[int]]], rank: int, num_processes: int) -> None:
        self.of_epoch, self.rank, self.num_processes = of_epoch, rank, num_processes

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        stream = ((epoch, batch) for epoch in itertools.count() for batch in self.of_epoch(epoch))
        for epoch, batch in itertools.islice(stream, self.rank, None, self.num_processes):
            yield [(epoch, row) for row in batch]


def run_settings(
    output: Path,
    model: ModelConfig,
    *,
    sampler: SamplerConfig | None = None,
    validation: bool = False,
    **train: Any,
) -> RunConfig:
    """Settings of a toy run."""
    values = {"max_steps": 4, "learning_rate": 0.01, "log_every": 1, "progress": False, "tensorboard": False, **train}
    return RunConfig(
        model=model,
        data=DataConfig(train=["none.jsonl"], validation=["none.jsonl"] if validation else []),
        sampler=sampler or SamplerConfig(mode="random", num_budgets=2),
        train=TrainConfig(out=str(output), **values),
    )


def make_trainer(
    settings: RunConfig,
    *,
    kinds: Sequence[tuple[str, ...]] = AUDIO_VISUAL,
    rows: int = 8,
    rows_per_batch: int = 2,
    workers: int = 0,
    batches: Sequence[Sequence[int]] | None = None,
    validated_at: Sequence[str] = (),
    shards_llm: bool = False,
) -> ElasticTrainer:
    """The real trainer on toy rows. `batches` fixes the micro-batches of every epoch, `validated_at` the budgets."""
    arguments = build_arguments(settings, on_cpu=True, shards_llm=shards_llm)
    processor = tiny.processor(settings.model)
    with unsharded():
        model = tiny.model(settings.model)
    set_trainables(model, settings.parts)
    if shards_llm:
        shard_llm(model, arguments.device, mesh_of_all(arguments.device))
    arguments.facts = {"settings": dataclasses.asdict(settings), "sources": {}}
    data = Rows(kinds, rows)

    def of_epoch(epoch: int) -> Sequence[Sequence[int]]:
        if batches is not None:
            return batches
        order = random_generator(0, epoch, "", "order").permutation(rows).tolist()
        return [order[start : start + rows_per_batch] for start in range(0, rows, rows_per_batch)]

    def collate(items: Sequence[tuple[Sample, list[LoadedMedia]]]) -> dict[str, Any]:
        samples, media = zip(*items, strict=True)
        return {"batch": processor.batch(samples, media, for_training=True)}

    world, rank = arguments.world_size, arguments.process_index
    rank_batches = FixedBatches(of_epoch, rank, world)
    validation = None
    if settings.data.validation:
        keys = [[(0, row) for row in batch] for batch in ([0, 1], [2, 3], [4], [4])[rank::world]]
        budgets = [Budget.parse(text) for text in validated_at]
        loader = DataLoader(data, batch_sampler=keys, collate_fn=collate)
        validation = Validation(loader, len(keys) - (rank + 1 == world), budgets)
    space = processor.space
    sampled = BudgetSampler(
        space, settings.sampler.mode, settings.sampler.num_budgets, settings.train.seed, tuple(settings.sampler.budgets)
    )
    loader = DataLoader(data, batch_sampler=rank_batches, collate_fn=collate, num_workers=workers)  # type: ignore[arg-type]
    return ElasticTrainer(
        model, arguments, processor=processor, sampler=sampled, batches=loader, validation=validation, tensorboard=False
    )


def log_rows(run: Path, *, timed: bool = False) -> list[dict[str, float]]:
    """The rows of a run's log; without `timed` what depends on the clock is left out."""
    rows = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    if timed:
        return rows
    return [{key: value for key, value in row.items() if "second" not in key and "runtime" not in key} for row in rows]
