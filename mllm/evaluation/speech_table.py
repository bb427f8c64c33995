"""The table of the speech papers: models in rows, a column per task and rates, a block per set and noise.

    | model    | ASR (4) | ASR (16) | VSR (2) | VSR (5) | AVSR (4,2) | AVSR (4,5) | AVSR (16,2) | AVSR (16,5) | avg |

Knows rows of results. Does not know folders, models or plots.

The average is the unweighted mean of the columns, and is told only where all of them are there. Lips do not hear noise:
what they read stands in every block of their set.
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
        """As papers write it: `AVSR (4,2)`; rates without their stroke."""
        return f"{self.task.upper()} ({','.join(str(amount).removeprefix('/') for amount in self.amounts)})"

    @property
    def place(self) -> tuple:
        """Tasks in their order, rates from fine to coarse, before everything that is no rate."""
        return TASKS.index(self.task), tuple(
            (amount.kind != "rate", amount.kind, amount.value) for amount in self.amounts
        )


@dataclass
class Block:
    """What was found on one set in one noise: rows of results by model and column."""

    set_name: str
    kind: str | None
    snr_db: float | None
    found: dict[str, dict[Column, Row]] = field(default_factory=dict)

    @property
    def title(self) -> str:
        """The set, its kind, and the noise."""
        noise = "clean" if self.snr_db is None else f"SNR {self.snr_db:g} dB"
        return ", ".join(filter(None, (self.set_name, self.kind, noise)))

    @property
    def columns(self) -> list[Column]:
        """Every column that any model has."""
        return sorted({column for own in self.found.values() for column in own}, key=lambda column: column.place)

    def average(self, model: str, key: str) -> float | None:
        """Mean of all columns, or None where the model lacks one."""
        values = [self.found[model].get(column, {}).get(key) for column in self.columns]
        known = [value for value in values if value is not None]
        return sum(known) / len(known) if known and len(known) == len(values) else None


def column_of(row: Row) -> Column | None:
    """The column of a row of results, or None for what is no speech."""
    if row["task"] not in TASKS:
        return None
    budget = Budget.parse(row["budget"])
    if budget.total_tokens is not None:
        return None  # its split differs from sample to sample
    return Column(row["task"], tuple(budget.amounts.get(medium, Amount("max")) for medium in _STREAMS[row["task"]]))


def blocks_of(rows_by_model: Mapping[str, Sequence[Row]]) -> list[Block]:
    """Rows of results laid out: sets and kinds in their order of appearance, clean speech before noise.

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
            own = block.found.setdefault(model, {})
            if column in own:
                raise ValueError(f"{model} has two results for {column.title} of {block.title}; name the models apart")
            own[column] = row
    _share_lips(list(blocks.values()))
    places = {key[:2]: place for place, key in reversed(list(enumerate(blocks)))}

    def order(block: Block) -> tuple:
        quiet = block.snr_db is None
        return places[block.set_name, block.kind], not quiet, 0 if quiet else -block.snr_db  # pyright: ignore

    return sorted((block for block in blocks.values() if not _is_only_lips_of(block, blocks)), key=order)


def _share_lips(blocks: Sequence[Block]) -> None:
    for clean in blocks:
        for noisy in blocks:
            if clean.snr_db is not None or noisy.snr_db is None:
                continue
            if (clean.set_name, clean.kind) == (noisy.set_name, noisy.kind):
                for model, own in clean.found.items():
                    seen = {column: row for column, row in own.items() if column.task == "vsr"}
                    if seen and model in noisy.found:
                        noisy.found[model].update(seen)


def _is_only_lips_of(block: Block, blocks: Mapping[tuple, Block]) -> bool:
    """Whether a clean block holds nothing but what its noisy ones show as well."""
    noisy = [key for key in blocks if key[:2] == (block.set_name, block.kind) and key[2] is not None]
    return block.snr_db is None and bool(noisy) and all(column.task == "vsr" for column in block.columns)


def cells_of(block: Block, model: str, key: str) -> list[str]:
    """A model's line: its values in percent with their marks, and the average."""
    cells = []
    for column in block.columns:
        row = block.found[model].get(column)
        cells.append("-" if row is None else _percent(row.get(key)) + _marks(row))
    return [*cells, _percent(block.average(model, key))]


def _marks(row: Row) -> str:
    return UNTRAINED * (not row["is_trained"]) + FAILED * bool(row["num_failed"])


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f}"


def costs_of(block: Block) -> list[list[str]]:
    """Lines of what the prompts of each model cost, those that are known."""
    lines = []
    for model, own in block.found.items():
        for name, (key, form) in COSTS.items():
            values = [own.get(column, {}).get(key) for column in block.columns]
            if any(value is not None for value in values):
                lines.append([f"{model}: {name}", *("-" if v is None else form.format(v) for v in values), ""])
    return lines


def notes_of(blocks: Sequence[Block]) -> list[str]:
    """What the marks in the tables mean, those that occur."""
    marks = "".join(_marks(row) for block in blocks for own in block.found.values() for row in own.values())
    return [f"{mark} {words}" for mark, words in NOTES.items() if mark in marks]


def tables(blocks: Sequence[Block]) -> list[Table]:
    """The blocks for a terminal: WER, and below it what the prompts cost."""
    made = []
    for block in blocks:
        shown = Table(title=f"WER %: {block.title}", title_justify="left", pad_edge=False)
        shown.add_column("model")
        for title in (*(column.title for column in block.columns), "avg"):
            shown.add_column(title, justify="right")
        for model in block.found:
            shown.add_row(model, *cells_of(block, model, "value"))
        shown.add_section()
        for line in costs_of(block):
            shown.add_row(*line)
        made.append(shown)
    return made


def to_markdown(blocks: Sequence[Block]) -> str:
    """The blocks as Markdown: WER and CER, the lowest of a column bold where there are several models, and costs."""
    parts = []
    for block in blocks:
        titles = [column.title for column in block.columns]
        parts.append(f"### {block.title}")
        for name, key in METRICS.items():
            lines = [[model, *cells_of(block, model, key)] for model in block.found]
            parts.append(markdown_table([name, *titles, "avg"], _with_bold(lines)))
        if costs := costs_of(block):
            parts.append(markdown_table(["prompt", *titles, ""], costs))
    parts += notes_of(blocks)
    return "\n\n".join(parts) + "\n"


def _with_bold(lines: Sequence[Sequence[str]]) -> list[list[str]]:
    made = [list(line) for line in lines]
    for place in range(1, len(made[0])):
        values = [line[place].strip(UNTRAINED + FAILED) for line in made]
        numbers = [float(value) for value in values if value != "-"]
        for line, value in zip(made, values, strict=True):
            if len(numbers) > 1 and value != "-" and float(value) == min(numbers):
                line[place] = f"**{line[place]}**"
    return made


def to_data(blocks: Sequence[Block]) -> list[dict[str, Any]]:
    """The blocks for programs: whole rows of results by model and column, and averages."""
    return [
        {
            "title": block.title,
            "set": block.set_name,
            "kind": block.kind,
            "snr_db": block.snr_db,
            "columns": [column.title for column in block.columns],
            "models": {
                model: {
                    "cells": {column.title: dict(own[column]) for column in block.columns if column in own},
                    "averages": {name: block.average(model, key) for name, key in METRICS.items()},
                }
                for model, own in block.found.items()
            },
        }
        for block in blocks
    ]
