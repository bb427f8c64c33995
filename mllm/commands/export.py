"""Runs `mllm export`: writes the model of a run folder as a standalone checkpoint."""

from dataclasses import dataclass, field
from typing import Literal

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
    form: Literal["model", "llm", "experts"] = "model"
    """model for all of it; llm for the LLM alone, as a plain checkpoint of its family, for engines that are handed
    embeddings; experts for every expert per scale or task as a LoRA folder beside the LLM, for engines that choose one
    per request."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Of the frozen parts, with the adapter merged in it; float32 takes 4 bytes of memory and disk per parameter."""


def run(settings: Settings) -> int:
    """Exports the model."""
    from pathlib import Path

    from mllm.checkpoints.export import export
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
        form=settings.form,
        dtype=settings.dtype,
    )
    write_card(run_of(model_folder(settings.model, settings.checkpoint)), Path(settings.out))
    console().print(f"written to {settings.out}")
    return 0
