"""Reports what the demo on real weights finds: a table, a plot and transcripts of some recordings at every rate.

Knows rows and lines of an evaluation, and Whisper's own transcripts. Does not know how they came about.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mllm.evaluation.answer_store import Line
from mllm.evaluation.scoring import Score, score_speech
from mllm.real.sentences import DIGITS, normalise
from mllm.synthetic.demo.report import Finding
from mllm.utils.files import write_text_whole
from mllm.utils.markdown import markdown_table

REPORT, PLOT = "report.md", "rates.png"
SETS = {"test": "real recordings", "heldout": "synthesised, held out"}
NUM_TRANSCRIPTS = 8


MOST_WRONG_PERCENT = 40
"""What a run may miss at its two dearest rates: one had 29.9 and 33.4 %, and runs differ by how threads add up."""


@dataclass(frozen=True)
class RealFindings:
    """Holds what the demo found.

    Args:
        scores: word error rates by set and budget.
        whisper: Whisper's own word error rate on the recordings.
        soft_tokens: mean per recording, by budget.
        transcripts: Markdown tables of some recordings, by reference.
    """

    scores: Mapping[tuple[str, str], Score]
    whisper: Score
    soft_tokens: Mapping[str, float]
    transcripts: str

    @property
    def budgets(self) -> list[str]:
        """The budgets, dearest first."""
        return list(self.soft_tokens)

    @property
    def findings(self) -> list[Finding]:
        """Judge whether the model listens, and whether tokens buy words, from the point estimates."""
        values = [_value(self.scores["test", budget]) for budget in self.budgets]
        shown = ", ".join(f"{value:.1f}" for value in values)
        return [
            Finding(
                f"at least {100 - MOST_WRONG_PERCENT} % of the words of real recordings are right at "
                f"{' and '.join(self.budgets[:2])} (WER)",
                shown,
                max(values[:2]) <= MOST_WRONG_PERCENT,
            ),
            Finding(
                f"at {self.budgets[-1]} there are fewer tokens than words need (WER, dearest first)",
                shown,
                values[-1] > min(values),
            ),
        ]

    @property
    def table(self) -> str:
        """Tabulate word error rates in percent with 95 % intervals, as Markdown."""
        head = ["budget", "soft tokens", *[f"WER, {name}" for name in SETS.values()]]
        lines = [
            [f"`{budget}`", f"{self.soft_tokens[budget]:.1f}", *[_percent(self.scores[name, budget]) for name in SETS]]
            for budget in self.budgets
        ]
        return markdown_table(head, [*lines, ["Whisper base itself", "", _percent(self.whisper), ""]])

    def write(self, folder: Path) -> None:
        """Write the table with the transcripts, and the plot."""
        text = f"{self.table}\n\n![Word error rate against soft tokens]({PLOT})\n\n{self.transcripts}\n"
        write_text_whole(folder / REPORT, text)
        _plot(self, folder / PLOT)


def compare(lines: Sequence[Line], whisper: Mapping[str, str], *, seed: int) -> RealFindings:
    """Score every rate and Whisper itself on the same recordings.

    Args:
        lines: answers to both sets at every budget.
        whisper: Whisper's texts by recording.
        seed: of the bootstrap intervals.

    Raises:
        ValueError: a recording was not answered.
    """
    if failed := [line["id"] for line in lines if "error" in line]:
        raise ValueError(f"{len(failed)} clips were not answered, the first is {failed[0]}")
    recordings = [line for line in lines if line["set"] == "test"]
    spent: dict[str, list[int]] = {}
    for line in recordings:
        spent.setdefault(line["budget"], []).append(sum(line["tokens"].values()))
    means = {budget: sum(counts) / len(counts) for budget, counts in spent.items()}
    budgets = sorted(means, key=lambda budget: -means[budget])
    scores = {
        (name, budget): score_speech([line for line in lines if (line["set"], line["budget"]) == (name, budget)], seed)
        for name in SETS
        for budget in budgets
    }
    texts = {f"test/{name}": spoken_by_whisper(text) for name, text in whisper.items()}
    once = [line for line in recordings if line["budget"] == budgets[0]]
    whisper_score = score_speech([{**line, "hypothesis": texts[line["id"]]} for line in once], seed)
    chosen = once[:: max(len(once) // NUM_TRANSCRIPTS, 1)][:NUM_TRANSCRIPTS]
    transcripts = "\n\n".join(_transcripts(line, recordings, budgets, texts) for line in chosen)
    return RealFindings(scores, whisper_score, {budget: means[budget] for budget in budgets}, transcripts)


def spoken_by_whisper(text: str) -> str:
    """Reduce what Whisper writes to lower-case words, its single digits written out as the references have them.

    >>> spoken_by_whisper("Press 1, or 2.")
    'press one or two'
    """
    return normalise(re.sub(r"\d", lambda digit: f" {DIGITS[int(digit[0])]} ", text))


def _transcripts(line: Line, recordings: Sequence[Line], budgets: Sequence[str], whisper: Mapping[str, str]) -> str:
    said = {other["budget"]: other["hypothesis"] for other in recordings if other["id"] == line["id"]}
    rows = [[f"`{budget}`", said[budget]] for budget in budgets]
    rows += [["Whisper base itself", whisper[line["id"]]], ["said", f"**{line['references'][0]}**"]]
    return markdown_table(["", line["id"].removeprefix("test/")], rows, of_numbers=False)


def _value(score: Score) -> float:
    """Give a word error rate in percent; there is one, since every recording has words."""
    assert score.value is not None
    return 100 * score.value


def _interval(score: Score) -> tuple[float, float]:
    """Give its 95 % interval, in percent."""
    assert score.low is not None
    assert score.high is not None
    return 100 * score.low, 100 * score.high


def _percent(score: Score) -> str:
    low, high = _interval(score)
    return f"{_value(score):.1f} ({low:.1f} to {high:.1f})"


def _plot(findings: RealFindings, path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    FigureCanvasAgg(figure)  # needs no display
    axis: Any = figure.subplots()
    positions = [findings.soft_tokens[budget] for budget in findings.budgets]
    for (key, name), mark in zip(SETS.items(), "os", strict=True):
        scores = [findings.scores[key, budget] for budget in findings.budgets]
        values = [_value(score) for score in scores]
        below = [value - _interval(score)[0] for value, score in zip(values, scores, strict=True)]
        above = [_interval(score)[1] - value for value, score in zip(values, scores, strict=True)]
        axis.errorbar(positions, values, yerr=[below, above], marker=mark, capsize=3, label=name)
    axis.axhline(_value(findings.whisper), color="gray", linestyle="--", label="Whisper base itself, real")
    for position, budget in zip(positions, findings.budgets, strict=True):
        axis.annotate(
            budget.removeprefix("audio="), (position, 0), textcoords="offset points", xytext=(0, 4), ha="center"
        )
    axis.set_xscale("log")
    axis.set_xticks(positions, [f"{position:.1f}" for position in positions])
    axis.minorticks_off()
    axis.set_ylim(bottom=0)
    axis.set_xlabel("soft tokens per recording (mean)")
    axis.set_ylabel("word error rate in % (lower is better)")
    axis.legend(frameon=False)
    figure.savefig(path, dpi=120)
