"""A checkpoint is whole or not there, at whatever instant the process is killed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from mllm.training.run_folder import (
    checkpoint_path,
    delete_old,
    list_checkpoints,
    newest_checkpoint,
    read_checkpoint,
    remove_leftovers,
    run_lock,
    write_checkpoint,
)
from mllm.utils.files import WriteError
from mllm.utils.run_paths import BEST, MODEL_ASIDE
from mllm.utils.sealing import MANIFEST

FILES = {"weights": b"\x01" * 4000, "state.json": b"{}"}


def save(run: Path, step: int, facts: dict | None = None) -> Path:
    def write(folder: Path) -> None:
        for name, contents in FILES.items():
            (folder / name).write_bytes(contents + str(step).encode())

    return write_checkpoint(run, step, write, facts or {})


# Counts every call that changes the disk and kills a forked process at each of them, before or after it took effect.
KILLS = """
import os, sys
from pathlib import Path
from mllm.training import run_folder

def save(run, step):
    def write(folder):
        for name in ("state.json", "weights"):
            (folder / name).write_bytes(b"\\x01" * 4000 + str(step).encode())
    run_folder.write_checkpoint(run, step, write, {})

def count_calls(run, fatal, after):
    calls = 0
    def watch(owner, name):
        real = getattr(owner, name)
        def call(*args, **kwargs):
            nonlocal calls
            calls += 1
            if calls == fatal and not after:
                os._exit(9)
            number = calls
            try:
                return real(*args, **kwargs)
            finally:  # also behind a call that fails, as taking away what is not there does
                if number == fatal:
                    os._exit(9)
        setattr(owner, name, call)
    for owner, names in ((os, "fsync replace mkdir unlink rmdir"), (Path, "write_bytes write_text")):
        for name in names.split():
            watch(owner, name)
    save(run, 2)
    run_folder.delete_old(run, keep=1)
    return calls

call, after, killed = 1, False, True
while killed:
    run = Path(sys.argv[1]) / f"{call}-{after}"
    save(run, 1)
    if (child := os.fork()) == 0:
        count_calls(run, call, after)
        os._exit(0)
    killed = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    call, after = (call + 1, False) if after else (call, True)
"""


def test_a_kill_at_any_point_leaves_a_complete_checkpoint(tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-c", KILLS, str(tmp_path)], check=True, timeout=60)
    steps = []
    for run in tmp_path.iterdir():
        remove_leftovers(run)
        newest = newest_checkpoint(run)
        assert newest is not None, f"nothing is left in {run.name}"
        assert (newest.folder / "weights").read_bytes() == b"\x01" * 4000 + str(newest.step).encode()
        assert all(path.name.startswith("checkpoint-") for path in run.iterdir())
        steps.append(newest.step)
    assert len(steps) > 30
    assert set(steps) == {1, 2}


@pytest.mark.parametrize("damage", ["truncate", "flip", "missing", "manifest", "no manifest"])
def test_a_damaged_checkpoint_is_refused_by_name_and_the_older_one_taken(
    tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    save(tmp_path, 1)
    newest = save(tmp_path, 2)
    victim = newest / (MANIFEST if "manifest" in damage else "weights")
    contents = victim.read_bytes()
    if damage in ("truncate", "manifest"):
        victim.write_bytes(contents[: len(contents) // 2])
    elif damage == "flip":
        victim.write_bytes(bytes([contents[0] ^ 1]) + contents[1:])
    else:
        victim.unlink()
    with pytest.raises(ValueError, match=rf"checkpoint-00000002 is (damaged|incomplete): {victim.name}"):
        read_checkpoint(newest)
    whole = newest_checkpoint(tmp_path)
    assert whole is not None
    assert whole.step == 1
    assert victim.name in caplog.text


def test_facts_come_back_and_old_ones_go(tmp_path: Path) -> None:
    for step in (5, 10, 15):
        save(tmp_path, step, {"seed": step})
    delete_old(tmp_path, keep=2)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["checkpoint-00000010", "checkpoint-00000015"]
    newest = newest_checkpoint(tmp_path)
    assert newest is not None
    assert (newest.step, newest.facts) == (15, {"seed": 15})


def test_a_checkpoint_under_another_step_is_refused(tmp_path: Path) -> None:
    save(tmp_path, 1).rename(checkpoint_path(tmp_path, 7))
    with pytest.raises(ValueError, match="that of step 1"):
        read_checkpoint(checkpoint_path(tmp_path, 7))


def test_a_full_disk_leaves_the_older_checkpoint(tmp_path: Path) -> None:
    save(tmp_path, 1)

    def write(folder: Path) -> None:
        (folder / "weights").write_bytes(b"1")
        raise OSError(28, "No space left on device")

    with pytest.raises(
        WriteError, match=r"No space left on device; 1,000 bytes are needed and [\d,]+ are free.*00000002"
    ):
        write_checkpoint(tmp_path, 2, write, {}, num_bytes=1_000)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-00000001"]


def test_two_runs_in_one_folder(tmp_path: Path) -> None:
    with (
        run_lock(tmp_path),
        pytest.raises(ValueError, match=rf"is in use by process {os.getpid()} on "),
        run_lock(tmp_path),
    ):
        pass
    with run_lock(tmp_path):  # free again
        pass


def test_the_lock_of_a_killed_run_is_free(tmp_path: Path) -> None:
    code = (
        "import os, sys; from pathlib import Path; from mllm.training.run_folder import run_lock\n"
        "with run_lock(Path(sys.argv[1])): os.kill(os.getpid(), 9)"
    )
    killed = subprocess.run([sys.executable, "-c", code, str(tmp_path)], timeout=60)
    assert killed.returncode == -9
    with run_lock(tmp_path):
        assert str(os.getpid()) in (tmp_path / "run.lock").read_text()


# Holds a lock, forks a child that lives on as a worker does, and is killed once it has said the child's id.
ORPHAN = """
import os, sys, time
from pathlib import Path
from mllm.training.run_folder import run_lock
with run_lock(Path(sys.argv[1])):
    if (child := os.fork()) == 0:
        os.close(1)
        time.sleep(60)
    time.sleep(0.2)
    os.write(1, str(child).encode())
    os.kill(os.getpid(), 9)
"""


def test_a_worker_that_outlives_a_killed_run_does_not_keep_its_lock(tmp_path: Path) -> None:
    killed = subprocess.run([sys.executable, "-c", ORPHAN, str(tmp_path)], timeout=60, stdout=subprocess.PIPE)
    try:
        assert killed.returncode == -9
        os.kill(int(killed.stdout), 0)  # it lives
        with run_lock(tmp_path):
            pass
    finally:
        os.kill(int(killed.stdout), 9)


@pytest.mark.parametrize("home", [".", BEST])
def test_what_a_kill_left_of_a_model_is_removed(tmp_path: Path, home: str) -> None:
    (tmp_path / home / MODEL_ASIDE).mkdir(parents=True)
    (tmp_path / home / MODEL_ASIDE / "trainables.safetensors").write_bytes(b"half")
    remove_leftovers(tmp_path)
    assert list((tmp_path / home).iterdir()) == []


def test_the_manifest_is_plain_json(tmp_path: Path) -> None:
    manifest = json.loads((save(tmp_path, 3) / MANIFEST).read_text())
    assert manifest["step"] == 3
    assert {name: sealed["bytes"] for name, sealed in manifest["files"].items()} == {
        name: len(contents) + 1 for name, contents in FILES.items()
    }
