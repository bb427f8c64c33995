"""The benchmarks run, find that their ways are equal, and hand on outcomes that one table can show.

The slow test is there because a benchmark that nobody runs breaks with the next renaming.
"""

import os
import subprocess
import sys
from pathlib import Path

import all_goals
import outcomes
import pytest
from outcomes import Outcome
from rich.console import Console

LEAST: dict[str, list[str]] = {
    "grouped_questions": ["--questions", "2", "--new-tokens", "2"],
    "beam_decoding": ["--beams", "3", "--new-tokens", "4"],
    "budget_sweep": ["--new-tokens", "4"],
    "long_audio": ["--recordings", "30", "--new-tokens", "2"],
    "host_budgets": ["--side", "112", "--new-tokens", "2"],
    "merged_adapter": ["--new-tokens", "4"],
    "rank_balance": ["--samples", "500"],
    "task_sweep": ["--beams", "3", "--new-tokens", "4"],
    "serving": ["--requests", "8", "--clients", "1", "4"],
}
"""Smaller sizes of what would take minutes."""

MET = Outcome("a step", "the loop", 1.64, "equal", low=1.6, high=1.7, predicted=1.7, goal=1.6)
MISSED = Outcome("eight ranks", "random dealing: 1.550", 1.218, "every token once", goal=1.05, at_most=True)


@pytest.mark.slow
@pytest.mark.parametrize("name", all_goals.benchmarks())
def test_a_benchmark_runs_and_hands_on_outcomes(name: str, tmp_path: Path) -> None:
    results = tmp_path / "results.jsonl"
    command = [*all_goals.command_of(name, results, 2), *LEAST.get(name, [])]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-4000:]
    goals = outcomes.read(results)
    assert goals
    for goal in goals:
        assert goal.what
        assert goal.against
        assert goal.check
        assert goal.ratio > 0
        assert goal.low is None or goal.high is None or 0 < goal.low <= goal.high
        assert goal.predicted is None or goal.predicted > 0
        assert goal.verdict in (("met", "missed") if goal.goal else ("",))


def test_every_file_of_the_folder_is_a_benchmark_or_known_as_a_part() -> None:
    parts = {"all_goals", "checkouts", "outcomes", "side_by_side", "turns", *all_goals.ALONE}
    assert {path.stem for path in all_goals.FOLDER.glob("*.py")} == parts | set(all_goals.benchmarks())


def test_benchmarks_measure_this_tree_and_not_what_is_installed(tmp_path: Path) -> None:
    installed = tmp_path / "mllm"
    installed.mkdir()
    (installed / "__init__.py").write_text("raise SystemExit('this is the one that is installed')\n")
    command = [sys.executable, str(all_goals.FOLDER / "all_goals.py"), "--help"]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    run = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr


def test_one_table_holds_goals_from_below_and_from_above(tmp_path: Path) -> None:
    path = tmp_path / "goals.jsonl"
    assert outcomes.read(path) == []
    outcomes.append([MET], path)
    outcomes.append([MISSED], path)
    outcomes.append([MISSED], None)
    assert outcomes.read(path) == [MET, MISSED]
    assert outcomes.markdown_of([MET, MISSED]).splitlines()[2:] == [
        "| a step | the loop | 1.64x | 1.60-1.70 | 1.70x | equal | >= 1.60x | met |",
        "| eight ranks | random dealing: 1.550 | 1.218 | counted | - | every token once | <= 1.05 | missed |",
    ]
    console = Console(width=200, record=True, quiet=True)
    console.print(outcomes.table_of([MET, MISSED]))


def test_a_goal_is_met_on_its_side_and_exactly() -> None:
    def verdict(ratio: float, goal: float | None, *, at_most: bool = False) -> str:
        return Outcome("a", "b", ratio, "equal", goal=goal, at_most=at_most).verdict

    assert [verdict(one, 2.0) for one in (1.99, 2.0, 2.01)] == ["missed", "met", "met"]
    assert [verdict(one, 1.05, at_most=True) for one in (1.04, 1.05, 1.06)] == ["met", "met", "missed"]
    assert verdict(5.0, None) == ""


def test_the_ratio_of_times_is_that_of_medians() -> None:
    outcome = outcomes.timed("a", "b", [2.0, 4.0, 9.0], [1.0, 2.0, 3.0], check="equal", goal=2.0)
    assert (outcome.ratio, outcome.low, outcome.high, outcome.verdict) == (2.0, 2.0, 2.5, "met")


def test_a_failing_benchmark_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "broken.py").write_text("raise SystemExit('FAILED: they differ')\n")
    (tmp_path / "sound.py").write_text("pass\n")
    monkeypatch.setattr(all_goals, "FOLDER", tmp_path)
    console = Console(quiet=True)
    assert all_goals.run_all(["broken", "sound"], tmp_path, None, console) == ["broken"]
    assert "they differ" in (tmp_path / "broken.txt").read_text()
