"""Writes results on vision benchmarks: the table, what an oracle would give, what failed, and what servers judge.

    out/benchmarks.md      table, oracle, failures
    out/benchmarks.json    the same with everything the results hold
    out/benchmarks.png     scores against soft tokens and TFLOPs, Pareto fronts ringed
    out/submissions/<set>/<task>-<budget>.json or .xlsx

Knows results, lines and samples. Does not know models.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any
from urllib.parse import quote

from mllm.data.manifest import Sample
from mllm.evaluation import benchmark_table, oracle
from mllm.evaluation.answer_store import Line
from mllm.evaluation.benchmark_table import BenchmarkTable
from mllm.evaluation.plot import plot_pareto
from mllm.evaluation.report import Results, cut_notes
from mllm.evaluation.scorers.registry import BENCHMARKS
from mllm.evaluation.scorers.submissions import SUBMISSIONS, Answer
from mllm.evaluation.work_list import is_for_server
from mllm.utils.files import write_text_whole, written_whole
from mllm.utils.markdown import markdown_table

MARKDOWN, DATA, PLOT, SUBMITTED = "benchmarks.md", "benchmarks.json", "benchmarks.png", "submissions"
AXES = {"soft_tokens": "soft tokens per question (mean)", "tflops": "TFLOP per question (mean)"}
ORACLE_TOKENS = ("soft tokens, all wrong at the largest", "at the smallest")
MAX_FAILURES_SHOWN = 200


@dataclass
class BenchmarkReport:
    """Everything that is reported about the benchmarks of an evaluation."""

    results: Results
    table: BenchmarkTable
    lines: Sequence[Line]

    @cached_property
    def oracles(self) -> list[oracle.Oracle]:
        """Computes the oracle of every benchmark that has one."""
        return oracle.oracles_of(self.lines, self.table.columns)

    @property
    def oracle_head(self) -> list[str]:
        """Returns the first line of the table of oracles."""
        return ["benchmark", "oracle", *ORACLE_TOKENS, "all wrong", "best budget"]

    @property
    def oracle_cells(self) -> list[list[str]]:
        """Returns a line per number; the best single budget stands beside it."""
        return [
            [
                title,
                "-" if value is None else f"{value:.1f}",
                f"{one.tokens:.2f}",
                f"{one.tokens_all_wrong_smallest:.2f}",
                f"{one.num_all_wrong} of {one.num_questions}",
                self._best(title),
            ]
            for one in self.oracles
            for title, value in one.values.items()
        ]

    def _best(self, title: str) -> str:
        values = [
            (column.value(row), budget.budget)
            for budget in reversed(self.table.rows)
            for column, row in budget.results.items()
            if column.title == title
        ]
        present = [(value, budget) for value, budget in values if value is not None]
        if not present:
            return "-"
        value, budget = max(present, key=lambda one: one[0])
        return f"{value:.1f} at {budget or 'max'}"

    @property
    def unread(self) -> list[str]:
        """Counts answers in which no option was found; many of them mean that a score tells little about seeing."""
        return _counted(self.results.rows, "num_unread", "name no option")

    def write(self, folder: Path, *, with_plot: bool = True) -> None:
        """Writes `benchmarks.md`, `benchmarks.json` and `benchmarks.png`."""
        write_text_whole(folder / MARKDOWN, self.to_markdown())
        content = {
            "rows": benchmark_table.to_data(self.table),
            "oracles": [oracle.to_data(one) for one in self.oracles],
        }
        write_text_whole(folder / DATA, json.dumps(content, indent=1, ensure_ascii=False) + "\n")
        if with_plot:
            plot_pareto(self._plotted(), folder / PLOT, axes=AXES, with_front=True)

    def to_markdown(self) -> str:
        """Writes table, notes, oracle and failures as Markdown."""
        parts = [f"# {self.results.facts.get('model', 'results')}", markdown_table(self.table.titles, self.table.cells)]
        judged = [row for row in self.results.rows if row["task"] in BENCHMARKS]
        cut = cut_notes(judged, self.results.facts.get("max_new_tokens"))
        parts += [*self.table.notes, *self.unread, *unjudged_notes(judged), *cut]
        if self.oracles:
            parts += ["## Oracle", markdown_table(self.oracle_head, self.oracle_cells)]
            parts.append(
                "Each question at the smallest budget that answers it best, and mean soft tokens per question, with "
                "those that no budget answers right billed at the largest and at the smallest. How many need which:"
            )
            parts.append("\n".join(_budget_counts(one) for one in self.oracles))
        return "\n\n".join([*parts, *self._failures()]) + "\n"

    def _failures(self) -> list[str]:
        failed = [line for line in self.lines if "error" in line and line["task"] in BENCHMARKS]
        if not failed:
            return []
        named = [
            f"- {line['set']} {line['id']} at {line['budget'] or 'max'}: {line['error']['reason']}" for line in failed
        ]
        more = len(named) - MAX_FAILURES_SHOWN
        rest = [f"- and {more} more, in results.json"] if more > 0 else []
        return [f"## Failed: {len(failed)}, counted as wrong", "\n".join(named[:MAX_FAILURES_SHOWN] + rest)]

    def _plotted(self) -> list[dict[str, Any]]:
        points = []
        for row in self.table.rows:
            for column, result in row.results.items():
                points.append(_point(column.title, result, column.fraction(result)))
            first = next(iter(row.results.values()))
            if (average := row.average(self.table.columns)) is not None:
                points.append(_point("average", {**first, **_means(list(row.results.values()))}, average / 100))
        order = {title: number for number, title in enumerate([*self.table.titles, "average"])}
        return sorted(points, key=lambda one: order[one["label"]])


def unjudged_notes(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Says how many answers have no reference; the number in the table is of the others alone."""
    return _counted(rows, "num_unjudged", "have no reference and are not judged")


