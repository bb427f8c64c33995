"""Holds what the reports of the long demos share: cells with intervals, their table, their plot, and their files.

Knows answers on disk, counts of errors, Markdown and matplotlib. Does not know what is counted, or of which models.

    out/comparison.json     every cell, every difference and every finding
    out/comparison.md       the tables
    out/comparison.png      the plot

A cell is what one table entry is made of. Its error rate is that of all seeds together, errors over units; its interval
resamples the test samples (each with its answers of all seeds). A difference resamples the same ones for both sides.
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mllm.evaluation.answer_store import HYPOTHESES
from mllm.evaluation.metrics import bootstrap_interval
from mllm.synthetic.demo.report import Finding
from mllm.utils.files import write_text_whole
from mllm.utils.markdown import markdown_table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Estimate = tuple[float, float, float]
"""A value, and the ends of its 95 % interval."""


@dataclass(frozen=True)
class Cell:
    """A cell holds errors and units (words, questions) of each test sample, all seeds together, and the rate of each
    seed."""

    errors: tuple[int, ...]
    units: tuple[int, ...]
    by_seed: tuple[float, ...]

    @property
    def value(self) -> float:
        """The error rate, errors over units."""
        return sum(self.errors) / sum(self.units)

    @property
    def interval(self) -> tuple[float, float]:
        """The 95 % interval of the error rate, by the bootstrap over samples."""
        interval = bootstrap_interval(self.errors, self.units, seed=0)
        assert interval is not None
        return interval

    def minus(self, other: "Cell") -> Estimate:
        """Compute how much higher this error rate is than another's, resampling the same samples for both."""
        assert self.units == other.units
        differences = [here - there for here, there in zip(self.errors, other.errors, strict=True)]
        interval = bootstrap_interval(differences, self.units, seed=0)
        assert interval is not None
        return self.value - other.value, *interval


@dataclass(frozen=True)
class Comparison:
    """A comparison is what a long demo found: rows of plain values, findings, tables and a plot."""

    rows: list[dict[str, Any]]
    findings: list[Finding]
    markdown: str
    figure: "Figure"

    def write(self, out: Path) -> None:
        """Write it into the folder of the demo."""
        whole = {"rows": self.rows, "findings": [asdict(finding) for finding in self.findings]}
        write_text_whole(out / "comparison.json", json.dumps(whole, indent=1) + "\n")
        write_text_whole(out / "comparison.md", self.markdown)
        self.figure.savefig(out / "comparison.png")


def answers(out: str, name: str) -> Iterator[dict[str, Any]]:
    """Read the answers of one model of a demo.

    Raises:
        ValueError: a sample could not be answered; the file is named.
    """
    file = Path(out) / name / "evaluation" / HYPOTHESES
    for line in map(json.loads, file.read_text(encoding="utf-8").splitlines()):
        if "error" in line:
            raise ValueError(f"{file} has no answer for {line['id']}: {line['error']}")
        yield line


def pooled_cell(counts: Mapping[tuple[int, str], tuple[int, int]]) -> Cell:
    """Make a cell of errors and units by seed and sample (an utterance, a scene: what the bootstrap resamples)."""
    seeds = sorted({seed for seed, _ in counts})
    samples = sorted({sample for _, sample in counts})
    by_sample = [[counts[seed, sample] for seed in seeds] for sample in samples]
    by_seed = [_rate(counts[seed, sample] for sample in samples) for seed in seeds]
    errors = tuple(sum(errors for errors, _ in pairs) for pairs in by_sample)
    return Cell(errors, tuple(sum(units for _, units in pairs) for pairs in by_sample), tuple(by_seed))


def _rate(counts: Iterable[tuple[int, int]]) -> float:
    pairs = list(counts)
    return sum(errors for errors, _ in pairs) / sum(units for _, units in pairs)


def gap_text(gap: Estimate) -> str:
    """Write a difference in points, with its interval."""
    value, low, high = (100 * one for one in gap)
    return f"{value:+.1f} ({low:+.1f} to {high:+.1f})"


def table(title: str, columns: Sequence[str], lines: Mapping[str, Sequence[str]]) -> str:
    """Write a heading and a Markdown table: what stands in the first column, and the rest of its line."""
    rows = [[name, *cells] for name, cells in lines.items()]
    return f"### {title}\n\n{markdown_table(columns, rows, of_numbers=False)}\n"


def empty_figure(width: float, height: float, *, dpi: int) -> "Figure":
    """Make an empty figure of so many inches."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=dpi, layout="constrained")
    FigureCanvasAgg(figure)  # needs no display
    return figure


def draw_line(
    axis: Any, positions: Sequence[float], values: Sequence[Estimate], *, bars: bool = True, **style: Any
) -> None:
    """Draw values in percent, with their intervals where there are `bars`, as matplotlib's `style` says."""
    below = [100 * (value - low) for value, low, _ in values]
    above = [100 * (high - value) for value, _, high in values]
    middles = [100 * value for value, _, _ in values]
    axis.errorbar(positions, middles, yerr=[below, above] if bars else None, capsize=2, **style)
