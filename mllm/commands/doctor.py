"""`mllm doctor` reports what is installed, what is missing or broken, and the line that repairs it."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mllm.utils.environment import Report

SUMMARY = "Tell versions and devices, whether they were tested, what is missing or broken, and how to repair it."
_STYLES = {"ok": "green", "missing": "yellow", "newer": "yellow", "older": "yellow", "broken": "red"}


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Look at this machine and this Python; every package is really imported, which takes some seconds."""


def run(settings: Settings) -> int:
    """Examine and report; return 1 when something that is required does not work. An untested release is a warning."""
    from mllm.utils.environment import examine

    report = examine()
    show(report)
    return 0 if report.is_healthy else 1


def show(report: "Report") -> None:
    """Write a report to the terminal."""
    from rich.table import Table
    from rich.text import Text

    from mllm.commands.terminal import console

    out = console()
    for name, value in report.machine.items():
        out.print(f"{name:<12}{value}", soft_wrap=True)
    table = Table(box=None, pad_edge=False)
    for name in ("", "package", "state"):
        table.add_column(name, overflow="fold")
    for finding in report.findings:
        name = finding.name if finding.is_required else f"{finding.name} (optional)"
        table.add_row(Text(finding.status, style=_STYLES[finding.status]), name, finding.detail)
    out.print(table)
    for finding in report.findings:
        if finding.repair:
            out.print(f"to repair {finding.name}: {finding.repair}", soft_wrap=True)
    out.print(report.summary, soft_wrap=True)
