"""Lays out vision results of several models: a row per model and budget, a column per benchmark, their average.

    | model | budget    | soft tokens | GQA  | POPE (F1) | avg  |

Beside the benchmarks, `vqa` (any other manifest of questions) has a column.

Knows rows of results. Does not know folders.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mllm.evaluation import benchmark_table
from mllm.evaluation.benchmark_table import BenchmarkTable, Row, columns_of, overall_rows, table_of
from mllm.evaluation.scorers import registry
from mllm.utils.markdown import markdown_table


def columns_by_task() -> dict[str, tuple[registry.Column, ...]]:
    """Lists the columns of each task that can be compared."""
    benchmarks = {task: benchmark.columns for task, benchmark in registry.BENCHMARKS.items()}
    return {**benchmarks, "vqa": (registry.Column("VQA"),)}


@dataclass
class VisionComparison:
    """The tables of all models, over the columns that any of them has."""

    tables: dict[str, BenchmarkTable]

    @property
    def titles(self) -> list[str]:
        """Returns the first line of the table."""
        return ["model", *next(iter(self.tables.values())).titles]

    @property
    def cells(self) -> list[list[str]]:
        """Returns everything below it: models in their order, each from its dearest budget to its cheapest."""
        return [[model, *line] for model, table in self.tables.items() for line in table.cells]

    @property
    def notes(self) -> list[str]:
        """Explains the marks of these cells."""
        return list(dict.fromkeys(note for table in self.tables.values() for note in table.notes))

    def to_markdown(self) -> str:
        """Writes table and notes as Markdown."""
        return "\n\n".join([markdown_table(self.titles, self.cells), *self.notes]) + "\n"

    def to_data(self) -> dict[str, Any]:
        """Returns the rows of each model for programs."""
        return {model: benchmark_table.to_data(table) for model, table in self.tables.items()}

    @property
    def plotted(self) -> list[dict[str, Any]]:
        """Makes rows for a plot: the share of each column, by model."""
        return [
            {**result, "label": f"{model} {column.title}", "metric": "score", "value": column.fraction(result)}
            | {"low": None, "high": None, "kind": None}
            for model, table in self.tables.items()
            for row in table.rows
            for column, result in row.results.items()
        ]


def vision_comparison(rows_by_model: Mapping[str, Sequence[Row]]) -> VisionComparison | None:
    """Lays the vision results of models side by side, or None where there are none.

    Raises:
        ValueError: a model has two results for one cell.
    """
    vision_rows = {model: _vision_rows(model, rows) for model, rows in rows_by_model.items()}
    columns = columns_of([row for rows in vision_rows.values() for row in rows], columns_by_task())
    tables = {model: table_of(rows, columns) for model, rows in vision_rows.items() if rows}
    return VisionComparison(tables) if tables else None


def _vision_rows(model: str, rows: Iterable[Row]) -> list[Row]:
    """Picks the rows over all kinds; what was answered in noise is another set."""
    tasks = columns_by_task()
    named = [{**row, "set": _set_of(row), "snr_db": None} for row in rows if row["task"] in tasks]
    seen: set[tuple] = set()
    for row in named:
        key = (row["set"], row["task"], row["kind"], row["budget"])
        if key in seen:
            cell = f"{row['task']} of {row['set']} at {row['budget'] or 'max'}"
            raise ValueError(f"{model} has two results for {cell}; name the models apart")
        seen.add(key)
    return overall_rows(named, tasks)


def _set_of(row: Row) -> str:
    return row["set"] if row["snr_db"] is None else f"{row['set']}, {row['snr_db']:g} dB"
