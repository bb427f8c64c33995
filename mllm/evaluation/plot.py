"""Draws the Pareto plot: each metric against soft tokens and against FLOPs, one line per task and kind.

Knows rows of results. matplotlib is imported when a plot is drawn.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mllm.evaluation.scoring import scorer_of

PLOT = "pareto.png"
AXES = {"soft_tokens": "soft tokens per sample (mean)", "gflops": "GFLOP per sample (mean)"}
_MARKERS = "osD^vP*X<>"


def plot_pareto(
    rows: Sequence[Mapping[str, Any]],
    path: str | Path,
    *,
    axes: Mapping[str, str] = AXES,
    with_front: bool = False,
) -> bool:
    """Draws the plot; budgets that were not trained have hollow marks.

    Args:
        rows: rows of results; where they have a `model`, lines are named by it too, and by their `label` alone if they
            have one.
        axes: keys of the rows and their labels, one column of plots each.
        with_front: ring what no cheaper budget of its line reaches; higher is better.

    Returns:
        Whether there was anything to draw: rows without a value are left out.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    plotted = [row for row in rows if row["value"] is not None and row["soft_tokens"]]
    if not plotted:
        return False
    metrics = list(dict.fromkeys(row["metric"] for row in plotted))
    columns = [key for key in axes if any(row.get(key) is not None for row in plotted)]
    if not columns:
        return False
    size = (5.2 * len(columns) + 2.4, 4.2 * len(metrics))
    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)  # needs no display
    grid = figure.subplots(len(metrics), len(columns), squeeze=False)
    for metric, axes_of_metric in zip(metrics, grid, strict=True):
        metric_rows = [row for row in plotted if row["metric"] == metric]
        for key, axis in zip(columns, axes_of_metric, strict=True):
            lines = _plot_lines(axis, metric_rows, key)
            axis.set_xlabel(axes[key])
            if with_front:
                _ring_fronts(axis, lines, key)
        better = "higher" if scorer_of(metric_rows[0]["task"]).higher_is_better else "lower"
        axes_of_metric[0].set_ylabel(f"{metric.upper() if metric == 'wer' else metric} in % ({better} is better)")
        axes_of_metric[-1].legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)
    figure.savefig(path, dpi=120)
    return True


def front(rows: Sequence[Mapping[str, Any]], key: str) -> list[Mapping[str, Any]]:
    """Finds the Pareto front of one line: rows with a higher value than all that cost no more, cheapest first."""
    best: list[Mapping[str, Any]] = []
    for row in sorted(rows, key=lambda row: (row[key], -row["value"])):
        if not best or row["value"] > best[-1]["value"]:
            best.append(row)
    return best


def _ring_fronts(axis: Any, lines: Mapping[str, Sequence[Mapping[str, Any]]], key: str) -> None:
    for number, line_rows in enumerate(lines.values()):
        best = front(line_rows, key)
        axis.plot(
            [row[key] for row in best],
            [100 * row["value"] for row in best],
            color=f"C{number % 10}",
            marker="o",
            markersize=11,
            markerfacecolor="none",
            linestyle="none",
        )
    axis.set_title("ringed: better than every cheaper budget", fontsize=9)


def _plot_lines(axis: Any, rows: Sequence[Mapping[str, Any]], key: str) -> dict[str, list[Mapping[str, Any]]]:
    lines: dict[str, list[Mapping[str, Any]]] = {}
    with_set = len({row["set"] for row in rows}) > 1
    with_kinds = {row["task"] for row in rows if row["kind"] is not None}
    for row in rows:
        if row.get(key) is not None:
            name = _name(row, with_set=with_set, with_kinds=row["task"] in with_kinds)
            lines.setdefault(name, []).append(row)
    for number, (name, line_rows) in enumerate(lines.items()):
        line_rows = sorted(line_rows, key=lambda row: row[key])
        color, marker = f"C{number % 10}", _MARKERS[(number + number // 10) % len(_MARKERS)]
        costs, values = [row[key] for row in line_rows], [100 * row["value"] for row in line_rows]
        axis.plot(costs, values, color=color, marker=marker, markersize=5, label=name)
        hollow = [(x, y) for x, y, row in zip(costs, values, line_rows, strict=True) if not row["is_trained"]]
        if hollow:
            axis.plot(*zip(*hollow, strict=True), color=color, marker=marker, markerfacecolor="white", linestyle="none")
        if all(row["low"] is not None for row in line_rows):
            bounds = [[100 * row[bound] for row in line_rows] for bound in ("low", "high")]
            axis.fill_between(costs, *bounds, color=color, alpha=0.12, linewidth=0)
    if all_costs := sorted({row[key] for line_rows in lines.values() for row in line_rows}):
        _scale(axis, all_costs)
    axis.grid(alpha=0.3)
    axis.set_ylim(bottom=0)
    return lines


def _scale(axis: Any, costs: Sequence[float]) -> None:
    """Makes the axis logarithmic where costs span much, with plain numbers at the ticks."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    span = costs[-1] / costs[0]
    if span < 4:
        return
    base = 2 if span < 1000 else 10
    axis.set_xscale("log", base=base)
    axis.xaxis.set_major_locator(LogLocator(base=base))
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.3g}"))
    axis.xaxis.set_minor_formatter(NullFormatter())


def _name(row: Mapping[str, Any], *, with_set: bool, with_kinds: bool) -> str:
    if "label" in row:
        return row["label"]
    words = [row.get("model", ""), *([row["set"]] if with_set else [])]
    words += [row["task"], row["kind"] or ("all" if with_kinds else "")]
    words += [] if row["snr_db"] is None else [f"{row['snr_db']:g} dB"]
    return " ".join(filter(None, words))
