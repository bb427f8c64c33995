"""Runs `mllm push`: uploads a run or an export to a model hub, with a model card that is written from the run."""

from dataclasses import dataclass

SUMMARY = "Upload a run or an export to a model hub, with a model card."
POSITIONAL = "folder"


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Upload the files that make a model, without paths of this machine, and a card of its parts and results."""

    folder: str
    """Run folder, or an exported model."""
    repo: str
    """Repository, OWNER/NAME; made where it is not there."""
    private: bool = True
    """Makes the repository a private one; one that is there stays as it is."""
    license: str | None = None
    """Licence of the result for the card, e.g. apache-2.0; the card lists those of the parts in any case."""
    dry_run: bool = False
    """Show the card and the files, and upload nothing."""


def run(settings: Settings) -> int:
    """Upload, or show what would be."""
    import tempfile
    from pathlib import Path

    from mllm.commands.terminal import console
    from mllm.evaluation.hub import push_to_hub, stage
    from mllm.evaluation.model_card import CARD

    out = console()
    if not settings.dry_run:
        address = push_to_hub(settings.folder, settings.repo, private=settings.private, licence=settings.license)
        out.print(f"uploaded: {address}", soft_wrap=True)
        return 0
    with tempfile.TemporaryDirectory() as staging:
        files = stage(Path(settings.folder), Path(staging), repo=settings.repo, licence=settings.license)
        out.print((Path(staging) / CARD).read_text(encoding="utf-8"), soft_wrap=True)
        for file in files:
            out.print(f"{(Path(staging) / file).stat().st_size:>14,}  {file}", soft_wrap=True)
    return 0
