"""Reports what the long demo of images found: accuracy per kind of question and count, elastic beside separate.

Knows answers on disk and whether they are right. Does not know how models were made.

The plot shows accuracy against soft tokens. A cell is one kind of question (or all) at one count; the bootstrap
resamples scenes, each with its questions of that kind. Which files there are, and what a cell is, see `cells.py`.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from mllm.synthetic.demo.cells import (
    Cell,
    Comparison,
    Estimate,
    answers,
    draw_line,
    empty_figure,
    gap_text,
    pooled_cell,
    table,
)
from mllm.synthetic.demo.full_images import COUNTS, STYLES, FullImagesConfig, image_jobs
from mllm.synthetic.demo.report import Finding
from mllm.synthetic.images.questions import COARSE_KINDS, DETAIL_KINDS, KINDS

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NAMES = {"m3": "M3 (pooled)", "haar": "Haar (pooled, nested)", "mqt": "MQT (queries)"}
ALL = "all"
MARGIN = 0.01
"""An elastic model is as good as a separate one when its accuracy is less than one point lower."""
Key = tuple[str, bool, str, int]
"""Style, whether the model is elastic, kind of question, soft tokens."""
Cells = Mapping[Key, Cell]


def read_cells(settings: FullImagesConfig) -> dict[Key, Cell]:
    """Count wrong answers and questions of all models, from the answers in their folders.

    Raises:
        ValueError: an evaluation with samples that could not be answered; the folder is named.
    """
    counts: dict[Key, dict[tuple[int, str], tuple[int, int]]] = {}
    for job in image_jobs(settings):
        for line in answers(settings.out, job.name):
            wrong = int(line["hypothesis"].strip() != line["references"][0].strip())
            tokens, scene = int(line["budget"].partition("=")[2]), line["id"].removesuffix(f"-{line['kind']}")
            for kind in (line["kind"], ALL):
                by_scene = counts.setdefault((job.style, job.count is None, kind, tokens), {})
                before = by_scene.get((job.seed, scene), (0, 0))
                by_scene[job.seed, scene] = before[0] + wrong, before[1] + 1
    return {key: pooled_cell(by_scene) for key, by_scene in counts.items()}


def compare(settings: FullImagesConfig) -> Comparison:
    """Compare elastic and separate models by all their answers."""
    cells = read_cells(settings)
    return Comparison([_row(cells, *key) for key in cells], findings(cells), markdown(cells), plot_accuracies(cells))


def findings(cells: Cells) -> list[Finding]:
    """Judge whether each elastic model is as good as separate ones, and whether detail needs tokens and a glance does
    not."""
    judged = []
    for style in STYLES:
        gaps = [_gap(cells, style, ALL, count)[0] for count in COUNTS]
        judged.append(
            Finding(
                f"{NAMES[style]}: elastic within one point of separate models at each count, or better",
                ", ".join(f"{count}: {100 * gap:+.1f}" for count, gap in zip(COUNTS, gaps, strict=True)),
                all(gap >= -MARGIN for gap in gaps),
            )
        )
        detail = [_mean(cells, style, DETAIL_KINDS, count) for count in reversed(COUNTS)]
        coarse = [_mean(cells, style, COARSE_KINDS, count) for count in reversed(COUNTS)]
        judged.append(
            Finding(
                f"{NAMES[style]}, elastic: questions of detail need tokens (accuracy at 1, 4, 16, 64)",
                ", ".join(f"{100 * value:.1f}" for value in detail),
                detail[0] < detail[1] < detail[2] < detail[3],
            )
        )
        judged.append(
            Finding(
                f"{NAMES[style]}, elastic: questions about the whole image do not (accuracy at 1, 4, 16, 64)",
                ", ".join(f"{100 * value:.1f}" for value in coarse),
                max(coarse) - min(coarse) <= 0.05,
            )
        )
    return judged


def markdown(cells: Cells) -> str:
    """Write a table per style: kinds of questions by counts, elastic beside separate, then gaps with intervals."""
    parts = []
    for style in STYLES:
        lines = {}
        for kind in (*KINDS, ALL):
            pairs = [[1 - cells[style, elastic, kind, count].value for elastic in (True, False)] for count in COUNTS]
            lines[kind] = [f"{100 * a:.1f} / {100 * b:.1f}" for a, b in pairs]
        lines["elastic - separate"] = [gap_text(_gap(cells, style, ALL, count)) for count in COUNTS]
        seeds = [cells[style, True, ALL, count].by_seed for count in COUNTS]
        lines["seeds, elastic"] = [f"{100 * (1 - max(rates)):.1f}-{100 * (1 - min(rates)):.1f}" for rates in seeds]
        columns = ["accuracy %, elastic / separate", *(f"{count} tokens" for count in COUNTS)]
        parts.append(table(NAMES[style], columns, lines))
    return "\n".join(parts)


def plot_accuracies(cells: Cells) -> "Figure":
    """Plot a panel per kind of question: accuracy against soft tokens, a line per style, separate models dashed."""
    figure = empty_figure(13, 6.5, dpi=100)
    colors = dict(zip(STYLES, ("tab:blue", "tab:orange", "tab:green"), strict=True))
    axes = figure.subplots(2, 4).flatten().tolist()
    for kind, axis in zip((*KINDS, ALL), axes, strict=False):
        for style in STYLES:
            for elastic in (True, False):
                draw_line(
                    axis,
                    COUNTS,
                    [_accuracy(cells[style, elastic, kind, count]) for count in COUNTS],
                    bars=elastic,
                    color=colors[style],
                    linestyle="-" if elastic else ":",
                    marker="o" if elastic else "x",
                    label=f"{NAMES[style]}, {'elastic' if elastic else 'separate'}",
                )
        axis.set(title=kind, xlabel="soft tokens", ylabel="accuracy, %")
        axis.set_xscale("log", base=4)
        axis.grid(alpha=0.3)
    axes[-1].axis("off")
    axes[-1].legend(*axes[0].get_legend_handles_labels(), loc="center")
    return figure


def _row(cells: Cells, style: str, elastic: bool, kind: str, count: int) -> dict[str, Any]:
    cell = cells[style, elastic, kind, count]
    row: dict[str, Any] = {"style": style, "elastic": elastic, "kind": kind, "tokens": count}
    row |= zip(("accuracy", "low", "high"), _accuracy(cell), strict=True)
    row["by_seed"] = [1 - value for value in cell.by_seed]
    if elastic:
        row["minus_separate"] = _gap(cells, style, kind, count)
    return row


def _accuracy(cell: Cell) -> Estimate:
    low, high = cell.interval
    return 1 - cell.value, 1 - high, 1 - low


def _gap(cells: Cells, style: str, kind: str, count: int) -> Estimate:
    """Compute how much higher the elastic accuracy is: errors the other way round."""
    return cells[style, False, kind, count].minus(cells[style, True, kind, count])


def _mean(cells: Cells, style: str, kinds: Sequence[str], count: int) -> float:
    return sum(1 - cells[style, True, kind, count].value for kind in kinds) / len(kinds)
