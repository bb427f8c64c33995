"""Reports what the long demo of speech found: error rates of elastic and separate models, cell by cell, and their gaps.

Knows answers on disk and word errors. Does not know how models were made.

The plot shows error rates against soft tokens per second of speech. A cell is one task at one budget and one noise;
the bootstrap resamples utterances. Which files there are, and what a cell is, see `cells.py`.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from mllm.budget import Budget
from mllm.evaluation.metrics import word_errors
from mllm.synthetic.demo.cells import Cell, Comparison, answers, draw_line, empty_figure, gap_text, pooled_cell, table
from mllm.synthetic.demo.full_speech import (
    AUDIO_RATES,
    ELASTIC,
    SEPARATE,
    SNRS_DB,
    VIDEO_RATES,
    FullDemoConfig,
    jobs_of,
)
from mllm.synthetic.demo.report import Finding

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MODELS = (SEPARATE, *ELASTIC)
NAMES = {SEPARATE: "separate", "omni_st": "Omni ST", "mome": "MoME"}
FRAMES_PER_SECOND = {"audio": 50, "video": 25}
MARGIN = 0.01
"""An elastic model is as good as separate ones when it is less than one point of word error rate worse."""


@dataclass(frozen=True)
class Column:
    """A column of the table: a task and a budget, in the block of one noise."""

    task: str
    budget: str
    snr_db: float | None

    @property
    def words(self) -> str:
        """The column's title, as the papers write it: task and rates."""
        rates = [str(amount.value) for amount in Budget.parse(self.budget).amounts.values()]
        return f"{self.task.upper()} ({','.join(rates)})"

    @property
    def tokens_per_second(self) -> float:
        """The soft tokens that a second of speech costs."""
        amounts = Budget.parse(self.budget).amounts
        return sum(FRAMES_PER_SECOND[medium] / float(amount.value) for medium, amount in amounts.items())


Cells = Mapping[tuple[str, Column], Cell]


def columns() -> list[Column]:
    """List every column there is for a model: blocks of noise, in each the columns of the papers."""
    speech = [("asr", f"audio=/{rate}") for rate in AUDIO_RATES]
    video = [("vsr", f"video=/{rate}") for rate in VIDEO_RATES]
    both = [("avsr", f"audio=/{audio},video=/{video}") for audio in AUDIO_RATES for video in VIDEO_RATES]
    return [
        Column(task, budget, ratio)
        for ratio in SNRS_DB
        for task, budget in (*speech, *(video if ratio is None else []), *both)
    ]


def read_cells(settings: FullDemoConfig) -> dict[tuple[str, Column], Cell]:
    """Count the errors of all models, from the answers in their folders.

    Raises:
        ValueError: an evaluation with samples that could not be answered; the folder is named.
    """
    counts: dict[tuple[str, Column], dict[tuple[int, str], tuple[int, int]]] = {}
    for job in jobs_of(settings):
        for line in answers(settings.out, job.name):
            count = word_errors(line["references"][0], line["hypothesis"])
            key = job.model, _column_of(line)
            counts.setdefault(key, {})[job.seed, line["id"]] = count.errors, count.reference_units
    return {key: pooled_cell(by_sample) for key, by_sample in counts.items()}


def compare(settings: FullDemoConfig) -> Comparison:
    """Compare elastic and separate models by all their answers."""
    cells = read_cells(settings)
    return Comparison(comparison_rows(cells), findings(cells), markdown(cells), plot_error_rates(cells))


def comparison_rows(cells: Cells) -> list[dict[str, Any]]:
    """Write cells as plain values, with the differences of the elastic models from the separate ones."""
    rows = []
    for column in columns():
        for model in MODELS:
            cell = cells[model, column]
            low, high = cell.interval
            row = {"model": model, **asdict(column), "tokens_per_second": column.tokens_per_second}
            row |= {"wer": cell.value, "low": low, "high": high, "by_seed": list(cell.by_seed)}
            if model != SEPARATE:
                row["minus_separate"] = cell.minus(cells[SEPARATE, column])
            rows.append(row)
    return rows


