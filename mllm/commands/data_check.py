"""`mllm data check`: everything that is wrong with a manifest, in one pass."""

from dataclasses import dataclass
from pathlib import Path

SUMMARY = "report every bad row of a manifest, with its line"
POSITIONAL = "manifest"


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Check every row of a manifest, and that the files it names are there."""

    manifest: str
    """Manifest (JSONL)."""
    root: str | None = None
    """Folder that media paths are relative to; the manifest's own when left out."""
    open: bool = False
    """Also decode every file, which takes as long as an epoch of reading does."""


def run(settings: Settings) -> int:
    """Check, and return 1 when something is wrong."""
    from mllm.commands.terminal import console
    from mllm.data.check import check_manifest

    root = settings.root if settings.root is not None else Path(settings.manifest).parent
    report = check_manifest(settings.manifest, root, open_media=settings.open)
    out = console()
    for problem in report.problems:
        out.print(f"{settings.manifest}:{problem.line_number}: {problem.message}", soft_wrap=True)
    out.print(report.summary(), soft_wrap=True)
    return 0 if report.is_good else 1
