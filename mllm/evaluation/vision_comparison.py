"""Vision results of several models in one table: a row per model and budget, a column per benchmark, their average.

    | model | budget    | soft tokens | GQA  | POPE (F1) | avg  |

Beside the benchmarks, `vqa` (a manifest of one's own) has a column. Knows rows of results. Does not know folders.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mllm.evaluation import benchmark_table
from mllm.evaluation.benchmark_table import BenchmarkTable, Row, columns_of, overall_rows, table_of
from mllm.evaluation.scorers import registry
from mllm.utils.markdown import markdown_table

COLUMNS = {
    **{name: benchmark.columns for name, benchmark in registry.BENCHMARKS.items()},
    "vqa": (registry.Column("VQA"),),
}
"""By task."""


@dataclass
class VisionComparison:
    """The tables of all models, over the columns that any of them has."""

    tables: dict[str, BenchmarkTable]

    @property
    def titles(self) -> list[str]:
        """The first line of the table."""
        return ["model", *next(iter(self.tables.values())).titles]

    @property
    def cells(self) -> list[list[str]]:
        """Everything below it: models in their order, each from its dearest budget to its cheapest."""
        return [[model, *line] for model, table in self.tables.items() for line in table.cells]

    @property
    def notes(self) -> list[str]:
        """What the marks of these cells mean."""
        return list(dict.fromkeys(note for table in self.tables.values() for note in table.notes))

    def to_markdown(self) -> str:
        """Table and notes."""
        return "\n\n".join([markdown_table(self.titles, self.cells), *self.notes]) + "\n"

    def to_data(self) -> dict[str, Any]:
        """The rows of each model for programs."""
        return {model: benchmark_table.to_data(table) for model, table in self.tables.items()}

    @property
    def plotted(self) -> list[dict[str, Any]]:
        """Rows for a plot: the share of each column, by model."""
        return [
            {**found, "label": f"{model} {column.title}", "metric": "score", "value": column.share(found)}
            | {"low": None, "high": None, "kind": None}
            for model, table in self.tables.items()
            for row in table.rows
            for column, found in row.found.items()
        ]


def vision_comparison(rows_by_model: Mapping[str, Sequence[Row]]) -> VisionComparison | None:
    """Lay the vision results of models side by side, or None where there are none.

    Raises:
        ValueError: a model has two results for one cell.
    """
    own = {model: _vision_rows(model, rows) for model, rows in rows_by_model.items()}
    columns = columns_of([row for rows in own.values() for row in rows], COLUMNS)
    tables = {model: table_of(rows, columns) for model, rows in own.items() if rows}
    return VisionComparison(tables) if tables else None


def _vision_rows(model: str, rows: Iterable[Row]) -> list[Row]:
    """Rows over all kinds; what was asked in noise is a set of its own."""
    named = [{**row, "set": _set_of(row), "snr_db": None} for row in rows if row["task"] in COLUMNS]
    seen: set[tuple] = set()
    for row in named:
        key = (row["set"], row["task"], row["kind"], row["budget"])
        if key in seen:
            cell = f"{row['task']} of {row['set']} at {row['budget'] or 'max'}"
            raise ValueError(f"{model} has two results for {cell}; name the models apart")
        seen.add(key)
    return overall_rows(named, COLUMNS)


def _set_of(row: Row) -> str:
    return row["set"] if row["snr_db"] is None else f"{row['set']}, {row['snr_db']:g} dB"
