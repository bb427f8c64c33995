"""`mllm train`: a run config to a run folder."""

from dataclasses import dataclass, field

from mllm.commands.options import without_extras
from mllm.training.settings import RunSettings

SUMMARY = "train a model over many budgets, as a run config says"


@dataclass(frozen=True, kw_only=True)
class Settings(RunSettings):
    """Train a model over many budgets; start it with accelerate, torchrun or deepspeed to use several processes."""

    resume: str | None = None
    """auto for the newest complete checkpoint of the run, or the folder of one; a fresh start when left out."""
    sources: dict[str, str] = field(default_factory=dict)
    """With resume: where frozen parts are now that were moved, e.g. --sources.llm /models/llm."""


def run(settings: Settings) -> int:
    """Train."""
    from mllm.commands.terminal import console
    from mllm.data.quarantine import TooManyBadSamples
    from mllm.training.launch import finish_launch
    from mllm.training.run import train

    own = without_extras(RunSettings, settings)
    try:
        folder = train(own, resume=settings.resume, sources=settings.sources)
    except TooManyBadSamples as error:
        raise ValueError(str(error)) from error
    finish_launch()
    console(stderr=True).print(f"trained: {folder}")
    return 0
