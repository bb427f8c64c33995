"""A signal in a training: the step is finished and saved, what to type is told, and typing it goes on."""

import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import tiny
from harness import log_rows, make_trainer, run_settings
from safetensors.torch import load_file
from transformers import TrainerCallback

from mllm.cli import main
from mllm.config.run import DataConfig, RunConfig, TrainConfig, config_yaml
from mllm.data.manifest import Media, Message, Sample, Text, write_manifest
from mllm.training.interruption import STOPPING, RunInterrupted, StopRequest, how_to_go_on, stopping_on_signals
from mllm.training.run_folder import list_checkpoints, read_checkpoint
from mllm.training.trainer import SLOWEST_BYTES_PER_SECOND
from mllm.utils.activity import current_activity


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


@pytest.mark.slow
def test_an_interrupted_run_saves_its_step_and_the_line_it_tells_goes_on(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The signal goes to the workers too, as a scheduler and a terminal send it, and these go on to serve the step."""
    process = started(["train", "--config", str(config)], tmp_path)
    log = tmp_path / "a run" / "log.jsonl"
    until = time.monotonic() + 500
    while time.monotonic() < until and process.poll() is None and not (log.exists() and len(log_rows(log.parent)) > 2):
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGTERM)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 128 + signal.SIGTERM, said
    assert "Traceback" not in said
    assert "interrupted by SIGTERM; saved: " in said
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


class SendAtStep(TrainerCallback):
    """Sends this process a signal in the middle of a step."""

    def __init__(self, step: int, *numbers: int) -> None:
        self.step, self.numbers = step, numbers

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        for number in self.numbers if state.global_step + 1 == self.step else ():
            os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", STOPPING, ids=lambda number: signal.Signals(number).name)
def test_every_signal_that_ends_a_run_saves_the_step_it_comes_in(tmp_path: Path, number: int) -> None:
    """Twice within a second is once: a launcher hands on what the terminal has sent already."""
    trainer = make_trainer(run_settings(tmp_path, tiny.settings(("audio",)), max_steps=9), kinds=[("audio",)])
    trainer.add_callback(SendAtStep(3, number, number))
    trainer.stop.request.is_training = True
    before = signal.signal(number, signal.SIG_DFL)  # tests that run in the background are told to ignore some
    try:
        with stopping_on_signals(trainer.stop.request):
            trainer.train()
        assert signal.getsignal(number) is signal.SIG_DFL
    finally:
        signal.signal(number, before)
    assert trainer.stop.request.agreed_number == number
    assert [read_checkpoint(folder).step for folder in list_checkpoints(tmp_path)] == [3]
    assert RunInterrupted(number).exit_status == 128 + number


def test_no_more_than_the_minutes_that_are_set_are_lost(tmp_path: Path) -> None:
    settings = run_settings(tmp_path, tiny.settings(("audio",)), max_steps=3, save_minutes=1e-9, keep_checkpoints=9)
    make_trainer(settings, kinds=[("audio",)]).train()
    assert [read_checkpoint(folder).step for folder in list_checkpoints(tmp_path)] == [1, 2, 3]
    with pytest.raises(ValueError, match=r"train.save_minutes is 0.0; it must be above 0, or null"):
        run_settings(tmp_path, tiny.settings(("audio",)), save_minutes=0.0)


def test_a_signal_before_the_first_step_ends_the_process(tmp_path: Path) -> None:
    with (
        pytest.raises(RunInterrupted, match="interrupted by SIGTERM"),
        stopping_on_signals(StopRequest()),
    ):
        os.kill(os.getpid(), signal.SIGTERM)


def test_what_a_parent_has_told_to_ignore_stays_ignored() -> None:
    """nohup does so with SIGHUP."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with stopping_on_signals(request := StopRequest()):
            os.kill(os.getpid(), signal.SIGHUP)
        assert request.number == 0
    finally:
        signal.signal(signal.SIGHUP, before)


# Two requests that are more than a second apart, while the step that is to be finished hangs.
HANGS = """
import os, signal, time
from mllm.training.interruption import StopRequest, stopping_on_signals
request = StopRequest()
request.is_training = True
with stopping_on_signals(request):
    os.kill(os.getpid(), signal.SIGUSR1)
    time.sleep(1.2)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(60)
"""


@pytest.mark.slow
def test_a_second_signal_ends_a_run_at_once() -> None:
    done = subprocess.run([sys.executable, "-c", HANGS], capture_output=True, text=True, timeout=200)
    assert done.returncode == 128 + signal.SIGTERM, done.stderr
    assert "SIGTERM again: ending at once" in done.stderr


def test_nothing_is_promised_where_nothing_was_saved(tmp_path: Path) -> None:
    assert how_to_go_on(tmp_path, tmp_path / "settings.yaml") == (
        f"interrupted; {tmp_path} holds no checkpoint yet, so nothing is lost by starting anew"
    )


class ActivityAtSave(TrainerCallback):
    """Keeps what a training said of its save, which has just ended."""

    def on_save(self, *args: Any, **kwargs: Any) -> None:
        self.activity = current_activity()


def test_a_save_may_take_as_long_as_its_bytes_do(tmp_path: Path) -> None:
    trainer = make_trainer(run_settings(tmp_path, tiny.settings(("audio",)), max_steps=1), kinds=[("audio",)])
    trainer.add_callback(callback := ActivityAtSave())
    trainer.train()
    (checkpoint,) = list_checkpoints(tmp_path)
    states = [load_file(file) for file in checkpoint.glob("*.safetensors")]
    num_bytes = sum(tensor.nbytes for state in states for tensor in state.values())
    assert callback.activity.what == "saving the checkpoint of step 1"
    assert callback.activity.extra_seconds == num_bytes / SLOWEST_BYTES_PER_SECOND > 0
