"""Holds what a user writes to fit a router. Plain dataclasses; knows no torch, so that `--help` is quick."""

from dataclasses import dataclass, field

from mllm.config.data import ReaderConfig
from mllm.config.evaluation import set_names_of
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

    def __post_init__(self) -> None:
        if not self.manifest:
            raise ValueError("manifest is empty; name at least one")

    @property
    def set_names(self) -> list[str]:
        """The name of each manifest in the evaluation."""
        return set_names_of(self.manifest)
