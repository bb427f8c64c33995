"""Lays out the table of the speech papers: a row per model, a column per task and rates, a block per set and noise.

    | model    | ASR (4) | ASR (16) | VSR (2) | VSR (5) | AVSR (4,2) | AVSR (4,5) | AVSR (16,2) | AVSR (16,5) | avg |

Knows rows of results. Does not know folders, models or plots.

The average is the unweighted mean of the columns, and is left out unless all of them are there. Noise does not change
what is read from video alone: such results stand in every block of their set.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rich.table import Table

from mllm.budget import Amount, Budget
from mllm.utils.markdown import markdown_table

Row = Mapping[str, Any]
TASKS = ("asr", "vsr", "avsr")
_STREAMS = {"asr": ("audio",), "vsr": ("video",), "avsr": ("audio", "video")}
METRICS = {"WER %": "value", "CER %": "cer"}
COSTS = {
    "soft tokens per second": ("tokens_per_second", "{:.1f}"),
    "TFLOPs of the prompt": ("published_tflops", "{:.3g}"),
    "TFLOPs of its attention": ("attention_tflops", "{:.3g}"),
}
UNTRAINED, FAILED = "*", "†"
NOTES = {UNTRAINED: "a rate that was not trained", FAILED: "some utterances could not be answered and are not counted"}


@dataclass(frozen=True)
class Column:
    """One task at one amount of each medium it holds."""

    task: str
    amounts: tuple[Amount, ...]

    @property
    def title(self) -> str:
        """Writes the title as papers do: `AVSR (4,2)`, rates without their stroke."""
        return f"{self.task.upper()} ({','.join(str(amount).removeprefix('/') for amount in self.amounts)})"

    @property
    def order(self) -> tuple:
        """Sorts tasks in their order, rates from fine to coarse, before everything that is no rate."""
        return TASKS.index(self.task), tuple(
            (amount.kind != "rate", amount.kind, amount.value) for amount in self.amounts
        )


@dataclass
class Block:
    """The results on one set in one noise: rows of results by model and column."""

    set_name: str
    kind: str | None
    snr_db: float | None
    results: dict[str, dict[Column, Row]] = field(default_factory=dict)

    @property
    def title(self) -> str:
        """Names the set, its kind, and the noise."""
        noise = "clean" if self.snr_db is None else f"SNR {self.snr_db:g} dB"
        return ", ".join(filter(None, (self.set_name, self.kind, noise)))

    @property
    def columns(self) -> list[Column]:
        """Lists every column that any model has."""
        return sorted({column for cells in self.results.values() for column in cells}, key=lambda column: column.order)

    def average(self, model: str, key: str) -> float | None:
        """Takes the mean of all columns, or returns None where the model lacks one."""
        values = [self.results[model].get(column, {}).get(key) for column in self.columns]
        present = [value for value in values if value is not None]
        return sum(present) / len(present) if present and len(present) == len(values) else None


def column_of(row: Row) -> Column | None:
    """Finds the column of a row of results, or returns None for what is no speech."""
    if row["task"] not in TASKS:
        return None
    budget = Budget.parse(row["budget"])
    if budget.total_tokens is not None or budget.is_open:
        return None  # what it becomes differs from sample to sample
    return Column(row["task"], tuple(budget.amounts.get(medium, Amount("max")) for medium in _STREAMS[row["task"]]))


def blocks_of(rows_by_model: Mapping[str, Sequence[Row]]) -> list[Block]:
    """Lays rows of results out: sets and kinds in their order of appearance, clean speech before noise.

    Raises:
        ValueError: a model has two results for one cell.
    """
    blocks: dict[tuple, Block] = {}
    for model, rows in rows_by_model.items():
        for row in rows:
            column = column_of(row)
            if column is None:
                continue
            key = (row["set"], row["kind"], row["snr_db"])
            block = blocks.setdefault(key, Block(*key))
            cells = block.results.setdefault(model, {})
            if column in cells:
                raise ValueError(f"{model} has two results for {column.title} of {block.title}; name the models apart")
            cells[column] = row
    _repeat_video_rows(list(blocks.values()))
    rank = {key[:2]: number for number, key in reversed(list(enumerate(blocks)))}

    def order(block: Block) -> tuple:
        quiet = block.snr_db is None
        return rank[block.set_name, block.kind], not quiet, 0 if quiet else -block.snr_db  # pyright: ignore

    return sorted((block for block in blocks.values() if not _only_repeats_video(block, blocks)), key=order)


def _repeat_video_rows(blocks: Sequence[Block]) -> None:
    for clean in blocks:
        for noisy in blocks:
            if clean.snr_db is not None or noisy.snr_db is None:
                continue
            if (clean.set_name, clean.kind) == (noisy.set_name, noisy.kind):
                for model, cells in clean.results.items():
                    video_cells = {column: row for column, row in cells.items() if column.task == "vsr"}
                    if video_cells and model in noisy.results:
                        noisy.results[model].update(video_cells)


def _only_repeats_video(block: Block, blocks: Mapping[tuple, Block]) -> bool:
    """Tells whether a clean block holds nothing but what its noisy ones show as well."""
    noisy = [key for key in blocks if key[:2] == (block.set_name, block.kind) and key[2] is not None]
    return block.snr_db is None and bool(noisy) and all(column.task == "vsr" for column in block.columns)


def cells_of(block: Block, model: str, key: str) -> list[str]:
    """Writes a model's line: its values in percent with their marks, and the average."""
    cells = []
    for column in block.columns:
        row = block.results[model].get(column)
        cells.append("-" if row is None else _percent(row.get(key)) + _marks(row))
    return [*cells, _percent(block.average(model, key))]


