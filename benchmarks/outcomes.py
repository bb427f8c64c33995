"""Hands on what benchmarks measured beside their goals, as lines of JSON, and shows all in one table."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.table import Table
from turns import middle_half, ratio_of

from mllm.utils.markdown import markdown_table

COLUMNS = ("what", "against", "ratio", "middle half", "FLOP model", "check", "goal", "")


@dataclass(frozen=True)
class Outcome:
    """One ratio, of two ways that were checked to give the same.

    `low` and `high` are the middle half of the ratios of single turns; what is counted, not timed, has none.
    `predicted` is the ratio of FLOPs. With `at_most` the goal is an upper limit and the ratio one of a load to its
    mean; else it is how many times less time or memory was used than by what it is against.
    """

    what: str
    against: str
    ratio: float
    check: str
    low: float | None = None
    high: float | None = None
    predicted: float | None = None
    goal: float | None = None
    at_most: bool = False

    @property
    def verdict(self) -> str:
        """Whether the goal is met; empty where there is none."""
        if self.goal is None:
            return ""
        return "met" if (self.ratio <= self.goal if self.at_most else self.ratio >= self.goal) else "missed"

    def cells(self) -> list[str]:
        """List what stands in each of `COLUMNS`."""
        half = "counted" if self.low is None or self.high is None else f"{self.low:.2f}-{self.high:.2f}"
        # Loads are compared to a limit that is a few hundredths from an even one.
        ratio = f"{self.ratio:.3f}" if self.at_most else f"{self.ratio:.2f}x"
        flops = "-" if self.predicted is None else f"{self.predicted:.2f}x"
        goal = goal_text(self.goal, self.at_most)
        return [self.what, self.against, ratio, half, flops, self.check, goal, self.verdict]


def goal_text(goal: float | None, at_most: bool = False) -> str:
    """Write a goal as tables show it."""
    if goal is None:
        return "-"
    return f"<= {goal:.2f}" if at_most else f">= {goal:.2f}x"


def timed(
    what: str,
    against: str,
    slow: Sequence[float],
    fast: Sequence[float],
    *,
    check: str,
    predicted: float | None = None,
    goal: float | None = None,
) -> Outcome:
    """Make the outcome of two ways that were timed in turns."""
    low, _, high = middle_half([a / b for a, b in zip(slow, fast, strict=True)])
    return Outcome(what, against, ratio_of(slow, fast), check, low, high, predicted, goal)


def in_float32(check: str, dtype: str) -> str:
    """Word a check that other dtypes are not held to."""
    return check if dtype == "float32" else f"none in {dtype}"


def append(outcomes: Sequence[Outcome], path: Path | None) -> None:
    """Hand outcomes on, where a file was named."""
    if path is None:
        return
    with path.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(asdict(outcome)) + "\n" for outcome in outcomes)


def read(path: Path) -> list[Outcome]:
    """Read what benchmarks appended; an empty list when none has."""
    if not path.exists():
        return []
    return [Outcome(**json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()]


def table_of(outcomes: Sequence[Outcome]) -> Table:
    """Tabulate all outcomes for the terminal."""
    table = Table(title="goals", title_justify="left")
    for name in COLUMNS:
        table.add_column(name, justify="right" if name in ("ratio", "middle half", "FLOP model", "goal") else "left")
    for outcome in outcomes:
        table.add_row(*outcome.cells())
    return table


def markdown_of(outcomes: Sequence[Outcome]) -> str:
    """Tabulate all outcomes for a Markdown page."""
    return markdown_table(COLUMNS, [outcome.cells() for outcome in outcomes], of_numbers=False) + "\n"
