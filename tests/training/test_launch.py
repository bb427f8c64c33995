"""What is refused before processes could train apart."""

import dataclasses
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny

from mllm.config.model import Nf4Config
from mllm.config.run import DataConfig, RunConfig, TrainConfig
from mllm.training.arguments import check_fsdp2
from mllm.utils import distributed


def test_processes_that_do_not_find_each_other_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match=r"started 2 processes \(WORLD_SIZE\), but accelerate sees 1"):
        distributed.check_process_count(1)
    distributed.check_process_count(2)
    monkeypatch.setenv("WORLD_SIZE", "two")
    with pytest.raises(ValueError, match="WORLD_SIZE is 'two'; it must be a number of processes"):
        distributed.check_process_count(1)
    monkeypatch.delenv("WORLD_SIZE")
    distributed.check_process_count(1)


def test_fsdp2_is_taken_over_once_and_everything_it_does_not_do_is_refused_by_name(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert not distributed.take_fsdp2()
    # What accelerate sets for fsdp_version: 2 and defaults elsewhere.
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ValueError, match=r"asks for FSDP1, .* take FSDP2: .*configs/accelerate_fsdp2.yaml"):
        distributed.take_fsdp2()
    monkeypatch.setenv("FSDP_VERSION", "2")
    for variable, value in {
        "FSDP_OFFLOAD_PARAMS": "true",
        "FSDP_ACTIVATION_CHECKPOINTING": "true",
        "FSDP_RESHARD_AFTER_FORWARD": "false",
        "FSDP_AUTO_WRAP_POLICY": "SIZE_BASED_WRAP",
    }.items():
        monkeypatch.setenv(variable, value)
        with pytest.raises(ValueError, match=f"the launcher's config has {variable.lower()}: {value}; "):
            distributed.take_fsdp2()
        monkeypatch.delenv(variable)
    assert distributed.take_fsdp2()
    assert not distributed.take_fsdp2()


def test_fsdp_is_refused_where_nothing_trains(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ValueError, match=r"asks for FSDP .*, which only training knows"):
        distributed.prepare_launch(use_cpu=True, deepspeed=False)


@pytest.mark.parametrize(
    ("num_processes", "changes", "message"),
    [
        ("1", {}, "shards the LLM over processes, but started only one"),
        ("2", {"train": {"deepspeed": "zero.json"}}, "train.deepspeed does not go with FSDP2"),
        ("2", {"model": {"quantization": Nf4Config()}}, "model.quantization does not go with FSDP2"),
        (
            "2",
            {"train": {"parts": ["compressors", "llm"]}, "model": {"adapter": None}},
            "train.parts with llm does not",
        ),
        ("2", {"train": {"memory": "low"}}, "train.memory low does not go with FSDP2"),
    ],
)
def test_what_does_not_go_with_fsdp2_is_refused_before_anything_is_loaded(
    monkeypatch: pytest.MonkeyPatch, num_processes: str, changes: dict[str, dict[str, Any]], message: str
) -> None:
    monkeypatch.setenv("WORLD_SIZE", num_processes)
    model = dataclasses.replace(tiny.settings(("image",)), **changes.get("model", {}))
    train = TrainConfig(out="run", max_steps=1, **changes.get("train", {}))
    with pytest.raises(ValueError, match=message):
        check_fsdp2(RunConfig(model=model, data=DataConfig(train=["none.jsonl"]), train=train))


def test_deepspeed_needs_ninja_and_a_compiler_on_a_cpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(distributed.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"not installed: pip install -e '\.\[deepspeed\]'"):
        distributed.check_deepspeed(on_cpu=False)
    monkeypatch.undo()

    monkeypatch.setattr(distributed.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    distributed.check_deepspeed(on_cpu=False)  # there nothing is compiled
    monkeypatch.setattr(sys, "executable", str(tmp_path / "env" / "python"))
    with pytest.raises(ValueError, match="needs the program ninja on PATH: pip install ninja"):
        distributed.check_deepspeed(on_cpu=True)

    (tmp_path / "env").mkdir()
    for name in ("env/ninja", "g++"):
        (tmp_path / name).write_text("#!/bin/sh\n")
        (tmp_path / name).chmod(0o755)
    (tmp_path / "g++").chmod(0o644)
    with pytest.raises(ValueError, match=r"needs a C\+\+ compiler, such as g\+\+, on PATH"):
        distributed.check_deepspeed(on_cpu=True)
    (tmp_path / "g++").chmod(0o755)
    distributed.check_deepspeed(on_cpu=True)
    assert distributed.shutil.which("ninja") == str(tmp_path / "env" / "ninja")
