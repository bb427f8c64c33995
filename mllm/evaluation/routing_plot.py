"""Draws what a mean cost buys under each family of policies, on a logarithmic axis.

Knows the rows of a routing report. matplotlib is imported when a plot is drawn.
"""

from collections.abc import Sequence
from pathlib import Path

from mllm.evaluation.routing_report import MIXED, ORACLE, ROUTER, Row
from mllm.router.table import Unit

PLOT = "routing.png"
_STYLES = {MIXED: ("black", "-", 2.0), ROUTER: ("C3", "-", 2.0), ORACLE: ("gray", ":", 1.5)}
"""Color, line and width of what a reader looks for first; the others are thin."""
_COLORS = ("C0", "C1", "C2", "C4", "C5", "C6", "C8", "C9")
"""Of the others: none is that of the router or of the oracle."""
_AXES: dict[Unit, str] = {
    "tokens": "soft tokens read per question (mean)",
    "flops": "FLOPs (mean)",
    "ms": "milliseconds (mean)",
}


def plot_rows(rows: Sequence[Row], path: str | Path, *, unit: Unit = "tokens") -> None:
    """Draw one line per family: mean utility over mean cost, each mark a policy and the lines their random mixtures."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    figure = Figure(figsize=(9.0, 4.8), layout="constrained")
    FigureCanvasAgg(figure)  # needs no display
    axis = figure.subplots()
    for number, row in enumerate(rows):
        color, line, width = _STYLES.get(row.name, (_COLORS[number % len(_COLORS)], "--", 1.0))
        costs, utilities = zip(*row.points, strict=True)
        axis.plot(
            costs, [100 * one for one in utilities], line, color=color, linewidth=width, marker=".", label=row.name
        )
    axis.set_xscale("log", base=2)
    axis.xaxis.set_major_locator(LogLocator(base=2))
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.3g}"))
    axis.xaxis.set_minor_formatter(NullFormatter())
    axis.set_xlabel(_AXES[unit])
    axis.set_ylabel("mean utility in %")
    axis.grid(alpha=0.3)
    axis.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)
    figure.savefig(path, dpi=120)