def _counted(rows: Sequence[Mapping[str, Any]], key: str, words: str) -> list[str]:
    return [
        f"{row[key]} answers of {row['set']} ({row['task']}) at {row['budget'] or 'max'} {words}"
        for row in benchmark_table.overall_rows(rows)
        if row.get(key)
    ]


def report_of(results: Results, lines: Sequence[Line]) -> BenchmarkReport | None:
    """Makes the report, or None where nothing was a benchmark."""
    table = benchmark_table.benchmark_table(results.rows)
    return None if table is None else BenchmarkReport(results, table, lines)


def write_submissions(
    folder: Path, lines: Sequence[Line], samples: Mapping[tuple[str, str], Sample], *, all_ids: Sequence[int] = ()
) -> list[Path]:
    """Writes what servers judge, a file per set and budget, and returns the paths.

    Args:
        folder: where the results are.
        samples: by set and id.
        all_ids: every question of VQAv2's test set, which its server wants an answer to.
    """
    groups: dict[tuple[str, str, str], list[Answer]] = {}
    for line in lines:
        sample = samples[line["set"], line["id"]]
        if _is_submitted(line, sample):
            key = (line["set"], line["task"], line["budget"])
            groups.setdefault(key, []).append(Answer(sample.id, line.get("hypothesis", ""), sample.meta))
    written = []
    for (set_name, task, budget), answers in groups.items():
        submission = SUBMISSIONS[task]
        name = f"{task}-{quote(budget or 'max', safe='=,')}{submission.suffix}"
        file = folder / SUBMITTED / quote(set_name, safe=" ") / name
        file.parent.mkdir(parents=True, exist_ok=True)
        with written_whole(file) as aside:
            aside.write_bytes(submission.make(answers, all_ids if task == "vqav2" else ()))
        written.append(file)
    return written


def _is_submitted(line: Line, sample: Sample) -> bool:
    submission = SUBMISSIONS.get(line["task"])
    if submission is None:
        return False
    return is_for_server(sample) or (submission.is_always and all(key in sample.meta for key in submission.meta))


def _point(label: str, row: Mapping[str, Any], fraction: float | None) -> dict[str, Any]:
    kept = {key: row[key] for key in ("task", "set", "snr_db", "budget", "is_trained", "soft_tokens")}
    tflops = None if row["gflops"] is None else row["gflops"] / 1000
    values = {"label": label, "kind": None, "metric": "score", "value": fraction, "low": None, "high": None}
    return {**kept, **values, "tflops": tflops}


def _means(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Takes means over sets, for the average; None for what one of them lacks."""

    def mean(key: str) -> float | None:
        values = [row[key] for row in rows]
        return None if None in values else sum(values) / len(values)

    return {
        "soft_tokens": mean("soft_tokens"),
        "gflops": mean("gflops"),
        "is_trained": all(row["is_trained"] for row in rows),
    }


def _budget_counts(one: oracle.Oracle) -> str:
    counts = ", ".join(f"{budget or 'max'}: {count}" for budget, count in one.smallest.items())
    return f"- {one.set_name} ({one.task}): {counts}, none: {one.num_all_wrong}"
