"""What the long demo of pictures found: accuracy per kind of question and count of tokens, elastic and separate.

Knows answers on disk and whether they are right. Does not know how models were made.

    out/comparison.json     every cell, every difference and every finding
    out/comparison.md       the tables
    out/comparison.png      accuracy against soft tokens

A cell is one kind of question (or all) at one count. Its interval draws scenes again, each with its questions of that
kind and its answers of all seeds; a difference draws the same scenes for both sides.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mllm.evaluation.hypotheses import HYPOTHESES, write_whole
from mllm.world.demo_report import Finding
from mllm.world.full_pictures import COUNTS, STYLES, FullPicturesSettings, picture_jobs
from mllm.world.full_report import Cell, pooled_cell
from mllm.world.questions import COARSE_KINDS, DETAIL_KINDS, KINDS

NAMES = {"m3": "M3 (pooled)", "haar": "Haar (pooled, nested)", "mqt": "MQT (queries)"}
ALL = "all"
MARGIN = 0.01
"""An elastic model is as good as a separate one when its accuracy is less than one point lower."""
Key = tuple[str, bool, str, int]
"""Style, whether the model is elastic, kind of question, soft tokens."""
Cells = Mapping[Key, Cell]


def read_cells(settings: FullPicturesSettings) -> dict[Key, Cell]:
    """Wrong answers and questions of all models, from the answers in their folders.

    Raises:
        ValueError: an evaluation with samples that could not be answered; the folder is named.
    """
    counts: dict[Key, dict[tuple[int, str], tuple[int, int]]] = {}
    for job in picture_jobs(settings):
        file = Path(settings.out) / job.name / "evaluation" / HYPOTHESES
        for line in map(json.loads, file.read_text(encoding="utf-8").splitlines()):
            if "error" in line:
                raise ValueError(f"{file} has no answer for {line['id']}: {line['error']}")
            wrong = int(line["hypothesis"].strip() != line["references"][0].strip())
            tokens, scene = int(line["budget"].partition("=")[2]), line["id"].removesuffix(f"-{line['kind']}")
            for kind in (line["kind"], ALL):
                own = counts.setdefault((job.style, job.count is None, kind, tokens), {})
                before = own.get((job.seed, scene), (0, 0))
                own[job.seed, scene] = before[0] + wrong, before[1] + 1
    return {key: pooled_cell(own) for key, own in counts.items()}


def findings(cells: Cells) -> list[Finding]:
    """Whether each elastic model is as good as separate ones, and whether detail needs tokens and a glance does not."""
    found = []
    for style in STYLES:
        gaps = [_gap(cells, style, ALL, count)[0] for count in COUNTS]
        found.append(
            Finding(
                f"{NAMES[style]}: elastic within one point of separate models at each count, or better",
                ", ".join(f"{count}: {100 * gap:+.1f}" for count, gap in zip(COUNTS, gaps, strict=True)),
                all(gap >= -MARGIN for gap in gaps),
            )
        )
        detail = [_mean(cells, style, DETAIL_KINDS, count) for count in reversed(COUNTS)]
        coarse = [_mean(cells, style, COARSE_KINDS, count) for count in reversed(COUNTS)]
        found.append(
            Finding(
                f"{NAMES[style]}, elastic: questions of detail need tokens (accuracy at 1, 4, 16, 64)",
                ", ".join(f"{100 * value:.1f}" for value in detail),
                detail[0] < detail[1] < detail[2] < detail[3],
            )
        )
        found.append(
            Finding(
                f"{NAMES[style]}, elastic: questions about the whole picture do not (accuracy at 1, 4, 16, 64)",
                ", ".join(f"{100 * value:.1f}" for value in coarse),
                max(coarse) - min(coarse) <= 0.05,
            )
        )
    return found


def markdown(cells: Cells) -> str:
    """A table per style: kinds of questions by counts, elastic beside separate; then the differences with intervals."""
    parts = []
    for style in STYLES:
        parts.append(f"### {NAMES[style]}\n")
        parts.append("| accuracy %, elastic / separate | " + " | ".join(f"{count} tokens" for count in COUNTS) + " |")
        parts.append("|---|" + "---|" * len(COUNTS))
        for kind in (*KINDS, ALL):
            pairs = [[1 - cells[style, elastic, kind, count].value for elastic in (True, False)] for count in COUNTS]
            parts.append(f"| {kind} | " + " | ".join(f"{100 * a:.1f} / {100 * b:.1f}" for a, b in pairs) + " |")
        gaps = [_gap(cells, style, ALL, count) for count in COUNTS]
        words = [f"{100 * gap:+.1f} ({100 * low:+.1f} to {100 * high:+.1f})" for gap, low, high in gaps]
        parts.append("| elastic - separate | " + " | ".join(words) + " |")
        seeds = [cells[style, True, ALL, count].by_seed for count in COUNTS]
        words = [f"{100 * (1 - max(own)):.1f}-{100 * (1 - min(own)):.1f}" for own in seeds]
        parts.append("| seeds, elastic | " + " | ".join(words) + " |")
        parts.append("")
    return "\n".join(parts)


def write_comparison(settings: FullPicturesSettings) -> list[Finding]:
    """Read all answers, write the comparison into the folder of the demo, and return what it shows."""
    out = Path(settings.out)
    cells = read_cells(settings)
    shown = findings(cells)
    rows = [_row(cells, *key) for key in cells]
    whole = {"rows": rows, "findings": [asdict(finding) for finding in shown]}
    write_whole(out / "comparison.json", json.dumps(whole, indent=1) + "\n")
    write_whole(out / "comparison.md", markdown(cells))
    draw(cells, out / "comparison.png")
    return shown


def draw(cells: Cells, path: Path) -> None:
    """A panel per kind of question: accuracy against soft tokens, a line per style, separate models dashed."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 6.5), layout="constrained")
    FigureCanvasAgg(figure)  # needs no display
    colors = dict(zip(STYLES, ("tab:blue", "tab:orange", "tab:green"), strict=True))
    axes = figure.subplots(2, 4).flatten().tolist()
    for kind, axis in zip((*KINDS, ALL), axes, strict=False):
        for style in STYLES:
            for elastic in (True, False):
                own = [cells[style, elastic, kind, count] for count in COUNTS]
                below = [100 * (cell.interval[1] - cell.value) for cell in own]
                above = [100 * (cell.value - cell.interval[0]) for cell in own]
                axis.errorbar(
                    COUNTS,
                    [100 * (1 - cell.value) for cell in own],
                    yerr=[below, above] if elastic else None,
                    color=colors[style],
                    linestyle="-" if elastic else ":",
                    marker="o" if elastic else "x",
                    capsize=2,
                    label=f"{NAMES[style]}, {'elastic' if elastic else 'separate'}",
                )
        axis.set_title(kind)
        axis.set_xscale("log", base=4)
        axis.set_xlabel("soft tokens")
        axis.set_ylabel("accuracy, %")
        axis.grid(alpha=0.3)
    axes[-1].axis("off")
    axes[-1].legend(*axes[0].get_legend_handles_labels(), loc="center")
    figure.savefig(path, dpi=100)


def _row(cells: Cells, style: str, elastic: bool, kind: str, count: int) -> dict[str, Any]:
    cell = cells[style, elastic, kind, count]
    row: dict[str, Any] = {"style": style, "elastic": elastic, "kind": kind, "tokens": count}
    row |= {"accuracy": 1 - cell.value, "low": 1 - cell.interval[1], "high": 1 - cell.interval[0]}
    row["by_seed"] = [1 - value for value in cell.by_seed]
    if elastic:
        row["minus_separate"] = _gap(cells, style, kind, count)
    return row


def _gap(cells: Cells, style: str, kind: str, count: int) -> tuple[float, float, float]:
    """How much higher the elastic accuracy is, and the 95 % interval of that: errors the other way round."""
    return cells[style, False, kind, count].minus(cells[style, True, kind, count])


def _mean(cells: Cells, style: str, kinds: Sequence[str], count: int) -> float:
    return sum(1 - cells[style, True, kind, count].value for kind in kinds) / len(kinds)
