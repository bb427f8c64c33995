"""Writes one HTML file about a run, finished or not: curves of the loss per budget, tables, answers at several budgets.

Knows the files of a run folder. Does not know models. The file needs no network and runs no script.
"""

import html
import io
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from mllm.data.json_lines import numbered_lines, read_object
from mllm.evaluation.answer_store import HYPOTHESES
from mllm.evaluation.report import RESULTS
from mllm.utils.files import write_text_whole
from mllm.utils.run_paths import LOG, RUN_CONFIG, VALIDATION_ANSWERS

REPORT = "report.html"
TRAINING_LOSS = "loss"
EVALUATIONS = "evaluation*/**/"
STYLE = """
body { font: 15px/1.5 sans-serif; max-width: 72em; margin: 2em auto; padding: 0 1em; color: #222; }
table { border-collapse: collapse; margin: 1em 0; } td, th { padding: 0.2em 0.8em; border-bottom: 1px solid #ddd; }
th { text-align: left; } td.number { text-align: right; } svg { max-width: 100%; height: auto; } pre { overflow: auto; }
"""

Rows = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class RunFiles:
    """Holds what a run folder says so far.

    Args:
        log: the reports of the run.
        settings: the text of its config.
        results: rows of its evaluation, empty where there is none.
        answers: a row per sample and budget, with `question`, `references` and `hypothesis`.
        answered_in: where the answers come from.
    """

    name: str
    log: Rows
    settings: str = ""
    results: Rows = field(default_factory=list)
    answers: Rows = field(default_factory=list)
    answered_in: str = ""


def read_run(run: Path) -> RunFiles:
    """Read what a run folder says so far.

    Raises:
        FileNotFoundError: the folder holds no log.
        ValueError: a file is not what a run writes.
    """
    if not (run / LOG).is_file():
        raise FileNotFoundError(f"{run} holds no {LOG}; give the folder of a run that has reported once")
    settings = run / RUN_CONFIG
    answers, answered_in = _answers(run)
    return RunFiles(
        name=run.resolve().name,
        log=_read_rows(run / LOG),
        settings=settings.read_text(encoding="utf-8") if settings.is_file() else "",
        results=read_results(run),
        answers=answers,
        answered_in=answered_in,
    )


def write_report(run: Path, path: Path, *, num_samples: int = 12) -> None:
    """Write the report of a run as one HTML file.

    Args:
        path: of the file.
        num_samples: samples whose answers are shown, evenly spread.

    Raises:
        FileNotFoundError, ValueError: see `read_run`.
    """
    files = read_run(run)
    title = html.escape(files.name)
    body = "\n".join(
        [
            f"<h1>{title}</h1>",
            f"<p>{html.escape(_summary(files))}</p>",
            *_section("Curves", [_plot(files.log)]),
            *_section("Losses", [_loss_table(files.log)]),
            *_section("Evaluation", [_result_table(files.results)] if files.results else []),
            *_section(f"Answers ({files.answered_in})", _answer_table(files.answers, num_samples)),
            *_section("Settings", [f"<pre>{html.escape(files.settings)}</pre>"] if files.settings else []),
        ]
    )
    head = f'<meta charset="utf-8"><title>{title}</title><style>{STYLE}</style>'
    write_text_whole(path, f'<!doctype html>\n<html lang="en"><head>{head}</head>\n<body>\n{body}\n</body></html>\n')


def curves(log: Rows) -> dict[str, dict[str, list[tuple[int, float]]]]:
    """Sort the reports of a run into curves.

    Returns:
        By figure, such as `loss`, `eval_loss` and `eval_wer`, and by what it is of, such as a budget ("" for all
        together): steps and values.
    """
    sorted_out: dict[str, dict[str, list[tuple[int, float]]]] = {}
    for row in log:
        for name, value in row.items():
            figure, _, of = name.partition("/")
            is_shown = figure == TRAINING_LOSS or (figure.startswith("eval_") and not figure.endswith("_second"))
            if is_shown and figure != "eval_runtime" and isinstance(value, int | float):
                sorted_out.setdefault(figure, {}).setdefault(of, []).append((int(row["step"]), float(value)))
    return sorted_out


def read_results(run: Path) -> Rows:
    """Read the rows of every evaluation in a run folder, each with the name of its folder."""
    return [
        {"evaluation": str(path.parent.relative_to(run)), **row}
        for path in sorted(run.glob(EVALUATIONS + RESULTS))
        for row in json.loads(path.read_text(encoding="utf-8"))["rows"]
    ]


def _answers(run: Path) -> tuple[Rows, str]:
    """Find answers at several budgets: those of the newest evaluation, or else of the last validation."""
    found = sorted(run.glob(EVALUATIONS + HYPOTHESES), key=lambda path: path.stat().st_mtime)
    found = found or [path for path in [run / VALIDATION_ANSWERS] if path.is_file()]
    if not found:
        return [], "none"
    name = "the last validation" if found[-1].parent == run else str(found[-1].parent.relative_to(run))
    return [row for row in _read_rows(found[-1]) if "error" not in row], name


