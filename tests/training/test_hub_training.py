"""Runs on a hub's data set: as on the same shards of a disk, resumed behind a new commit, on two processes."""

import gc
import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import toy_hub
import yaml
from launches import assert_same_run, run_launcher
from safetensors.torch import load_file
from stream_runs import losses, values_of, write_world
from toy_hub import ToyHub
from webdataset_shards import write_shard

from mllm.checkpoints.load import TRAINABLES
from mllm.training.dry_run import dry_run
from mllm.training.run import train
from mllm.training.run_folder import read_checkpoint

pytestmark = pytest.mark.slow
REPO = "owner/set"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tiny parts and three shards."""
    return write_world(tmp_path_factory.mktemp("hub-streams"))


@pytest.fixture
def hub(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ToyHub]:
    """A hub that has the shards, for this process and for those that it starts."""
    with toy_hub.serving() as served:
        served.push(REPO, world / "shards")
        toy_hub.use(served, tmp_path / "cache", monkeypatch)
        for name, value in toy_hub.environment_of(served, tmp_path / "cache").items():
            monkeypatch.setenv(name, value)
        yield served


def on_hub(world: Path, out: Path, *, data: dict[str, Any] | None = None, **changes: Any) -> dict[str, Any]:
    return values_of(world, out, data={"train": [REPO], **(data or {})}, **changes)


def assert_same_weights(one: Path, two: Path, step: int) -> None:
    before, after = (load_file(run / f"checkpoint-{step:08d}" / TRAINABLES) for run in (one, two))
    assert before.keys() == after.keys()
    assert all(torch.equal(value, after[key]) for key, value in before.items())


def test_a_run_equals_that_on_the_same_shards_and_goes_on_at_its_commit(
    world: Path, hub: ToyHub, tmp_path: Path
) -> None:
    train(values_of(world, tmp_path / "disk"))
    train(on_hub(world, tmp_path / "run", data={"num_workers": 2}))
    assert losses(tmp_path / "run") == losses(tmp_path / "disk")
    assert_same_weights(tmp_path / "disk", tmp_path / "run", 6)
    assert set(hub.fetched.values()) == {1}
    commit = hub.commits[REPO, "main"]
    facts = read_checkpoint(tmp_path / "run" / "checkpoint-00000003").facts["shards"]
    assert facts["commits"] == {REPO: commit}

    write_shard(tmp_path / "new" / "000000.tar", {"new": {"json": {"question": "new?", "answer": "new"}}})
    hub.push(REPO, tmp_path / "new")
    shutil.rmtree(tmp_path / "cache")
    shutil.rmtree(tmp_path / "run" / "checkpoint-00000006")
    # The disk may get a limit meanwhile: it decides nothing of what is learned.
    stream = {"shuffle_samples": 4, "max_disk_gb": 0.01, "shards_ahead": 0}
    train(on_hub(world, tmp_path / "run", data={"stream": stream}), resume="auto")
    assert losses(tmp_path / "run") == losses(tmp_path / "disk")
    assert_same_weights(tmp_path / "disk", tmp_path / "run", 6)
    gc.collect()
    assert not list((tmp_path / "run").rglob("*.tar")), "the shards of a run that has ended are gone"
    assert not list((tmp_path / "cache").rglob("*.tar"))
    assert read_checkpoint(tmp_path / "run" / "checkpoint-00000006").facts["shards"] == facts


def test_a_limit_is_met_or_refused(world: Path, hub: ToyHub, tmp_path: Path) -> None:
    stream = {"shuffle_samples": 4, "max_disk_gb": 1e-5}
    left = tmp_path / "run" / "stream" / "shards-5"  # by a run of more processes that was killed
    left.mkdir(parents=True)
    (left / "000000.tar").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"data.stream.max_disk_gb is 1e-05, and .* does not fit; raise it, or lower"):
        train(on_hub(world, tmp_path / "run", data={"stream": stream}))
    assert not left.exists()
    with pytest.raises(ValueError, match=r"max_disk_gb limits what is fetched of a hub, and data.train names none"):
        train(values_of(world, tmp_path / "disk", data={"stream": stream}))
    stream = {"shuffle_samples": 4, "max_disk_gb": 0.01}
    assert dry_run(on_hub(world, tmp_path / "tried", data={"stream": stream})).num_steps == 6
    assert not (tmp_path / "tried").exists()
    assert not (tmp_path / "cache").exists()


def start(config: dict[str, Any], file: Path, *options: str) -> None:
    """Train by two processes, as a user starts them."""
    file.write_text(yaml.safe_dump(config))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "mllm"]
    run_launcher(*command, "train", "--config", file, *options)


def test_two_processes_read_what_one_reads_and_go_on_as_one_or_two(world: Path, hub: ToyHub, tmp_path: Path) -> None:
    steps: dict[str, Any] = {"max_steps": 4, "save_every": 2}
    one, two = tmp_path / "one", tmp_path / "two"
    train(on_hub(world, one, accumulation=2, **steps))
    stream = {"shuffle_samples": 4, "max_disk_gb": 0.01}
    start(on_hub(world, two, data={"stream": stream, "num_workers": 1}, accumulation=1, **steps), tmp_path / "two.yaml")
    assert_same_run(one, two)
    assert read_checkpoint(two / "checkpoint-00000004").facts["processes"] == 2
    notes = [sorted((run / "stream").glob("slot-*.jsonl")) for run in (one, two)]
    assert [file.name for file in notes[0]] == ["slot-00000.jsonl", "slot-00001.jsonl"]
    for file, other in zip(*notes, strict=True):  # whose worker is given more batches than the run takes
        assert other.read_text().startswith(file.read_text())
    assert not list(two.rglob("*.tar"))

    hub.commit(REPO, {"other.tar": b""})
    for name, begun in (("one-two", one), ("two-one", two)):
        shutil.copytree(begun, tmp_path / name)
        shutil.rmtree(tmp_path / name / "checkpoint-00000004")
        rows = (tmp_path / name / "log.jsonl").read_text().splitlines(keepends=True)
        assert json.loads(rows[-1])["step"] == 4
    start(on_hub(world, tmp_path / "one-two", accumulation=1, **steps), tmp_path / "a.yaml", "--resume", "auto")
    train(on_hub(world, tmp_path / "two-one", accumulation=2, **steps), resume="auto")
    assert_same_run(one, tmp_path / "one-two")
    assert_same_run(one, tmp_path / "two-one")
