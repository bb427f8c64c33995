"""What is refused before processes could train apart."""

import sys
from pathlib import Path

import pytest

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


def test_fsdp_is_refused_before_a_shard_is_saved_as_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ValueError, match=r"asks for FSDP .* take ZeRO-3: .*configs/accelerate_zero3.yaml"):
        distributed.prepare_launch(use_cpu=True, deepspeed=False)


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
