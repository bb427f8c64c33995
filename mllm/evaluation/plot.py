"""The Pareto plot: each metric against soft tokens and against FLOPs, one line per task and kind.

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
    """Draw the plot; budgets that were not trained have hollow marks.

    Args:
        rows: of results; where they have a `model`, lines are named by it too, and by their `label` alone if they have
            one.
        axes: keys of the rows and how they are called, one column of plots each.
        with_front: ring what no cheaper budget of its line reaches; higher is better.

    Returns:
        Whether there was anything to draw: rows without a value are left out.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    drawn = [row for row in rows if row["value"] is not None and row["soft_tokens"]]
    if not drawn:
        return False
    metrics = list(dict.fromkeys(row["metric"] for row in drawn))
    columns = [key for key in axes if any(row.get(key) is not None for row in drawn)]
    if not columns:
        return False
    size = (5.2 * len(columns) + 2.4, 4.2 * len(metrics))
    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)  # needs no display
    grid = figure.subplots(len(metrics), len(columns), squeeze=False)
    for metric, places in zip(metrics, grid, strict=True):
        own = [row for row in drawn if row["metric"] == metric]
        for key, axis in zip(columns, places, strict=True):
            lines = _draw(axis, own, key)
            axis.set_xlabel(axes[key])
            if with_front:
                _ring_fronts(axis, lines, key)
        better = "higher" if scorer_of(own[0]["task"]).higher_is_better else "lower"
        places[0].set_ylabel(f"{metric.upper() if metric == 'wer' else metric} in % ({better} is better)")
        places[-1].legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)
    figure.savefig(path, dpi=120)
    return True


def front(rows: Sequence[Mapping[str, Any]], key: str) -> list[Mapping[str, Any]]:
    """The Pareto front of one line: rows with a higher value than everything that costs no more, cheapest first."""
    found: list[Mapping[str, Any]] = []
    for row in sorted(rows, key=lambda row: (row[key], -row["value"])):
        if not found or row["value"] > found[-1]["value"]:
            found.append(row)
    return found


def _ring_fronts(axis: Any, lines: Mapping[str, Sequence[Mapping[str, Any]]], key: str) -> None:
    for number, own in enumerate(lines.values()):
        best = front(own, key)
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


def _draw(axis: Any, rows: Sequence[Mapping[str, Any]], key: str) -> dict[str, list[Mapping[str, Any]]]:
    lines: dict[str, list[Mapping[str, Any]]] = {}
    with_set = len({row["set"] for row in rows}) > 1
    with_kinds = {row["task"] for row in rows if row["kind"] is not None}
    for row in rows:
        if row.get(key) is not None:
            name = _name(row, with_set=with_set, with_kinds=row["task"] in with_kinds)
            lines.setdefault(name, []).append(row)
    for number, (name, own) in enumerate(lines.items()):
        own = sorted(own, key=lambda row: row[key])
        color, marker = f"C{number % 10}", _MARKERS[(number + number // 10) % len(_MARKERS)]
        places, values = [row[key] for row in own], [100 * row["value"] for row in own]
        axis.plot(places, values, color=color, marker=marker, markersize=5, label=name)
        hollow = [(x, y) for x, y, row in zip(places, values, own, strict=True) if not row["is_trained"]]
        if hollow:
            axis.plot(*zip(*hollow, strict=True), color=color, marker=marker, markerfacecolor="white", linestyle="none")
        if all(row["low"] is not None for row in own):
            bounds = [[100 * row[bound] for row in own] for bound in ("low", "high")]
            axis.fill_between(places, *bounds, color=color, alpha=0.12, linewidth=0)
    if found := sorted({row[key] for own in lines.values() for row in own}):
        _scale(axis, found)
    axis.grid(alpha=0.3)
    axis.set_ylim(bottom=0)
    return lines


def _scale(axis: Any, places: Sequence[float]) -> None:
    """Logarithmic where the places span much, with plain numbers at the ticks."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    span = places[-1] / places[0]
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
