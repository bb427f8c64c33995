"""Lays out the table of the vision papers: a row per budget with its soft tokens, a column per benchmark, the average.

    | budget    | soft tokens | VQAv2 | GQA  | POPE (F1) | MME-P  | MME-C | avg  |

Knows rows of results. Does not know folders, models or plots.

MME is given in points (2000 and 800 at most), everything else in percent; the average takes MME as its fraction of
those points, as MQT-LLaVA does, and is left out unless every column has a number.
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
    """One number of one set: its title, its key in a row of results, and the number of a perfect model."""

    title: str
    set_name: str
    task: str
    key: str
    full: float
    in_average: bool

    def value(self, row: Row) -> float | None:
        """Returns the number as printed: percent, or points."""
        value = row.get(self.key)
        return None if value is None else 100 * value

    def fraction(self, row: Row) -> float | None:
        """Returns the number as a fraction of that of a perfect model."""
        value = row.get(self.key)
        return None if value is None else value / self.full


@dataclass
class BudgetRow:
    """The results at one budget: rows of results by column."""

    budget: str
    results: dict[Column, Row] = field(default_factory=dict)

    @property
    def tokens(self) -> list[float]:
        """Returns the mean soft tokens per question of each set, the least and the most."""
        means = [row["soft_tokens"] for row in self.results.values() if row["soft_tokens"] is not None]
        return [min(means), max(means)] if means else []

    def average(self, columns: Sequence[Column]) -> float | None:
        """Computes the average in percent; None where a column has no number or there are fewer than two."""
        averaged = [column for column in columns if column.in_average]
        fractions = [column.fraction(self.results[column]) if column in self.results else None for column in averaged]
        known = [fraction for fraction in fractions if fraction is not None]
        return 100 * sum(known) / len(known) if len(known) == len(averaged) > 1 else None


@dataclass
class BenchmarkTable:
    """A table with columns in the order of the sets and rows from the dearest budget to the cheapest."""

    columns: list[Column]
    rows: list[BudgetRow]

    @property
    def titles(self) -> list[str]:
        """Returns the first line of the table."""
        return ["budget", "soft tokens", *(column.title for column in self.columns), "avg"]

    @property
    def cells(self) -> list[list[str]]:
        """Returns everything below it."""
        return [self._cells_of(row) for row in self.rows]

    @property
    def notes(self) -> list[str]:
        """Explains the marks of these cells."""
        text = " ".join(cell for line in self.cells for cell in line)
        return [f"{mark}: {words}" for mark, words in NOTES.items() if mark in text]

    def _cells_of(self, row: BudgetRow) -> list[str]:
        trained = all(result["is_trained"] for result in row.results.values())
        tokens = " - ".join(dict.fromkeys(f"{mean:.4g}" for mean in row.tokens)) or "-"
        cells = [_cell(column, row.results.get(column)) for column in self.columns]
        average = row.average(self.columns)
        name = (row.budget or "max") + ("" if trained else UNTRAINED)
        return [name, tokens, *cells, "-" if average is None else f"{average:.1f}"]


def overall_rows(rows: Sequence[Row], tasks: Container[str] = BENCHMARKS) -> list[Row]:
    """Picks the rows of these tasks over all their kinds."""
    overall: dict[tuple, Row] = {}
    for row in rows:
        if row["task"] in tasks:
            key = (row["set"], row["task"], row["snr_db"], row["budget"])
            if key not in overall or row["kind"] is None:
                overall[key] = row
    return list(overall.values())


def benchmark_table(rows: Sequence[Row]) -> BenchmarkTable | None:
    """Makes the table of results, or None where they hold no benchmark."""
    overall = overall_rows(rows)
    if not overall:
        return None
    return table_of(overall, columns_of(overall, {name: benchmark.columns for name, benchmark in BENCHMARKS.items()}))


def table_of(rows: Sequence[Row], columns: Sequence[Column]) -> BenchmarkTable:
    """Lays rows over all kinds out by budget, under these columns."""
    by_budget: dict[str, BudgetRow] = {}
    for row in rows:
        budget_row = by_budget.setdefault(row["budget"], BudgetRow(row["budget"]))
        set_and_task = (row["set"], row["task"])
        budget_row.results |= {column: row for column in columns if (column.set_name, column.task) == set_and_task}
    in_order = sorted(by_budget.values(), key=lambda row: row.tokens[-1:] or [0.0], reverse=True)
    return BenchmarkTable(list(columns), in_order)


def columns_of(rows: Sequence[Row], by_task: Mapping[str, Sequence[registry.Column]]) -> list[Column]:
    """Lists the columns of rows, in the order of their sets; sets are named where a task has several."""
    set_tasks = list(dict.fromkeys((row["set"], row["task"]) for row in rows))
    tasks = [task for _, task in set_tasks]
    columns = []
    for set_name, task in set_tasks:
        tail = f" ({set_name})" if tasks.count(task) > 1 else ""
        for column in by_task[task]:
            columns.append(Column(column.title + tail, set_name, task, column.key, column.full, column.in_average))
    return columns


def _cell(column: Column, row: Row | None) -> str:
    if row is None:
        return "-"
    value = column.value(row)
    failed = FAILED if row["num_failed"] else ""
    if value is not None:
        return f"{value:.1f}{failed}"
    return f"{SERVER if row['value'] is None else '-'}{failed}"


def to_data(table: BenchmarkTable) -> list[dict[str, Any]]:
    """Returns the rows for programs: each number with the row of results it is from."""
    return [
        {
            "budget": row.budget,
            "soft_tokens": row.tokens,
            "average": row.average(table.columns),
            "cells": {
                column.title: {"value": column.value(results), "share": column.fraction(results), "row": dict(results)}
                for column, results in row.results.items()
            },
        }
        for row in table.rows
    ]
