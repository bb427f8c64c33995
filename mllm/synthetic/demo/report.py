"""Shows what the demo found: a table of word error rates, one of accuracies, and what they were expected to show.

Knows rows of an evaluation. Does not know how they came about.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.table import Table

from mllm.synthetic.images.questions import COARSE_KINDS, DETAIL_KINDS, KINDS

NOISES = {"quiet": None, "0 dB": 0.0}
Rows = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Finding:
    """A finding is something the demo should show, the numbers it was judged by, and whether it held."""

    claim: str
    numbers: str
    holds: bool


def speech_table(rows: Rows) -> Table:
    """Tabulate word error rates: one line per task and budget, in quiet and at 0 dB, with 95 % intervals."""
    table = Table(title="Word error rate, % (95 % interval)", title_justify="left")
    for name in ("task", "budget", "soft tokens", *NOISES):
        table.add_column(name, justify="left" if name in ("task", "budget") else "right")
    for task in ("asr", "vsr", "avsr"):
        of_task = [row for row in rows if row["task"] == task]
        for budget in dict.fromkeys(row["budget"] for row in of_task):
            cells = {row["snr_db"]: row for row in of_task if row["budget"] == budget}
            tokens = next(iter(cells.values()))["soft_tokens"]
            table.add_row(task, budget, f"{tokens:.0f}", *(_cell(cells.get(ratio)) for ratio in NOISES.values()))
        table.add_section()
    return table


def image_table(rows: Rows) -> Table:
    """Tabulate accuracies: one line per kind of question, one column per number of tokens."""
    answered = [row for row in rows if row["task"] == "vqa"]
    budgets = sorted({row["budget"] for row in answered}, key=lambda budget: int(budget.partition("=")[2]))
    table = Table(title="Accuracy on images, % (95 % interval)", title_justify="left")
    table.add_column("question")
    for budget in budgets:
        table.add_column(budget, justify="right")
    for kind in (*KINDS, None):
        cells = {row["budget"]: row for row in answered if row["kind"] == kind}
        table.add_row(kind or "all", *(_cell(cells.get(budget)) for budget in budgets))
    return table


def findings(rows: Rows) -> list[Finding]:
    """Judge whether the demo shows what it is there to show, from the point estimates."""
    audio = [_value(rows, "asr", f"audio=/{rate}") for rate in (4, 8, 16)]
    noisy = [
        _value(rows, "avsr", "audio=/4,video=/2", snr_db=0.0),
        _value(rows, "asr", "audio=/4", snr_db=0.0),
        _value(rows, "vsr", "video=/2"),
    ]
    detail = [_mean(rows, DETAIL_KINDS, f"image={count}") for count in (1, 4, 16, 64)]
    coarse = [_mean(rows, COARSE_KINDS, f"image={count}") for count in (1, 4, 16, 64)]
    return [
        Finding(
            "fewer audio tokens cost words (WER at /4, /8, /16 in quiet)",
            _list(audio),
            audio[0] < audio[1] < audio[2],
        ),
        Finding(
            "at 0 dB audio and video together beat either alone (WER of both, audio, video)",
            _list(noisy),
            noisy[0] < min(noisy[1:]),
        ),
        Finding(
            "questions of detail need tokens (accuracy on colour, letter and relation at 1, 4, 16, 64)",
            _list(detail),
            detail[0] < detail[1] < detail[2] <= detail[3] + 0.02,
        ),
        Finding(
            "questions about the whole image do not (accuracy on time and ground at 1, 4, 16, 64)",
            _list(coarse),
            max(coarse) - min(coarse) <= 0.05,
        ),
    ]


def _value(rows: Rows, task: str, budget: str, *, kind: str | None = None, snr_db: float | None = None) -> float:
    wanted = (task, kind, snr_db, budget)
    values = [row["value"] for row in rows if (row["task"], row["kind"], row["snr_db"], row["budget"]) == wanted]
    if len(values) != 1:
        raise ValueError(f"the evaluation holds {len(values)} rows of {wanted}; expected one")
    return values[0]


def _mean(rows: Rows, kinds: Sequence[str], budget: str) -> float:
    return sum(_value(rows, "vqa", budget, kind=kind) for kind in kinds) / len(kinds)


def _list(values: Sequence[float]) -> str:
    return ", ".join(f"{100 * value:.1f}" for value in values)


def _cell(row: Mapping[str, Any] | None) -> str:
    if row is None:
        return ""
    return f"{100 * row['value']:.1f} ({100 * row['low']:.0f}-{100 * row['high']:.0f})"