def findings(cells: Cells) -> list[Finding]:
    """Judge whether the elastic models are as good as separate ones in quiet, and whether video helps in noise."""
    judged = []
    for model in ELASTIC:
        gaps = [
            (column, cells[model, column].value - cells[SEPARATE, column].value)
            for column in columns()
            if column.snr_db is None
        ]
        judged.append(
            Finding(
                f"{NAMES[model]} is within one point of separate models at each rate in quiet (WER minus theirs)",
                ", ".join(f"{column.words} {100 * gap:+.1f}" for column, gap in gaps),
                all(gap <= MARGIN for _, gap in gaps),
            )
        )
    for model in MODELS:
        for ratio in (snr_db for snr_db in SNRS_DB if snr_db is not None):
            hears, sees = {}, {}
            for column in columns():
                if column.snr_db == ratio:
                    audio = str(Budget.parse(column.budget).amounts["audio"])
                    (hears if column.task == "asr" else sees).setdefault(audio, []).append(cells[model, column].value)
            judged.append(
                Finding(
                    f"{NAMES[model]}: with lips fewer errors than without at {ratio:g} dB (worst of AVSR, ASR)",
                    ", ".join(f"audio={rate} {100 * max(sees[rate]):.1f} {100 * hears[rate][0]:.1f}" for rate in hears),
                    all(max(sees[rate]) < hears[rate][0] for rate in hears),
                )
            )
    return judged


def markdown(cells: Cells) -> str:
    """Write a table per noise, laid out as the papers do: models by tasks and rates, with intervals and the seeds."""
    parts = []
    for ratio in SNRS_DB:
        block = [column for column in columns() if column.snr_db == ratio]
        lines = {NAMES[model]: [_words(cells[model, column]) for column in block] for model in MODELS}
        for model in ELASTIC:
            gaps = [cells[model, column].minus(cells[SEPARATE, column]) for column in block]
            lines[f"{NAMES[model]} - separate"] = [gap_text(gap) for gap in gaps]
        title = "Quiet" if ratio is None else f"{ratio:g} dB"
        parts.append(table(title, ["WER %", *(column.words for column in block)], lines))
    return "\n".join(parts)


def plot_error_rates(cells: Cells) -> "Figure":
    """Plot a panel per task: error rate against soft tokens per second, a line per model and noise, with intervals."""
    figure = empty_figure(13, 4.5, dpi=110)
    colors = dict(zip(MODELS, ("tab:gray", "tab:blue", "tab:orange"), strict=True))
    styles = dict(zip(SNRS_DB, ("-", "--", ":"), strict=True))
    for task, axis in zip(("asr", "vsr", "avsr"), figure.subplots(1, 3), strict=True):
        for model in MODELS:
            for ratio in SNRS_DB:
                block = sorted(
                    (column for column in columns() if (column.task, column.snr_db) == (task, ratio)),
                    key=lambda column: column.tokens_per_second,
                )
                if block:
                    values = [(cell.value, *cell.interval) for cell in (cells[model, column] for column in block)]
                    seconds = [column.tokens_per_second for column in block]
                    draw_line(axis, seconds, values, color=colors[model], linestyle=styles[ratio], marker="o")
        axis.set(title=task.upper(), xlabel="soft tokens per second", ylabel="word error rate, %")
        axis.grid(alpha=0.3)
    handles = [figure.axes[0].plot([], [], color=colors[model], label=NAMES[model])[0] for model in MODELS]
    handles += [
        figure.axes[0].plot([], [], color="k", linestyle=style, label="quiet" if ratio is None else f"{ratio:g} dB")[0]
        for ratio, style in styles.items()
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles))
    return figure


def _column_of(line: Mapping[str, Any]) -> Column:
    return Column(line["task"], line["budget"], None if line["task"] == "vsr" else line["snr_db"])


def _words(cell: Cell) -> str:
    low, high = cell.interval
    seeds = f"{100 * min(cell.by_seed):.1f}-{100 * max(cell.by_seed):.1f}"
    return f"{100 * cell.value:.1f} ({100 * low:.0f}-{100 * high:.0f}; seeds {seeds})"
