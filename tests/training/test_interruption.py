"""Ctrl-C in a training: the step is finished and saved, what to type is told, and typing it goes on."""

import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny
from harness import log_rows

from mllm.cli import main
from mllm.config.run import DataConfig, RunConfig, TrainConfig, config_yaml
from mllm.data.manifest import Media, Message, Sample, Text, write_manifest
from mllm.training.interruption import how_to_go_on
from mllm.training.run_folder import list_checkpoints, read_checkpoint


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that would take hours, with workers that decode."""
    made = tmp_path_factory.mktemp("interrupted")
    names = tiny.write_media(made)
    parts = (Media("audio", names["audio"]), Text("what?"))
    messages = (Message("user", parts), Message("assistant", (Text("place blue"),)))
    write_manifest(made / "train.jsonl", [Sample(f"s{n}", messages, "asr") for n in range(8)])
    config = RunConfig(
        model=tiny.settings_on(tiny.write_parts(made / "parts"), ["audio"]),
        data=DataConfig(train=[str(made / "train.jsonl")], num_workers=2, max_rows=4),
        train=TrainConfig(out="a run", max_steps=10**6, use_cpu=True, log_every=1, tensorboard=False),
    )
    (made / "run.yaml").write_text(config_yaml(config))
    return made / "run.yaml"


def started(words: list[str], folder: Path) -> subprocess.Popen[str]:
    """A command of its own process group, as a terminal starts it."""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", "mllm", *words],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def test_an_interrupted_run_saves_its_step_and_the_line_it_tells_goes_on(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    process = started(["train", "--config", str(config)], tmp_path)
    log = tmp_path / "a run" / "log.jsonl"
    until = time.monotonic() + 240
    while time.monotonic() < until and process.poll() is None and not (log.exists() and len(log_rows(log.parent)) > 2):
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGINT)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 130, said
    assert "Traceback" not in said
    (checkpoint,) = list_checkpoints(tmp_path / "a run")
    step = read_checkpoint(checkpoint).step
    assert step > 2
    assert f"saved: a run/{checkpoint.name}" in said
    line = re.search(r"go on with: mllm (.*)", said)
    assert line is not None
    monkeypatch.chdir(tmp_path)
    assert main([*shlex.split(line[1]), "--train.max_steps", str(step + 2)]) == 0
    rows = [row for row in log_rows(tmp_path / "a run") if "loss" in row]
    assert [row["step"] for row in rows] == list(range(1, step + 3))
    assert (tmp_path / "a run" / "trainables.safetensors").is_file()


def test_nothing_is_promised_where_nothing_was_saved(tmp_path: Path) -> None:
    assert how_to_go_on(tmp_path, tmp_path / "settings.yaml") == (
        f"interrupted; {tmp_path} holds no checkpoint yet, so nothing is lost by starting anew"
    )
