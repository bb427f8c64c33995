"""Says which trained model a command loads, and how: the options that every command on one has."""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal, Self

from mllm.media import MediaLimits
from mllm.utils.run_paths import model_folder, results_folder


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """Holds the options of a command that say which trained model is loaded, and how."""

    model: str
    """Names a run folder, a checkpoint in one, or an exported model."""
    checkpoint: str | None = None
    """Takes a checkpoint of the run, by its step or name, or auto for the newest; the finished model when left out."""
    sources: dict[str, str] = field(default_factory=dict)
    """Tells where frozen parts are now that were moved, e.g. --sources.llm /models/llm."""
    limits: MediaLimits = field(default_factory=MediaLimits)
    """Refuses files with more pixels, seconds or bytes."""
    merge_adapter: bool = False
    """Folds a LoRA into the LLM's weights first, which rounds them anew; refused where the adapter depends on the
    rows."""
    audio_padding: Literal["trained", "window", "none"] = "trained"
    """Reads audio as in training, or with window fills Whisper's window (30 seconds) with silence, or with none reads
    clips at their own lengths, which takes a fraction of the time."""
    untrained_padding: bool = False
    """Takes another audio_padding than that of training, with which the model hears worse."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Keeps the frozen parts in this type."""
    verify: bool = True
    """Compares the digests of the model's files with those that were written; false reads huge files once less."""
    use_cpu: bool = False
    """Runs on the CPU although there is a GPU."""

    @property
    def model_folder(self) -> Path:
        """The folder that holds the model: that of the run, of a checkpoint of it, or of an export."""
        return model_folder(self.model, self.checkpoint)

    def pinned(self) -> Self:
        """Name the checkpoint that `auto` means now, so that one that is written meanwhile is not taken for it."""
        return self if self.checkpoint is None else replace(self, checkpoint=self.model_folder.name)

    def results_folder(self, kind: str) -> Path:
        """Return where results of the model go, see `mllm.utils.run_paths.results_folder`."""
        return results_folder(Path(self.model) if self.checkpoint is None else self.model_folder, kind)
