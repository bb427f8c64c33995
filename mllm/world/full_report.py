"""What the long demo found: error rates of elastic and separate models, cell by cell, and how far they are apart.

Knows answers on disk and word errors. Does not know how models were made.

    out/comparison.json     every cell, every difference and every finding
    out/comparison.md       the table
    out/comparison.png      error rates against soft tokens per second of speech

A cell is one task at one budget and one noise. Its error rate is that of all seeds together, errors over words; its
interval draws utterances again (each with its answers of all seeds). A difference draws the same utterances for both.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mllm.budget import Budget
from mllm.evaluation.hypotheses import HYPOTHESES, write_whole
from mllm.metrics import bootstrap_interval, word_errors
from mllm.world.demo_report import Finding
from mllm.world.full_demo import (
    AUDIO_RATES,
    ELASTIC,
    SEPARATE,
    SNRS_DB,
    VIDEO_RATES,
    FullDemoSettings,
    jobs_of,
)

MODELS = (SEPARATE, *ELASTIC)
NAMES = {SEPARATE: "separate", "omni_st": "Omni ST", "mome": "MoME"}
FRAMES_PER_SECOND = {"audio": 50, "video": 25}
MARGIN = 0.01
"""An elastic model is as good as separate ones when it is less than one point of word error rate worse."""


@dataclass(frozen=True)
class Place:
    """A column of the table in a block of one noise: task and budget."""

    task: str
    budget: str
    snr_db: float | None

    @property
    def words(self) -> str:
        """As the papers write it: task and rates."""
        rates = [str(amount.value) for amount in Budget.parse(self.budget).amounts.values()]
        return f"{self.task.upper()} ({','.join(rates)})"

    @property
    def tokens_per_second(self) -> float:
        """Soft tokens that a second of speech costs."""
        amounts = Budget.parse(self.budget).amounts
        return sum(FRAMES_PER_SECOND[medium] / float(amount.value) for medium, amount in amounts.items())


@dataclass(frozen=True)
class Cell:
    """Errors and words of each test utterance, all seeds together, and the error rate of each seed."""

    errors: tuple[int, ...]
    words: tuple[int, ...]
    by_seed: tuple[float, ...]

    @property
    def value(self) -> float:
        """The word error rate."""
        return sum(self.errors) / sum(self.words)

    @property
    def interval(self) -> tuple[float, float]:
        """95 %, by the bootstrap over utterances."""
        found = bootstrap_interval(self.errors, self.words, seed=0)
        assert found is not None
        return found

    def minus(self, other: "Cell") -> tuple[float, float, float]:
        """How much higher this error rate is, and the 95 % interval of that, of the same utterances drawn for both."""
        assert self.words == other.words
        gaps = [own - its for own, its in zip(self.errors, other.errors, strict=True)]
        found = bootstrap_interval(gaps, self.words, seed=0)
        assert found is not None
        return self.value - other.value, *found


Cells = Mapping[tuple[str, Place], Cell]


def places() -> list[Place]:
    """Every cell there is for a model: blocks of noise, in each the columns of the papers."""
    speech = [("asr", f"audio=/{rate}") for rate in AUDIO_RATES]
    lips = [("vsr", f"video=/{rate}") for rate in VIDEO_RATES]
    both = [("avsr", f"audio=/{audio},video=/{video}") for audio in AUDIO_RATES for video in VIDEO_RATES]
    return [
        Place(task, budget, ratio)
        for ratio in SNRS_DB
        for task, budget in (*speech, *(lips if ratio is None else []), *both)
    ]


def read_cells(settings: FullDemoSettings) -> dict[tuple[str, Place], Cell]:
    """The cells of all models, from the answers in their folders.

    Raises:
        ValueError: an evaluation with samples that could not be answered; the folder is named.
    """
    counts: dict[tuple[str, Place], dict[tuple[int, str], tuple[int, int]]] = {}
    for job in jobs_of(settings):
        file = Path(settings.out) / job.name / "evaluation" / HYPOTHESES
        for line in map(json.loads, file.read_text(encoding="utf-8").splitlines()):
            if "error" in line:
                raise ValueError(f"{file} has no answer for {line['id']}: {line['error']}")
            own = word_errors(line["references"][0], line["hypothesis"])
            key = job.model, _place(line)
            counts.setdefault(key, {})[job.seed, line["id"]] = own.errors, own.reference_units
    return {key: pooled_cell(own) for key, own in counts.items()}


def comparison(cells: Cells) -> dict[str, Any]:
    """Everything as plain values: cells, differences of the elastic models from the separate ones, findings."""
    rows = []
    for place in places():
        for model in MODELS:
            own = cells[model, place]
            low, high = own.interval
            row = {"model": model, **asdict(place), "tokens_per_second": place.tokens_per_second}
            row |= {"wer": own.value, "low": low, "high": high, "by_seed": list(own.by_seed)}
            if model != SEPARATE:
                row["minus_separate"] = own.minus(cells[SEPARATE, place])
            rows.append(row)
    return {"rows": rows, "findings": [asdict(finding) for finding in findings(cells)]}


def findings(cells: Cells) -> list[Finding]:
    """Whether the elastic models are as good as separate ones in quiet, and whether lips help in noise."""
    found = []
    for model in ELASTIC:
        gaps = [
            (place, cells[model, place].value - cells[SEPARATE, place].value)
            for place in places()
            if place.snr_db is None
        ]
        found.append(
            Finding(
                f"{NAMES[model]} is within one point of separate models at each rate in quiet (WER minus theirs)",
                ", ".join(f"{place.words} {100 * gap:+.1f}" for place, gap in gaps),
                all(gap <= MARGIN for _, gap in gaps),
            )
        )
    for model in MODELS:
        for ratio in (own for own in SNRS_DB if own is not None):
            hears, sees = {}, {}
            for place in places():
                if place.snr_db == ratio:
                    audio = str(Budget.parse(place.budget).amounts["audio"])
                    (hears if place.task == "asr" else sees).setdefault(audio, []).append(cells[model, place].value)
            found.append(
                Finding(
                    f"{NAMES[model]}: with lips fewer errors than without at {ratio:g} dB (worst of AVSR, ASR)",
                    ", ".join(f"audio={rate} {100 * max(sees[rate]):.1f} {100 * hears[rate][0]:.1f}" for rate in hears),
                    all(max(sees[rate]) < hears[rate][0] for rate in hears),
                )
            )
    return found


def markdown(cells: Cells) -> str:
    """A table per noise, laid out as the papers do: models by tasks and rates, with intervals and the seeds."""
    parts = []
    for ratio in SNRS_DB:
        own = [place for place in places() if place.snr_db == ratio]
        parts.append(f"### {'Quiet' if ratio is None else f'{ratio:g} dB'}\n")
        parts.append("| WER % | " + " | ".join(place.words for place in own) + " |")
        parts.append("|---|" + "---|" * len(own))
        for model in MODELS:
            parts.append(f"| {NAMES[model]} | " + " | ".join(_words(cells[model, place]) for place in own) + " |")
        for model in ELASTIC:
            gaps = [cells[model, place].minus(cells[SEPARATE, place]) for place in own]
            words = [f"{100 * gap:+.1f} ({100 * low:+.1f} to {100 * high:+.1f})" for gap, low, high in gaps]
            parts.append(f"| {NAMES[model]} - separate | " + " | ".join(words) + " |")
        parts.append("")
    return "\n".join(parts)


def write_comparison(settings: FullDemoSettings) -> list[Finding]:
    """Read all answers, write the comparison into the folder of the demo, and return what it shows."""
    out = Path(settings.out)
    cells = read_cells(settings)
    write_whole(out / "comparison.json", json.dumps(comparison(cells), indent=1) + "\n")
    write_whole(out / "comparison.md", markdown(cells))
    draw(cells, out / "comparison.png")
    return findings(cells)


def draw(cells: Cells, path: Path) -> None:
    """A panel per task: error rate against soft tokens per second, a line per model and noise, with intervals."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 4.5), layout="constrained")
    FigureCanvasAgg(figure)  # needs no display
    colors = dict(zip(MODELS, ("tab:gray", "tab:blue", "tab:orange"), strict=True))
    styles = dict(zip(SNRS_DB, ("-", "--", ":"), strict=True))
    for task, axis in zip(("asr", "vsr", "avsr"), figure.subplots(1, 3), strict=True):
        for model in MODELS:
            for ratio in SNRS_DB:
                own = sorted(
                    (place for place in places() if (place.task, place.snr_db) == (task, ratio)),
                    key=lambda place: place.tokens_per_second,
                )
                if own:
                    _line(axis, own, [cells[model, place] for place in own], colors[model], styles[ratio])
        axis.set_title(task.upper())
        axis.set_xlabel("soft tokens per second")
        axis.set_ylabel("word error rate, %")
        axis.grid(alpha=0.3)
    handles = [figure.axes[0].plot([], [], color=colors[model], label=NAMES[model])[0] for model in MODELS]
    handles += [
        figure.axes[0].plot([], [], color="k", linestyle=style, label="quiet" if ratio is None else f"{ratio:g} dB")[0]
        for ratio, style in styles.items()
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles))
    figure.savefig(path, dpi=110)


