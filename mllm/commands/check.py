"""Runs `mllm check`: compares a run, a checkpoint or an export with the digests that were written with it."""

from dataclasses import dataclass
from pathlib import Path

SUMMARY = "Tell whether a run, a checkpoint or an export is whole, byte for byte."
POSITIONAL = "folder"


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Read every byte of a folder and of its frozen parts, and compare it with what was written."""

    folder: str
    """Run folder, one checkpoint in it, or an exported model."""


def run(settings: Settings) -> int:
    """Check, and return 1 when something is missing, damaged or cannot be checked."""
    from mllm.commands.terminal import console
    from mllm.training.folder_check import check_folder

    checked, out = check_folder(Path(settings.folder)), console()
    for line in (*checked.facts, *checked.problems):
        out.print(line, soft_wrap=True)
    out.print(f"{len(checked.problems):,} problems")
    return 1 if checked.problems else 0
