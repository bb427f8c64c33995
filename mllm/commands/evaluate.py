"""Runs `mllm evaluate`: evaluates a model on manifests at budgets, and shows tables."""

from dataclasses import replace
from typing import TYPE_CHECKING

from mllm.config.evaluation import EvaluationConfig as Settings

if TYPE_CHECKING:
    from mllm.evaluation.report import Results

__all__ = ["SUMMARY", "Settings", "run"]

SUMMARY = "Measure error rates and accuracies of a model over budgets: table, JSON, CSV, plot."
MAX_FAILURES_SHOWN = 10


def run(settings: Settings) -> int:
    """Evaluates, shows the tables, and names what failed."""
    from mllm.commands.terminal import progress_bar, quiet_loading
    from mllm.evaluation.run import evaluate
    from mllm.utils.distributed import finish_launch

    settings = settings.pinned()
    quiet_loading()
    with progress_bar() as show:
        results = evaluate(settings, progress=lambda done, total: show("answers", done, total))
    return finish_launch(0 if results is None else _tell(settings, results))  # the first process tells


def _tell(settings: Settings, results: "Results") -> int:
    """Shows the tables, and names what failed; 1 where something did."""
    from mllm.commands.terminal import console
    from mllm.evaluation.report import cut_notes, table
    from mllm.evaluation.scorers.registry import BENCHMARKS

    others = [row for row in results.rows if row["task"] not in BENCHMARKS]
    if others:
        console().print(table(replace(results, rows=others)))
    _show_speech(results)
    _show_benchmarks(settings, results)
    for media, text in results.routing.items():
        break_before = "\n" if text.startswith("|") else " "
        console().print(f"auto about {media}, beside fixed budgets:{break_before}{text}", soft_wrap=True)
    for note in cut_notes(results.rows, settings.max_new_tokens):
        console().print(note, soft_wrap=True)
    console().print(f"written to {settings.output_folder}")
    return _tell_failures(results)


def _show_speech(results: "Results") -> None:
    from mllm.commands.terminal import console
    from mllm.evaluation.comparison import comparison_of, short_name
    from mllm.evaluation.speech_table import notes_of, tables

    speech = comparison_of(results.rows, short_name(results.facts["model"]))
    if speech is not None:
        for line in (*tables(speech.blocks), *notes_of(speech.blocks)):
            console().print(line)


def _show_benchmarks(settings: Settings, results: "Results") -> None:
    from mllm.commands.terminal import console, plain_table
    from mllm.evaluation.benchmark_table import benchmark_table
    from mllm.evaluation.benchmarks import MARKDOWN, SUBMITTED, unjudged_notes

    made = benchmark_table(results.rows)
    if made is None:
        return
    out = console()
    out.print(plain_table(made.titles, made.cells, title=f"{results.facts['model']}"))
    for note in (*made.notes, *unjudged_notes(results.rows)):
        out.print(note, soft_wrap=True)
    out.print(f"oracle and failures: {settings.output_folder / MARKDOWN}", soft_wrap=True)
    for file in sorted((settings.output_folder / SUBMITTED).rglob("*.*")):
        out.print(f"to submit: {file}", soft_wrap=True)


def _tell_failures(results: "Results") -> int:
    from mllm.commands.terminal import console

    errors = console(stderr=True)
    for failure in results.failures[:MAX_FAILURES_SHOWN]:
        errors.print(f"failed: {failure['set']} {failure['id']} at {failure['budget']}: {failure['error']['reason']}")
    if len(results.failures) > MAX_FAILURES_SHOWN:
        errors.print(f"and {len(results.failures) - MAX_FAILURES_SHOWN} more; see results.json")
    return 1 if results.failures else 0
