"""Runs on streams of shards: as on a manifest of the same samples, resumed anywhere, with what is bad listed."""

import itertools
import json
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from stream_runs import NUM_SAMPLES, losses, values_of, write_world
from torch.utils.data import DataLoader
from webdataset_shards import write_shard

from mllm.checkpoints.load import TRAINABLES
from mllm.cli import main
from mllm.config.run import read_run_config
from mllm.data.batching import SampleKey
from mllm.training.dry_run import dry_run
from mllm.training.pipeline.dataset import load_dataset
from mllm.training.pipeline.stream_batches import StreamBatches
from mllm.training.run import build_model, build_trainer, launch, train
from mllm.training.trainer import ElasticTrainer

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tiny parts and three shards."""
    return write_world(tmp_path_factory.mktemp("streams"))


def prepared(values: dict[str, Any]) -> ElasticTrainer:
    config = read_run_config(values)
    arguments = launch(config)
    data = load_dataset(config)
    model, processor = build_model(config)
    return build_trainer(config, model, processor, data, arguments=arguments)


class Batches:
    """Batches without a length."""

    def __init__(self, batches: Sequence[list[SampleKey]]) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[list[SampleKey]]:
        return itertools.cycle(self.batches)


@pytest.fixture(scope="module")
def run(world: Path) -> Path:
    """A run on the stream, of two epochs, as a user starts it."""
    (world / "run.yaml").write_text(yaml.safe_dump(values_of(world, world / "run")))
    assert main(["train", "--config", str(world / "run.yaml")]) == 0
    return world / "run"


def test_a_stream_trains_as_a_manifest_of_the_same_samples_in_the_same_order(
    world: Path, run: Path, tmp_path: Path
) -> None:
    stream: Any = prepared(values_of(world, tmp_path / "stream")).batches.batch_sampler
    chosen = list(itertools.islice(stream, 12))
    assert len({row.sample.id for batch in chosen for row in batch.rows}) == NUM_SAMPLES
    listed = {"train": [str(world / "shards")], "stream": None}
    trainer = prepared(values_of(world, tmp_path / "manifest", data=listed))
    loader: Any = trainer.batches
    number = {sample.id: index for index, sample in enumerate(loader.dataset.samples)}
    keys = [[SampleKey(row.epoch, number[row.sample.id]) for row in batch.rows] for batch in chosen]
    assert {key.epoch for batch in keys for key in batch} == {0, 1}
    trainer.batches = DataLoader(loader.dataset, batch_sampler=Batches(keys), collate_fn=loader.collate_fn)  # type: ignore[arg-type]
    trainer.train()
    assert len(losses(run)) == 6
    assert losses(run) == losses(tmp_path / "manifest")


@pytest.mark.parametrize(("num_workers", "has_notes"), [(0, True), (2, False)])
def test_a_resumed_stream_equals_the_uninterrupted_one(
    world: Path, run: Path, tmp_path: Path, num_workers: int, has_notes: bool
) -> None:
    shutil.copytree(run, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoint-00000006")
    if not has_notes:
        shutil.rmtree(tmp_path / "run" / "stream")
    torch.manual_seed(99)
    train(values_of(world, tmp_path / "run", data={"num_workers": num_workers}), resume="auto")
    assert losses(tmp_path / "run") == losses(run)
    before, after = (load_file(folder / "checkpoint-00000006" / TRAINABLES) for folder in (run, tmp_path / "run"))
    assert all(torch.equal(value, after[key]) for key, value in before.items())


def test_other_shards_are_no_continuation(world: Path, run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "run")
    shutil.copytree(world / "shards", tmp_path / "shards")
    pattern = {"train": [str(tmp_path / "shards" / "*.tar")]}
    train(values_of(world, tmp_path / "new", data=pattern, max_steps=1))
    shutil.copy(tmp_path / "shards" / "000002.tar", tmp_path / "shards" / "000003.tar")
    with pytest.raises(ValueError, match=r"the shards of data.train are others, or of other sizes"):
        train(values_of(world, tmp_path / "new", data=pattern, max_steps=2), resume="auto")


def test_bad_samples_are_listed_with_shard_and_key(world: Path, tmp_path: Path) -> None:
    shutil.copytree(world / "shards", tmp_path / "shards")
    write_shard(
        tmp_path / "shards" / "bad.tar",
        {"a": {"png": b"no image", "txt": b"red"}, "b": {"json": b"{"}, "c": {"mp4": b"x", "txt": b"red"}},
    )
    train(
        values_of(
            world, tmp_path / "run", data={"train": [str(tmp_path / "shards")], "max_bad_fraction": 0.5}, max_steps=5
        )
    )
    rows = [json.loads(line) for line in (tmp_path / "run" / "skipped-0.jsonl").read_text().splitlines()]
    by_id = {row["id"]: row for row in rows}
    assert by_id.keys() == {"a", "b", "c"}
    assert "bad.tar@" in by_id["a"]["path"]
    assert (by_id["a"]["kind"], by_id["b"]["kind"]) == ("unsupported", "unusable")
    assert by_id["b"]["reason"].startswith(f"{tmp_path / 'shards' / 'bad.tar'}: b: ")
    assert "video" in by_id["c"]["reason"]


def test_what_a_run_refuses_before_its_model_is_built(world: Path, tmp_path: Path) -> None:
    def refused(message: str, **changes: Any) -> None:
        with pytest.raises(ValueError, match=message):
            prepared(values_of(world, tmp_path / "run", **changes))

    refused(
        r"train.epochs cannot be counted in steps with data.stream.*; give train.max_steps", max_steps=None, epochs=1
    )
    refused(r"train.task_weights names 'chat'; the first 4 samples .* have: ", task_weights={"chat": 2.0})
    refused(
        r"sample '0000.*': it has \d+ tokens at the largest budget, and data.tokens_per_batch is 20",
        data={"tokens_per_batch": 20, "max_bad_fraction": 0},
    )
    write_shard(tmp_path / "bad.tar", {str(number): {"json": b"{"} for number in range(3)})
    refused(
        r"bad.tar: 0: .*\n.*\n.*\ndata.train: 3 of the first 3 samples cannot be used; data.max_bad_fraction allows",
        data={"train": [str(tmp_path / "bad.tar")]},
    )
    write_shard(tmp_path / "empty.tar", {})
    refused(r"there is no sample in 1 shards, such as .*empty.tar", data={"train": [str(tmp_path / "empty.tar")]})
    refused(r"data.features encodes all samples before the first step", data={"features": {"folder": "x"}})


def test_a_stream_can_be_tried_and_overfitted(world: Path, tmp_path: Path) -> None:
    tried = dry_run(values_of(world, tmp_path / "run"))
    assert tried.num_steps == 6
    assert not (tmp_path / "run").exists()
    sampler: Any = prepared(values_of(world, tmp_path / "over", overfit_batches=1)).batches.batch_sampler
    assert isinstance(sampler, StreamBatches)
    first, second = itertools.islice(sampler, 2)
    assert first == second
