"""`mllm compare`: results of several models in one table, as speech papers print it."""

from dataclasses import dataclass
from pathlib import Path

SUMMARY = "the results of several models in one table of error rates by task and rates"
POSITIONAL = "folders"


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Lay evaluations of several models side by side."""

    folders: list[str]
    """Run folders or their `evaluation`, DIR or NAME=DIR; those of one name make one line, as where a model was
    trained for each rate."""
    out: str | None = None
    """Folder that gets the table (Markdown, JSON) and the plot; only shown when left out."""

    def __post_init__(self) -> None:
        if not self.folders:
            raise ValueError("folders is empty; name at least one folder of results")


def run(settings: Settings) -> int:
    """Read, show, and write where asked."""
    from mllm.commands.terminal import console
    from mllm.evaluation.comparison import compare
    from mllm.evaluation.speech_table import notes_of, tables

    made = compare(settings.folders)
    blocks = made.blocks
    for shown in tables(blocks):
        console().print(shown)
    for note in (*notes_of(blocks), *made.differences):
        console().print(note)
    if settings.out is not None:
        made.write(Path(settings.out))
        console().print(f"written to {settings.out}")
    return 0
