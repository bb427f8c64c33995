"""`mllm features build` writes what frozen encoders make of a run's samples to disk before the run."""

from dataclasses import dataclass

from mllm.commands.options import without_extras
from mllm.config.model import check_at_least
from mllm.config.run import RunConfig

SUMMARY = "Encode a run's samples once, so that training reads features."


@dataclass(frozen=True, kw_only=True)
class Settings(RunConfig):
    """Fill the folder data.features.folder of a run config, and go on where an earlier build stopped. It says how much
    room it takes at most before it starts, and refuses when the disk has less."""

    processes: int = 1
    """Number of processes that encode at once, each with its own encoders; on several GPUs each takes one."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.data.features is None:
            raise ValueError("data.features is not set; give at least --data.features.folder")
        check_at_least(self, ["processes"])


def run(settings: Settings) -> int:
    """Encode, with a progress bar."""
    from mllm.commands.terminal import console, progress_bar, quiet_loading
    from mllm.training.feature_cache.processes import build_features

    quiet_loading()
    config = without_extras(RunConfig, settings)
    assert config.data.features is not None
    with progress_bar() as show:
        made = build_features(config, processes=settings.processes, show=show)
    speed = f", {made.num_samples / made.seconds:.1f} per second" if made.num_samples else ""
    console().print(f"encoded {made.num_samples:,} samples and versions{speed}: {config.data.features.folder}")
    return 0
