"""Faults of every kind, a few tries each; `make test-faults` tries them by the thousand and writes the table."""

import json
import os
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest

from mllm.utils import fail_points
from mllm.utils.fail_points import ACTIONS, FAIL_POINTS, InjectedError, arm, fail_point

FOLDER = Path(__file__).parent
PACKAGE = FOLDER.parent.parent / "mllm"
ROWS = (
    *("kills at places", "kills at random", "kills in evaluation", "kills in features", "kills in import"),
    *("full disks", "small disks", "signals", "damaged files", "damaged media", "hostile checkpoints"),
)


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, object]]:
    """What a process that forks for every try has found."""
    out = tmp_path_factory.mktemp("faults") / "outcomes.json"
    command = [sys.executable, str(FOLDER / "table.py"), "--tier", "fast", "--out", str(out)]
    done = subprocess.run(
        command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=900, check=False
    )
    assert out.exists(), done.stderr[-4000:]
    outcomes = json.loads(out.read_text())
    assert set(outcomes) == set(ROWS)
    return outcomes


@pytest.mark.slow
@pytest.mark.parametrize("row", ROWS)
def test_what_is_promised_holds(outcomes: dict[str, dict[str, object]], row: str) -> None:
    outcome = outcomes[row]
    if outcome["skipped"]:
        pytest.skip(str(outcome["skipped"]))
    assert outcome["tries"]
    assert outcome["held"] == outcome["tries"], outcome["failures"]


@pytest.mark.slow
def test_a_row_of_tests_that_are_not_there_does_not_hold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("", "training", "media", "data", "lip_crops", "faults"):
        monkeypatch.syspath_prepend(FOLDER.parent / name)
    from ground import Ground
    from rows import cases_of

    ground, rng = Ground(tmp_path), random.Random(0)
    there = cases_of("tests/media/test_media_paths.py")(ground, 0, rng)
    assert there.held == there.tries > 20
    gone = cases_of("tests/media/no_such_tests.py")(ground, 0, rng)
    assert (gone.tries, gone.held) == (1, 0)
    assert "pytest ended with 4" in gone.failures[0]


def test_every_fail_point_stands_in_the_code_once() -> None:
    named = [
        name for file in PACKAGE.rglob("*.py") for name in re.findall(r'fail_point\("([\w.]+)"\)', file.read_text())
    ]
    assert sorted(named) == sorted(FAIL_POINTS)


def test_a_place_fails_at_the_time_that_is_named_and_no_other() -> None:
    fail_point("decode")  # not armed
    arm("decode:raise@2")
    try:
        fail_point("collate")
        fail_point("decode")
        with pytest.raises(InjectedError, match="injected at decode"):
            fail_point("decode")
        fail_point("decode")
        for wrong in ("nowhere:kill", "decode:explode", "decode:kill@x"):
            with pytest.raises(ValueError, match=f"{fail_points.VARIABLE} is '{wrong}'; it must be NAME:ACTION@N"):
                arm(wrong)
        assert set(ACTIONS) >= {"kill", "raise", "full"}
    finally:
        arm("")
