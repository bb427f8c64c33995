"""Shares what commands show on the terminal: a console, tables, and a bar of progress that the first process draws."""

import logging
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from mllm.inference.answerer import Answer
    from mllm.utils.progress import Progress


def console(*, stderr: bool = False) -> "Console":
    """Make a console that writes texts as they are; where there is no terminal its lines are long instead of broken."""
    from rich.console import Console

    stream = sys.stderr if stderr else sys.stdout
    return Console(stderr=stderr, markup=False, highlight=False, width=None if stream.isatty() else 160)


def plain_table(
    titles: Sequence[str], lines: Iterable[Sequence[str]], *, title: str | None = None, num_names: int = 1
) -> "Table":
    """Make a table whose first `num_names` columns are names, to the left, and the others numbers, to the right."""
    from rich.table import Table

    shown = Table(title=title, title_justify="left", pad_edge=False)
    for number, name in enumerate(titles):
        shown.add_column(name, justify="right" if number >= num_names else "left")
    for line in lines:
        shown.add_row(*line)
    return shown


@contextmanager
def progress_bar() -> Iterator["Progress"]:
    """Yield a function that reports progress; each kind of work gets a bar of its own.

    While no work is under way nothing is drawn, so that other processes may draw bars of their own.
    """
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    is_first = os.environ.get("RANK", "0") == "0"
    bar = Bar(*columns, console=console(stderr=True), disable=not is_first)
    tasks = {}

    def show(what: str, done: int, total: int) -> None:
        if bar.finished and (what not in tasks or done < total):
            for name in list(tasks):  # they stand above for good
                bar.remove_task(tasks.pop(name))
            bar.start()
        if what not in tasks:
            tasks[what] = bar.add_task(what, total=total)
        bar.update(tasks[what], completed=done, total=total)
        if bar.finished:
            bar.stop()

    try:
        yield show
    finally:
        if bar.live.is_started:  # where nothing was drawn, rich would still end its line
            bar.stop()


def quiet_loading() -> None:
    """Keep transformers from drawing bars of its own while weights load, and the model from listing its trainables."""
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    logging.getLogger("mllm.model.trainables").setLevel(logging.WARNING)


def show_conversion(title: str, facts: Iterable[str], folder: str) -> None:
    """Write what a checkpoint was found to be, and where it is now."""
    out = console()
    for line in (title, *facts, f"written to {folder}"):
        out.print(line, soft_wrap=True)


def facts_of_answers(answers: Sequence["Answer"], *, is_open: bool) -> list[str]:
    """Writes lines about answers to questions about the same files: the tokens of each, and the timing of all.

    Args:
        is_open: their budgets were chosen for them, and are told.
    """
    lines = []
    for answer in answers:
        used = ", ".join(f"{medium} {count}" for medium, count in answer.tokens.items()) or "none"
        trained = "" if answer.is_trained else " (this budget was not trained)"
        shared = f" ({answer.num_shared_tokens} of them shared)" if answer.num_shared_tokens else ""
        prompt = f"prompt {answer.num_prompt_tokens}{shared}"
        before = ", ".join(str(one.budget) for one in answer.discarded)
        chosen = f" at {answer.budget}{f', after {before}' if before else ''}" if is_open and str(answer.budget) else ""
        lines.append(f"soft tokens: {used}{chosen}{trained}; {prompt}, answer {answer.num_new_tokens}")
    if (time := answers[0].timing) is not None:
        of = f" of all {len(answers)} together" if len(answers) > 1 else ""
        lines.append(
            f"milliseconds{of}: encoder {time.encoder_ms:.1f}, prefill {time.prefill_ms:.1f}, "
            f"decode {time.decode_ms:.1f}"
        )
    return lines


def piece_writer() -> Callable[[str], None]:
    """Makes a function that writes pieces as they come, without the blank before the first of them."""
    begun = False

    def write(piece: str) -> None:
        nonlocal begun
        sys.stdout.write(piece if begun else piece.lstrip())
        sys.stdout.flush()
        begun = begun or bool(piece.strip())

    return write
