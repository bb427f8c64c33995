"""Runs `mllm compare`: shows results of several models in one table, as the papers of speech and of vision do."""

from dataclasses import dataclass
from pathlib import Path

SUMMARY = "Show the results of several models in one table: error rates by task and rates, or scores by budget."
POSITIONAL = "folders"


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Show evaluations of several models side by side."""

    folders: list[str]
    """Run folders or evaluations inside them, DIR or NAME=DIR; those of one name make one line, as where a model was
    trained for each rate."""
    out: str | None = None
    """Folder that gets the tables (Markdown, JSON) and plots; only shown when left out."""

    def __post_init__(self) -> None:
        if not self.folders:
            raise ValueError("folders is empty; name at least one folder of results")


def run(settings: Settings) -> int:
    """Reads and shows the results, and writes them if there is a folder to write to."""
    from mllm.commands.terminal import console, plain_table
    from mllm.evaluation.comparison import compare
    from mllm.evaluation.speech_table import notes_of, tables

    comparison = compare(settings.folders)
    blocks = comparison.blocks
    for shown in tables(blocks):
        console().print(shown)
    vision = comparison.vision
    if vision is not None:
        console().print(plain_table(vision.titles, vision.cells, num_names=2))
    for note in (*notes_of(blocks), *(vision.notes if vision is not None else []), *comparison.notes):
        console().print(note, soft_wrap=True)
    if settings.out is not None:
        comparison.write(Path(settings.out))
        console().print(f"written to {settings.out}")
    return 0
