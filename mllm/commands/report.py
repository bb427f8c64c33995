"""Runs `mllm report`: writes one HTML file about a run, while it trains or afterwards."""

from dataclasses import dataclass

from mllm.config.checks import check_at_least

SUMMARY = "Write one HTML file about a run: loss per budget, tables, answers."
POSITIONAL = "run"


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Write a report of a run, finished or not, with curves of the loss per budget, tables, and answers."""

    run: str
    """Folder of the run."""
    out: str | None = None
    """File to write; report.html in the folder of the run when left out."""
    samples: int = 12
    """Most samples whose answers are shown."""

    def __post_init__(self) -> None:
        check_at_least(self, ["samples"], 0)


def run(settings: Settings) -> int:
    """Write the report."""
    from pathlib import Path

    from mllm.commands.terminal import console
    from mllm.evaluation.run_report import REPORT, write_report

    folder = Path(settings.run)
    path = folder / REPORT if settings.out is None else Path(settings.out)
    write_report(folder, path, num_samples=settings.samples)
    console().print(f"written to {path}", soft_wrap=True)
    return 0
