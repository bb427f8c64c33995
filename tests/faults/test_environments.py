"""A run trains and is answered from where people really are: other locales and homes, odd paths, missing packages."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

TESTS = Path(__file__).parent.parent
for _folder in (TESTS / "faults", TESTS / "training"):
    sys.path.insert(0, str(_folder))

from world import World  # noqa: E402

from mllm.config.run import config_yaml  # noqa: E402
from mllm.data.manifest import Message, Sample, Text, read_manifest, write_manifest  # noqa: E402

ALL_FAULTS = "ALL_FAULTS" in os.environ
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not ALL_FAULTS, reason="ten seconds each: run by make test-faults"),
]
OPTIONAL = ("torchaudio", "torchvision", "decord", "deepspeed", "tensorboard", "matplotlib", "mediapipe", "pyarrow")
# Trains as the command line does, then answers about a file of the run's data.
TRAIN = """
import multiprocessing, sys
if __name__ == "__main__":
    method, config, run, audio = sys.argv[1:]
    if method:
        multiprocessing.set_start_method(method)
    from mllm.cli import main
    assert main(["train", "--config", config]) == 0
    sys.exit(main(["generate", "--model", run, "--audio", audio, "--max_new_tokens", "2", "--use_cpu"]))
"""
ENVIRONMENTS = {
    "plain": {},
    "locale C": {"LC_ALL": "C", "LANG": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
    "locale of bytes": {
        "LC_ALL": "POSIX",
        "PYTHONUTF8": "0",
        "PYTHONCOERCECLOCALE": "0",
        "PYTHONIOENCODING": "latin-1",
    },
    "a home that cannot be written to": {"HOME": "/proc/home", "XDG_CACHE_HOME": "", "TMPDIR": "", "HF_HOME": ""},
    "no home": {"HOME": ""},
}


def trained(tmp_path: Path, *, method: str = "", folder: str = "world", **environment: str) -> str:
    """Train a run of three steps whose texts are not ASCII, and ask it; what both have said."""
    world = World.make(tmp_path / folder)
    samples = [
        Sample(f"é{number}", (*sample.messages[:-1], Message("assistant", (Text("größer 大"),))), sample.task)
        for number, sample in enumerate(read_manifest(world.folder / "train.jsonl", world.folder))
    ]
    write_manifest(world.folder / "train.jsonl", samples)
    config = world.config(world.folder / "run", workers=2, max_steps=3)
    (world.folder / "run.yaml").write_text(config_yaml(config), encoding="utf-8")
    (tmp_path / "train.py").write_text(TRAIN)
    paths = os.pathsep.join(filter(None, [environment.pop("PYTHONPATH", ""), str(TESTS.parent)]))
    values = {**os.environ, "OMP_NUM_THREADS": "1", **environment, "PYTHONPATH": paths}
    words = [method, world.folder / "run.yaml", world.folder / "run", world.folder / "media" / "0.wav"]
    done = subprocess.run(
        [sys.executable, str(tmp_path / "train.py"), *map(str, words)],
        env={key: value for key, value in values.items() if value},
        cwd=tmp_path,
        capture_output=True,
        timeout=900,  # four processes that import everything, beside others
    )
    said = (done.stdout + done.stderr).decode("utf-8", "replace")
    assert done.returncode == 0, said[-3000:]
    assert "soft tokens: audio" in said
    return said


@pytest.mark.parametrize("name", ENVIRONMENTS)
def test_other_locales_and_homes(tmp_path: Path, name: str) -> None:
    trained(tmp_path, **ENVIRONMENTS[name])


@pytest.mark.parametrize("folder", ["two words/of a path", "größe 大 ñ", "#1 [a]{b}%20'c'", "-dash"])
def test_paths_that_people_have(tmp_path: Path, folder: str) -> None:
    trained(tmp_path, folder=folder)


@pytest.mark.parametrize("method", ["spawn", "fork", "forkserver"])
def test_every_way_to_start_workers(tmp_path: Path, method: str) -> None:
    trained(tmp_path, method=method)


@pytest.mark.parametrize("error", ["ModuleNotFoundError('no', name=__name__)", "OSError('lib.so: not found')"])
def test_optional_packages_that_are_missing_or_broken(tmp_path: Path, error: str) -> None:
    for name in OPTIONAL:
        (tmp_path / "packages" / name).mkdir(parents=True)
        (tmp_path / "packages" / name / "__init__.py").write_text(f"raise {error}")
    trained(tmp_path, PYTHONPATH=str(tmp_path / "packages"))


def test_a_lock_that_a_killed_compiler_has_left_stops_no_run_of_deepspeed(tmp_path: Path) -> None:
    """It compiles for a minute or more, as the first run of a machine does."""
    lock = tmp_path / "extensions" / "deepspeed_shm_comm" / "lock"
    lock.parent.mkdir(parents=True)
    lock.touch()
    os.utime(lock, (time.time() - 3_600,) * 2)
    code = "from mllm.utils.distributed import prepare_launch; prepare_launch(use_cpu=True, deepspeed=True)"
    environment = {
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "29611",
    }
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **environment, "TORCH_EXTENSIONS_DIR": str(tmp_path / "extensions")},
        cwd=TESTS.parent,
        capture_output=True,
        text=True,
        timeout=1_800,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert f"{lock} was left by a process that was ended while it compiled" in done.stderr
    assert not lock.exists()
