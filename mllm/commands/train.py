"""`mllm train`: a run config to a run folder."""

from dataclasses import dataclass, field

from mllm.commands.options import without_extras
from mllm.config.run import RunConfig

SUMMARY = "Train a model over many budgets, as a run config says."


@dataclass(frozen=True, kw_only=True)
class Settings(RunConfig):
    """Train a model over many budgets; start it with accelerate, torchrun or deepspeed to use several processes."""

    resume: str | None = None
    """auto for the newest complete checkpoint of the run, or a fresh start where there is none; or the folder of one.
    A fresh start when left out, which is refused where the folder of the run holds checkpoints."""
    sources: dict[str, str] = field(default_factory=dict)
    """With resume: where frozen parts are now that were moved, e.g. --sources.llm /models/llm."""


def run(settings: Settings) -> int:
    """Train, and after an interrupt say what is saved and how to go on; then 130."""
    import os
    from pathlib import Path

    from mllm.commands.terminal import console
    from mllm.data.skipped import TooManyBadSamples
    from mllm.training.interruption import how_to_go_on
    from mllm.training.run import train
    from mllm.utils.distributed import finish_launch
    from mllm.utils.run_paths import RUN_CONFIG

    config = without_extras(RunConfig, settings)
    try:
        folder = train(config, resume=settings.resume, sources=settings.sources)
    except TooManyBadSamples as error:
        raise ValueError(str(error)) from error
    except KeyboardInterrupt:
        if os.environ.get("RANK", "0") == "0":
            folder = Path(config.train.out)
            console(stderr=True).print(how_to_go_on(folder, folder / RUN_CONFIG), soft_wrap=True, highlight=False)
        return 130
    finish_launch()
    console(stderr=True).print(f"trained: {folder}")
    return 0