def _line(axis: Any, own: Sequence[Place], found: Sequence[Cell], color: str, style: str) -> None:
    values = [100 * cell.value for cell in found]
    below = [100 * (cell.value - cell.interval[0]) for cell in found]
    above = [100 * (cell.interval[1] - cell.value) for cell in found]
    seconds = [place.tokens_per_second for place in own]
    axis.errorbar(seconds, values, yerr=[below, above], color=color, linestyle=style, marker="o", capsize=2)


def _place(line: Mapping[str, Any]) -> Place:
    return Place(line["task"], line["budget"], None if line["task"] == "vsr" else line["snr_db"])


def pooled_cell(counts: Mapping[tuple[int, str], tuple[int, int]]) -> Cell:
    """A cell of errors and units by seed and utterance (or whatever the bootstrap draws)."""
    seeds = sorted({seed for seed, _ in counts})
    utterances = sorted({sample for _, sample in counts})
    by_utterance = [[counts[seed, sample] for seed in seeds] for sample in utterances]
    by_seed = [_rate(counts[seed, sample] for sample in utterances) for seed in seeds]
    errors = tuple(sum(one for one, _ in own) for own in by_utterance)
    return Cell(errors, tuple(sum(words for _, words in own) for own in by_utterance), tuple(by_seed))


def _rate(counts: Iterable[tuple[int, int]]) -> float:
    pairs = list(counts)
    return sum(errors for errors, _ in pairs) / sum(words for _, words in pairs)


def _words(cell: Cell) -> str:
    low, high = cell.interval
    seeds = f"{100 * min(cell.by_seed):.1f}-{100 * max(cell.by_seed):.1f}"
    return f"{100 * cell.value:.1f} ({100 * low:.0f}-{100 * high:.0f}; seeds {seeds})"