def _marks(row: Row) -> str:
    return UNTRAINED * (not row["is_trained"]) + FAILED * bool(row["num_failed"])


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f}"


def costs_of(block: Block) -> list[list[str]]:
    """Writes lines of what the prompts of each model cost, where that is known."""
    lines = []
    for model, cells in block.results.items():
        for name, (key, form) in COSTS.items():
            values = [cells.get(column, {}).get(key) for column in block.columns]
            if any(value is not None for value in values):
                lines.append([f"{model}: {name}", *("-" if v is None else form.format(v) for v in values), ""])
    return lines


def notes_of(blocks: Sequence[Block]) -> list[str]:
    """Explains the marks in the tables, those that occur."""
    marks = "".join(_marks(row) for block in blocks for cells in block.results.values() for row in cells.values())
    return [f"{mark} {words}" for mark, words in NOTES.items() if mark in marks]


def tables(blocks: Sequence[Block]) -> list[Table]:
    """Shows the blocks in a terminal: WER, and below it what the prompts cost."""
    tables_made = []
    for block in blocks:
        shown = Table(title=f"WER %: {block.title}", title_justify="left", pad_edge=False)
        shown.add_column("model")
        for title in (*(column.title for column in block.columns), "avg"):
            shown.add_column(title, justify="right")
        for model in block.results:
            shown.add_row(model, *cells_of(block, model, "value"))
        shown.add_section()
        for line in costs_of(block):
            shown.add_row(*line)
        tables_made.append(shown)
    return tables_made


def to_markdown(blocks: Sequence[Block]) -> str:
    """Writes the blocks as Markdown: WER and CER, the lowest of a column bold among several models, and costs."""
    parts = []
    for block in blocks:
        titles = [column.title for column in block.columns]
        parts.append(f"### {block.title}")
        for name, key in METRICS.items():
            lines = [[model, *cells_of(block, model, key)] for model in block.results]
            parts.append(markdown_table([name, *titles, "avg"], _with_bold(lines)))
        if costs := costs_of(block):
            parts.append(markdown_table(["prompt", *titles, ""], costs))
    parts += notes_of(blocks)
    return "\n\n".join(parts) + "\n"


def _with_bold(lines: Sequence[Sequence[str]]) -> list[list[str]]:
    bold = [list(line) for line in lines]
    for number in range(1, len(bold[0])):
        values = [line[number].strip(UNTRAINED + FAILED) for line in bold]
        numbers = [float(value) for value in values if value != "-"]
        for line, value in zip(bold, values, strict=True):
            if len(numbers) > 1 and value != "-" and float(value) == min(numbers):
                line[number] = f"**{line[number]}**"
    return bold


def to_data(blocks: Sequence[Block]) -> list[dict[str, Any]]:
    """Returns the blocks for programs: whole rows of results by model and column, and averages."""
    return [
        {
            "title": block.title,
            "set": block.set_name,
            "kind": block.kind,
            "snr_db": block.snr_db,
            "columns": [column.title for column in block.columns],
            "models": {
                model: {
                    "cells": {column.title: dict(cells[column]) for column in block.columns if column in cells},
                    "averages": {name: block.average(model, key) for name, key in METRICS.items()},
                }
                for model, cells in block.results.items()
            },
        }
        for block in blocks
    ]