def _read_rows(path: Path) -> Rows:
    rows = []
    for number, line in numbered_lines(path):
        try:
            rows.append(read_object(line))
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: {error}") from error
    return rows


def _summary(files: RunFiles) -> str:
    settings = yaml.safe_load(files.settings) if files.settings else {}
    planned = (settings.get("train") or {}).get("max_steps")
    step = files.log[-1]["step"] if files.log else 0
    return f"step {step}" + (f" of {planned}" if planned else "")


def _section(title: str, parts: Sequence[str]) -> list[str]:
    return [f"<h2>{html.escape(title)}</h2>", *parts] if parts else []


def _plot(log: Rows) -> str:
    """Draw every figure of the log against the step, a line per budget, as SVG."""
    import matplotlib as mpl
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    shown = curves(log)
    if not shown:
        return "<p>no losses yet</p>"
    num_rows = (len(shown) + 1) // 2
    with mpl.rc_context({"svg.fonttype": "none"}):
        figure = Figure(figsize=(13, 4.2 * num_rows), layout="constrained")
        FigureCanvasSVG(figure)
        axes = figure.subplots(num_rows, 2, squeeze=False).flat
        for axis, (name, lines) in zip(axes, shown.items(), strict=False):
            for of, points in sorted(lines.items()):
                axis.plot(*zip(*points, strict=True), label=of or "all", linewidth=2.2 if not of else 1.2, marker=".")
            axis.set_title(name.replace("eval_", "validation: ") if name != TRAINING_LOSS else "training: loss")
            axis.set_xlabel("step")
            axis.legend(fontsize=8, frameon=False)
        for axis in axes:  # one is left where the number is odd
            axis.set_axis_off()
        text = io.StringIO()
        figure.savefig(text, format="svg")
    return re.sub(r"^.*?(?=<svg)", "", text.getvalue(), flags=re.S)


def _loss_table(log: Rows) -> str:
    """Say of every curve where it began, where it is, and where it was lowest and highest."""
    lines = [
        [f"{figure} {of}".strip(), _number(points[0][1]), _number(points[-1][1]), *_extremes(points)]
        for figure, by_budget in curves(log).items()
        for of, points in sorted(by_budget.items())
    ]
    return _table(["", "first", "last", "lowest", "at step", "highest", "at step"], lines)


def _extremes(points: Sequence[tuple[int, float]]) -> list[str]:
    lowest, highest = min(points, key=lambda point: point[1]), max(points, key=lambda point: point[1])
    return [_number(lowest[1]), str(lowest[0]), _number(highest[1]), str(highest[0])]


def _result_table(results: Rows) -> str:
    titles = ["evaluation", "set", "task", "kind", "snr_db", "budget", "metric", "value", "low", "high", "soft_tokens"]
    lines = [[_cell(row.get(title)) for title in titles] for row in results]
    return _table(titles, lines)


def _answer_table(answers: Rows, count: int) -> list[str]:
    """Lay answers out, a line per sample and a column per budget."""
    by_sample: dict[str, list[Mapping[str, Any]]] = {}
    for row in answers:
        noise = "" if row.get("snr_db") is None else f" at {row['snr_db']:g} dB"
        by_sample.setdefault(f"{row.get('set', '')} {row['id']}{noise}".strip(), []).append(row)
    names = list(by_sample)
    chosen = names if len(names) <= count else [names[number * len(names) // count] for number in range(count)]
    by_budgets: dict[tuple[str, ...], list[list[str]]] = {}
    for name in chosen:
        rows = by_sample[name]
        budgets = tuple(str(row["budget"]) for row in rows)
        line = [name, _asked(rows[0]), " | ".join(rows[0]["references"]), *(str(row["hypothesis"]) for row in rows)]
        by_budgets.setdefault(budgets, []).append(line)
    return [_table(["sample", "asked", "right", *budgets], lines) for budgets, lines in by_budgets.items()]


def _asked(row: Mapping[str, Any]) -> str:
    return str(row.get("question") or row["task"])


def _table(titles: Iterable[str], lines: Iterable[Sequence[str]]) -> str:
    head = "".join(f"<th>{html.escape(title)}</th>" for title in titles)
    body = "\n".join(
        "<tr>" + "".join(f"<td{_class(cell)}>{html.escape(cell)}</td>" for cell in line) + "</tr>" for line in lines
    )
    return f"<table><tr>{head}</tr>\n{body}</table>"


def _class(cell: str) -> str:
    return ' class="number"' if re.fullmatch(r"-?[\d.]+(e-?\d+)?", cell) else ""


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return _number(value) if isinstance(value, float) else str(value)


def _number(value: float) -> str:
    return f"{value:.4g}"
