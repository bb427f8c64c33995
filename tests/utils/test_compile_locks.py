"""What a killed compiler has left holds nobody up; what a living one holds is waited for, with a word."""

import logging
import os
import time
from pathlib import Path

import pytest
from torch.utils.cpp_extension import _get_build_directory

from mllm.utils.compile_locks import COMPILING_SECONDS, free_locks, stale_locks

NAME = "deepspeed_shm_comm"


@pytest.fixture(params=["told", "usual"])
def lock(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A lock where torch itself would look for it, beside an older object file."""
    monkeypatch.delenv("TORCH_EXTENSIONS_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    if request.param == "told":
        monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "extensions"))
    lock = Path(_get_build_directory(NAME, verbose=False)) / "lock"
    lock.parent.mkdir(parents=True, exist_ok=True)
    for name in ("shm.o", "lock"):
        (lock.parent / name).touch()
        _make_old(lock.parent / name)
    return lock


def _make_old(path: Path) -> None:
    before = time.time() - COMPILING_SECONDS - 5
    os.utime(path, (before, before))


def test_a_lock_that_was_left_is_removed(lock: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert list(stale_locks()) == [lock]
    free_locks("another")
    assert lock.exists()
    free_locks(NAME)
    assert not lock.exists()
    assert f"{lock} was left by a process that was ended while it compiled" in caplog.text


@pytest.mark.parametrize("name", ["lock", "shm.o"])
def test_a_lock_beside_which_something_happens_is_left_and_named(
    lock: Path, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    (lock.parent / name).touch()
    caplog.set_level(logging.WARNING)
    assert not list(stale_locks())
    free_locks(NAME)
    assert lock.exists()
    assert f"{lock}: another process compiles" in caplog.text
