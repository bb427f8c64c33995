"""Runs `mllm export`: writes the model of a run folder as a standalone checkpoint."""

from dataclasses import dataclass, field

SUMMARY = "Write a trained model as one standalone transformers checkpoint."


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Write a model with its adapters merged and its frozen parts included."""

    model: str
    """Run folder, or a checkpoint in one."""
    out: str
    """Folder to write, new or empty."""
    scale: str | None = None
    """Scale whose experts to merge, for an adapter with experts per scale, e.g. audio=/4,video=/2."""
    checkpoint: str | None = None
    """Checkpoint of the run, by its step or name, or auto for the newest; the finished model when left out."""
    sources: dict[str, str] = field(default_factory=dict)
    """Where frozen parts are now that were moved, e.g. --sources.llm /models/llm."""
    task: str | None = None
    """Task whose experts to merge, for an adapter with experts per task, e.g. avsr."""
    llm_only: bool = False
    """Write the LLM alone, as a plain checkpoint of its family, for engines that are handed embeddings."""
    experts_as_lora: bool = False
    """Write every expert per scale or task as a LoRA folder beside the LLM, for engines that choose one per request."""


def run(settings: Settings) -> int:
    """Exports the model."""
    from pathlib import Path

    from mllm.checkpoints.load import export
    from mllm.commands.terminal import console, quiet_loading
    from mllm.evaluation.hub import write_card
    from mllm.utils.run_paths import model_folder, run_of

    quiet_loading()
    export(
        settings.model,
        settings.out,
        scale=settings.scale,
        task=settings.task,
        checkpoint=settings.checkpoint,
        sources=settings.sources,
        llm_only=settings.llm_only,
        experts_as_lora=settings.experts_as_lora,
    )
    write_card(run_of(model_folder(settings.model, settings.checkpoint)), Path(settings.out))
    console().print(f"written to {settings.out}")
    return 0
