"""`mllm export`: a run folder to a standalone checkpoint."""

from dataclasses import dataclass

SUMMARY = "write a trained model as one standalone transformers checkpoint"


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Write a model with its adapters merged and its frozen parts included."""

    model: str
    """Run folder."""
    out: str
    """Folder to write."""


def run(settings: Settings) -> int:
    """Export."""
    from mllm.commands.terminal import console, quiet_loading
    from mllm.loading import export

    quiet_loading()
    export(settings.model, settings.out)
    console().print(f"written to {settings.out}")
    return 0
