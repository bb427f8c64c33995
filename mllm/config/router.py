"""Holds what a user writes to fit a router. Plain dataclasses; knows no torch, so that `--help` is quick."""

from dataclasses import dataclass, field
from typing import Literal

from mllm.config.data import ReaderConfig
from mllm.config.evaluation import set_names_of
from mllm.config.model import check_at_least
from mllm.config.model_options import ModelOptions


@dataclass(frozen=True, kw_only=True)
class RouterFitConfig(ModelOptions):
    """Fit the router that chooses where a budget says auto, on answers of an evaluation at the trained budgets."""

    answers: str
    """Names the folder of an evaluation of this model at fixed budgets, the answers of which are learned from."""
    manifest: list[str]
    """Names a manifest that was evaluated (JSONL), or several where this is given more than once; none that the model
    was trained on."""
    reader: ReaderConfig = field(default_factory=ReaderConfig)
    """Describes the form that all of these files are in."""
    root: str | None = None
    """Names the folder that the media paths of all manifests are relative to, instead of each manifest's own."""
    noise: list[str] = field(default_factory=list)
    """Names the audio file that the evaluation mixed into its audio, where it did: how noisy a recording sounds is
    estimated anew."""

    def __post_init__(self) -> None:
        if not self.manifest:
            raise ValueError("manifest is empty; name at least one")

    @property
    def set_names(self) -> list[str]:
        """The name of each manifest in the evaluation."""
        return set_names_of(self.manifest)


@dataclass(frozen=True, kw_only=True)
class RouterCertifyConfig(RouterFitConfig):
    """Certify how little a fitted router loses against the largest budget, on answers it was not fitted on."""

    allowed_loss: list[float] = field(default_factory=lambda: [0.02, 0.05, 0.1])
    """Lists mean losses to promise, in utility: 0.05 is five points of accuracy; those that cannot be proved are left
    out, with how many images or clips are missing."""
    confidence: float = 0.9
    """Sets how surely: 0.9 lets at most one calibration in ten break its promise."""
    loss: Literal["gap", "net"] = "gap"
    """Counts what is lost anywhere (`gap`), or lets what a smaller budget gets right where the largest is wrong make up
    for it (`net`)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.allowed_loss:
            raise ValueError("allowed_loss is empty; name at least one")
        for value in (*self.allowed_loss, self.confidence):
            if not 0 < value < 1:
                raise ValueError(f"allowed_loss and confidence must be between 0 and 1, both left out; got {value}")


@dataclass(frozen=True, kw_only=True)
class RouterReportConfig(RouterFitConfig):
    """Compare a router, fitted on some answers, with all it has to beat, on others."""

    test_answers: str
    """Names the folder of an evaluation of this model at the same budgets, on which all are judged."""
    test_manifest: list[str]
    """Names a manifest that was evaluated there, or several where this is given more than once; of other media."""
    out: str
    """Names the folder of the table, the numbers and the plot, of each set of media a folder."""
    num_samples: int = 1000
    """Draws so many bootstrap samples of the media for the intervals."""
    seed: int = 0
    """Seeds the bootstrap and the shuffled questions of the control."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.test_manifest:
            raise ValueError("test_manifest is empty; name at least one")
        check_at_least(self, ("num_samples",))
