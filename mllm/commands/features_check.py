"""`mllm features check` reports whether a folder of features is whole, and whether it is all that a run needs."""

from dataclasses import dataclass, field, replace
from pathlib import Path

from mllm.config.model import ModelConfig
from mllm.config.run import DataConfig, FeatureConfig, RunConfig, SamplerConfig, TrainConfig

SUMMARY = "Tell what a folder of features holds, and what is missing or broken."
POSITIONAL = "folder"


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Read every byte of a folder of features; with --config RUN.yaml also compare it with what that run needs."""

    folder: str
    """Folder of features."""
    model: ModelConfig | None = None
    """The model of a run config."""
    data: DataConfig | None = None
    """The data of a run config."""
    sampler: SamplerConfig = field(default_factory=SamplerConfig)
    """The sampler of a run config."""
    train: TrainConfig | None = None
    """The training of a run config."""
    limit: int = 20
    """Number of problems that are shown."""

    @property
    def run(self) -> RunConfig | None:
        """The run of the config, reading from this folder."""
        if self.model is None or self.data is None or self.train is None:
            return None
        features = replace(self.data.features or FeatureConfig(folder=""), folder=self.folder)
        data = replace(self.data, features=features)
        return RunConfig(model=self.model, data=data, sampler=self.sampler, train=self.train)


def run(settings: Settings) -> int:
    """Check, and return 1 when something is missing or broken."""
    from mllm.commands.terminal import console
    from mllm.training.feature_cache.check import check_features

    report = check_features(Path(settings.folder), settings.run)
    out = console()
    for line in report.facts:
        out.print(line)
    for line in report.problems[: settings.limit]:
        out.print(line)
    more = len(report.problems) - settings.limit
    out.print(f"{len(report.problems):,} problems{f', {more:,} more' if more > 0 else ''}")
    return 1 if report.problems else 0
