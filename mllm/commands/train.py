"""`mllm train`: a run config to a run folder, or with `--dry_run` to what it would take."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mllm.commands.options import without_extras
from mllm.config.run import RunConfig

if TYPE_CHECKING:
    from mllm.training.dry_run import DryRun
    from mllm.training.trainer import Metric

SUMMARY = "Train a model over many budgets, as a run config says."


@dataclass(frozen=True, kw_only=True)
class Settings(RunConfig):
    """Train a model over many budgets; start it with accelerate, torchrun or deepspeed to use several processes."""

    resume: str | None = None
    """Go on from the newest complete checkpoint (auto; from the start if there is none), or from the folder of one."""
    sources: dict[str, str] = field(default_factory=dict)
    """With resume: where frozen parts are now that were moved, e.g. --sources.llm /models/llm."""
    dry_run: bool = False
    """Build everything, try one micro-batch at each budget, show the memory and the time it takes, and keep nothing."""
    overfit: int | None = None
    """Train on the first so many micro-batches again and again; sets train.overfit_batches."""


def run(settings: Settings) -> int:
    """Train, and after a signal say what is saved and how to go on; then 128 and the number of the signal."""
    import os

    from mllm.commands.terminal import console
    from mllm.data.skipped import TooManyBadSamples
    from mllm.training.interruption import RunInterrupted, how_to_go_on
    from mllm.utils.distributed import finish_launch
    from mllm.utils.run_paths import RUN_CONFIG

    config = without_extras(RunConfig, settings)
    if settings.overfit is not None:
        config = replace(config, train=replace(config.train, overfit_batches=settings.overfit))
    if settings.dry_run:
        return _try(config, settings)
    is_first = os.environ.get("RANK", "0") == "0"
    try:
        folder = train(config, resume=settings.resume, sources=settings.sources)
    except TooManyBadSamples as error:
        raise ValueError(str(error)) from error
    except RunInterrupted as interrupted:
        if is_first:
            folder = Path(config.train.out)
            line = how_to_go_on(folder, folder / RUN_CONFIG, str(interrupted))
            console(stderr=True).print(line, soft_wrap=True, highlight=False)
        return finish_launch(interrupted.exit_status) if interrupted.is_agreed else interrupted.exit_status
    if is_first:
        console(stderr=True).print(f"trained: {folder}")
    return finish_launch(0)


def train(
    config: RunConfig | Mapping[str, Any] | str | Path,
    *,
    resume: str | None = None,
    sources: Mapping[str, str] | None = None,
    metric: "Metric | None" = None,
) -> Path:
    """Train a run, as `mllm.training.run.train`, and answer validation samples where train.answered_samples says so.

    Args:
        metric: measures answers at each validation, by name, in place of train.answered_samples.

    Raises:
        ValueError, FloatingPointError, KeyboardInterrupt: as there; or both of metric and train.answered_samples.
    """
    from mllm.evaluation.validation_answers import validation_answers
    from mllm.training.run import read_config
    from mllm.training.run import train as train_run

    config = read_config(config)
    if metric is not None and config.train.answered_samples:
        raise ValueError("metric and train.answered_samples both measure answers; give one of them")
    return train_run(config, resume=resume, sources=sources, metric=metric or validation_answers(config))


def _try(config: RunConfig, settings: Settings) -> int:
    """Show what a dry run finds.

    Raises:
        ValueError: as `mllm.training.dry_run.dry_run`, or a run that goes on.
    """
    from mllm.commands.terminal import console, plain_table
    from mllm.training.dry_run import dry_run
    from mllm.training.memory import shown_bytes

    if settings.resume is not None or settings.sources:
        raise ValueError("--dry_run is of a run from its start; leave out --resume and --sources")
    found = dry_run(config)
    titles = ("budget", "soft tokens", "tokens", "activations", "seconds", "loss")
    lines = [
        (
            cost.budget or "text only",
            f"{cost.num_soft_tokens:,}",
            f"{cost.num_tokens:,}",
            shown_bytes(cost.activation_bytes),
            f"{cost.seconds:.2f}",
            f"{cost.loss:.3f}",
        )
        for cost in found.costs
    ]
    out = console()
    out.print(plain_table(titles, lines, title=f"one micro-batch of {found.num_rows} rows, forward and backward"))
    for line in _totals(found):
        out.print(line)
    return 0


def _totals(found: "DryRun") -> list[str]:
    from mllm.training.memory import shown_bytes

    hours = found.step_seconds * found.num_steps / 3600
    return [
        f"memory whatever the batch: {found.memory}; most in use: {shown_bytes(found.peak_bytes)}",
        f"a step with its sampled budgets: {found.step_seconds:.2f} s, {found.num_steps} of them: about {hours:.2g} h "
        "without loading data",
    ]
