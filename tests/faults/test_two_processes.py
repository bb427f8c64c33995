"""Two processes that one fault befalls: a signal to one of them, a gradient of one, one that is stuck."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from mllm.config.run import config_yaml
from mllm.training.run_folder import list_checkpoints, newest_checkpoint

TESTS = Path(__file__).parent.parent
CONFIGS = TESTS.parent / "configs"
LAUNCH = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
for _folder in (TESTS / "faults", TESTS / "training"):
    sys.path.insert(0, str(_folder))

from world import World  # noqa: E402

pytestmark = pytest.mark.slow
ALL_FAULTS = "ALL_FAULTS" in os.environ
in_full_runs = pytest.mark.skipif(not ALL_FAULTS, reason="a minute each: run by make test-faults")


def environment() -> dict[str, str]:
    paths = (TESTS.parent, TESTS, TESTS / "training", TESTS / "faults")
    binaries = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(map(str, paths)), "PATH": binaries}


@pytest.mark.parametrize("stage", [pytest.param(None, marks=in_full_runs), 2, pytest.param(3, marks=in_full_runs)])
def test_a_gradient_that_is_no_number_stops_both_in_the_step_it_comes_in(
    tmp_path: Path, stage: int | None, record_property: Callable[[str, object], None]
) -> None:
    """Eight cases each, two in CI; DeepSpeed alone would leave out every such step, and train on without a word."""
    num_cases = 8 if ALL_FAULTS else 2
    record_property("tries", num_cases)
    more = [] if stage is None else ["--deepspeed", str(CONFIGS / f"zero{stage}.json")]
    done = subprocess.run(
        [*LAUNCH, str(TESTS / "faults" / "nan_worker.py"), str(tmp_path), str(num_cases), *more],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    for rank in range(2):
        told = json.loads((tmp_path / f"told-{rank}.json").read_text())
        assert len(told) == num_cases
        for case in told:
            step = case["case"][2]
            assert f"the gradient of step {step} is not finite" in case["message"], case
            assert case["at"] == step - 1, case
            assert case["saved"] == list(range(1, step)), case


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World.make(tmp_path_factory.mktemp("two"))


@contextmanager
def two_processes(world: World, folder: Path, **train: object) -> Iterator[tuple[subprocess.Popen[str], list[int]]]:
    """A run that would take hours, behind its third step; its launcher, and its processes by rank."""
    config = world.config(folder / "run", max_steps=10**6, save_every=None, **train)
    (folder / "run.yaml").write_text(config_yaml(config))
    words = ["-m", "mllm", "train", "--config", str(folder / "run.yaml")]
    with open(folder / "said", "w") as said:
        launcher = subprocess.Popen([*LAUNCH, *words], env=environment(), stdout=said, stderr=said, text=True)
    try:
        log, until = folder / "run" / "log.jsonl", time.monotonic() + 240
        while launcher.poll() is None and not (log.exists() and len(log.read_text().splitlines()) > 2):
            assert time.monotonic() < until, (folder / "said").read_text()[-3000:]
            time.sleep(0.1)
        assert launcher.poll() is None, (folder / "said").read_text()[-3000:]
        ranks = {int(child.environ()["RANK"]): child.pid for child in psutil.Process(launcher.pid).children()}
        yield launcher, [ranks[0], ranks[1]]
    finally:
        for process in [*psutil.Process(launcher.pid).children(recursive=True)] if launcher.poll() is None else []:
            process.kill()
        launcher.kill()
        launcher.wait()


@pytest.mark.parametrize("deepspeed", [None, pytest.param(str(CONFIGS / "zero2.json"), marks=in_full_runs)])
def test_a_signal_to_one_of_them_saves_one_step_of_both(world: World, tmp_path: Path, deepspeed: str | None) -> None:
    with two_processes(world, tmp_path, deepspeed=deepspeed) as (launcher, ranks):
        os.kill(ranks[1], signal.SIGUSR1)
        launcher.wait(120)
    said = (tmp_path / "said").read_text()
    assert "interrupted by SIGUSR1; saved: " in said, said[-3000:]
    assert "--resume auto" in said
    codes = re.findall(r"exitcode\s*:\s*(-?\d+)", said)
    assert codes
    assert set(codes) == {str(128 + signal.SIGUSR1)}, said[-3000:]
    newest = newest_checkpoint(tmp_path / "run")
    assert newest is not None
    assert newest.facts["processes"] == 2
    steps = [json.loads(line)["step"] for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert newest.step == steps[-1]
    assert len(list_checkpoints(tmp_path / "run")) == 1


@in_full_runs
def test_one_that_is_stuck_ends_both_and_what_the_other_waits_for_is_told(world: World, tmp_path: Path) -> None:
    with two_processes(world, tmp_path, watchdog_minutes=0.1) as (launcher, ranks):
        os.kill(ranks[1], signal.SIGSTOP)
        try:
            launcher.wait(120)
        finally:
            if psutil.pid_exists(ranks[1]):
                os.kill(ranks[1], signal.SIGKILL)
    said = (tmp_path / "said").read_text()
    assert re.search(r"process 0 has not moved for [67] seconds \(train.watchdog_minutes\): ", said), said[-3000:]
    assert "samples s" in said or "waiting for the batches of step" in said
    assert "training_step" in said or "_get_num_items_in_batch" in said
    assert re.search(r"exitcode\s*:\s*3", said)
