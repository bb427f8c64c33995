"""Runs `mllm router report`: compares a router with all it has to beat."""

from mllm.config.router import RouterReportConfig as Settings

__all__ = ["SUMMARY", "Settings", "run"]

SUMMARY = "Compare a router with fixed budgets, their mixtures, thresholds and oracles."


def run(settings: Settings) -> int:
    """Fits on some answers, judges on others, writes a table, numbers and a plot of each set of media."""
    from pathlib import Path

    from mllm.checkpoints.load import load_for
    from mllm.commands.terminal import console, progress_bar, quiet_loading
    from mllm.evaluation.router_judging import compare_routers
    from mllm.evaluation.routing_plot import PLOT, plot_rows

    settings = settings.pinned()
    quiet_loading()
    model, processor = load_for(settings)
    with progress_bar() as show:
        reports = compare_routers(
            settings, model, processor, progress=lambda done, total: show("questions", done, total)
        )
    out = console()
    for media, report in reports.items():
        folder = Path(settings.out) / "_".join(media)
        report.write(folder)
        plot_rows(report.rows, folder / PLOT)
        out.print(f"{' and '.join(media)}, written to {folder}", soft_wrap=True)
        out.print(report.to_markdown(), soft_wrap=True)
    return 0
