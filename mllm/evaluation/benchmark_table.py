"""The table of the vision papers: budgets in rows with their soft tokens, a column per benchmark, their average.

    | budget    | soft tokens | VQAv2 | GQA  | POPE (F1) | MME-P  | MME-C | avg  |

Knows rows of results. Does not know folders, models or plots.

MME is told in points (2000 and 800 at most), everything else in percent; the average takes MME as its share of those
points, as MQT-LLaVA does, and is told only where every column has a number.
"""

from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from mllm.evaluation.scorers import registry
from mllm.evaluation.scorers.registry import BENCHMARKS

Row = Mapping[str, Any]
UNTRAINED, FAILED, SERVER = "*", "†", "server"
NOTES = {
    UNTRAINED: "a budget that was not trained",
    FAILED: "some questions could not be answered and are counted as wrong; they are named below",
    SERVER: "answers nobody here knows; what is to be handed in lies in `submissions`",
}


@dataclass(frozen=True)
class Column:
    """One number of one set: its title, its key in a row of results, and what a perfect model gets."""

    title: str
    set_name: str
    task: str
    key: str
    full: float
    in_average: bool

    def value(self, row: Row) -> float | None:
        """The number as printed: percent, or points."""
        value = row.get(self.key)
        return None if value is None else 100 * value

    def share(self, row: Row) -> float | None:
        """The number as a share of what a perfect model gets."""
        value = row.get(self.key)
        return None if value is None else value / self.full


@dataclass
class BudgetRow:
    """What was found at one budget: rows of results by column."""

    budget: str
    found: dict[Column, Row] = field(default_factory=dict)

    @property
    def tokens(self) -> list[float]:
        """Mean soft tokens per question of each set, the least and the most."""
        means = [row["soft_tokens"] for row in self.found.values() if row["soft_tokens"] is not None]
        return [min(means), max(means)] if means else []

    def average(self, columns: Sequence[Column]) -> float | None:
        """Percent, of columns in the average; None where one has no number or there are fewer than two."""
        own = [column for column in columns if column.in_average]
        shares = [column.share(self.found[column]) if column in self.found else None for column in own]
        known = [share for share in shares if share is not None]
        return 100 * sum(known) / len(known) if len(known) == len(own) > 1 else None


@dataclass
class BenchmarkTable:
    """Columns in the order of the sets, rows from the dearest budget to the cheapest."""

    columns: list[Column]
    rows: list[BudgetRow]

    @property
    def titles(self) -> list[str]:
        """The first line of the table."""
        return ["budget", "soft tokens", *(column.title for column in self.columns), "avg"]

    @property
    def cells(self) -> list[list[str]]:
        """Everything below it."""
        return [self._cells_of(row) for row in self.rows]

    @property
    def notes(self) -> list[str]:
        """What the marks of these cells mean."""
        text = " ".join(cell for line in self.cells for cell in line)
        return [f"{mark}: {words}" for mark, words in NOTES.items() if mark in text]

    def _cells_of(self, row: BudgetRow) -> list[str]:
        trained = all(one["is_trained"] for one in row.found.values())
        tokens = " - ".join(dict.fromkeys(f"{mean:.4g}" for mean in row.tokens)) or "-"
        cells = [_cell(column, row.found.get(column)) for column in self.columns]
        average = row.average(self.columns)
        name = (row.budget or "max") + ("" if trained else UNTRAINED)
        return [name, tokens, *cells, "-" if average is None else f"{average:.1f}"]


def overall_rows(rows: Sequence[Row], tasks: Container[str] = BENCHMARKS) -> list[Row]:
    """Rows of these tasks over all their kinds."""
    found: dict[tuple, Row] = {}
    for row in rows:
        if row["task"] in tasks:
            key = (row["set"], row["task"], row["snr_db"], row["budget"])
            if key not in found or row["kind"] is None:
                found[key] = row
    return list(found.values())


def benchmark_table(rows: Sequence[Row]) -> BenchmarkTable | None:
    """The table of results, or None where they hold no benchmark."""
    own = overall_rows(rows)
    if not own:
        return None
    return table_of(own, columns_of(own, {name: benchmark.columns for name, benchmark in BENCHMARKS.items()}))


def table_of(rows: Sequence[Row], columns: Sequence[Column]) -> BenchmarkTable:
    """Lay rows over all kinds out by budget, under these columns."""
    by_budget: dict[str, BudgetRow] = {}
    for row in rows:
        made = by_budget.setdefault(row["budget"], BudgetRow(row["budget"]))
        made.found |= {column: row for column in columns if (column.set_name, column.task) == (row["set"], row["task"])}
    in_order = sorted(by_budget.values(), key=lambda row: row.tokens[-1:] or [0.0], reverse=True)
    return BenchmarkTable(list(columns), in_order)


def columns_of(rows: Sequence[Row], by_task: Mapping[str, Sequence[registry.Column]]) -> list[Column]:
    """The columns of rows, in the order of their sets; sets are named where a task has several."""
    places = list(dict.fromkeys((row["set"], row["task"]) for row in rows))
    tasks = [task for _, task in places]
    found = []
    for set_name, task in places:
        tail = f" ({set_name})" if tasks.count(task) > 1 else ""
        for one in by_task[task]:
            found.append(Column(one.title + tail, set_name, task, one.key, one.full, one.in_average))
    return found


def _cell(column: Column, row: Row | None) -> str:
    if row is None:
        return "-"
    value = column.value(row)
    failed = FAILED if row["num_failed"] else ""
    if value is not None:
        return f"{value:.1f}{failed}"
    return f"{SERVER if row['value'] is None else '-'}{failed}"


def to_data(table: BenchmarkTable) -> list[dict[str, Any]]:
    """The rows for programs: each number with the row of results it is from."""
    return [
        {
            "budget": row.budget,
            "soft_tokens": row.tokens,
            "average": row.average(table.columns),
            "cells": {
                column.title: {"value": column.value(found), "share": column.share(found), "row": dict(found)}
                for column, found in row.found.items()
            },
        }
        for row in table.rows
    ]
