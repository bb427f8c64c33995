"""Holds what a user writes to describe an evaluation. Plain dataclasses; knows no torch, so that `--help` is quick."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from mllm.budget import Budget
from mllm.config.data import ReaderConfig
from mllm.config.long_audio import LongAudioOptions
from mllm.config.model import check_at_least
from mllm.config.model_options import ModelOptions

EVALUATION = "evaluation"
"""The folder of results inside a model's folder; those with a name lie in folders inside it."""
TAKEN_NAMES = ("answers", "submissions", "routing")
"""Folders of results themselves."""


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig(LongAudioOptions, ModelOptions):
    """Evaluate a model on manifests, at budgets."""

    manifest: list[str]
    """Names a manifest (JSONL), or several where this is given more than once."""
    budgets: str | list[str]
    """Lists budgets, as a list or parted by ";", e.g. "audio=/4,video=/2;audio=/16,video=/5;image=4". A budget is used
    for the samples that hold a medium it names, and each at the media it holds; an empty one asks for the largest."""
    allow_untrained: bool = False
    """Also answers at rates and counts that training did not sample, where the model can; reports mark those rows. They
    are refused otherwise."""
    name: str | None = None
    """Names this evaluation, for several of one model: answers, table and plot then lie in a folder of that name
    inside `evaluation`."""
    out: str | None = None
    """Names the folder of the answers, table and plot; when left out `evaluation` inside the model's folder, or of a
    checkpoint `evaluation-checkpoint-...` inside its run."""
    reader: ReaderConfig = field(default_factory=ReaderConfig)
    """Describes the form that all of these files are in."""
    root: str | None = None
    """Names the folder that the media paths of all manifests are relative to, instead of each manifest's own."""
    limit: int | None = None
    """Takes only the first so many samples of each manifest."""
    vqav2_questions: str | None = None
    """Names the file of all questions of VQAv2's test set (LLaVA's or the official one); its server wants an answer to
    each, so those that no manifest asks get an empty one in the submission."""
    noise: str | None = None
    """Names an audio file that is mixed into all audio, for snr_db; another one than the model was trained with."""
    allow_training_noise: bool = False
    """Takes the noise the model was trained with all the same, as the published systems do."""
    snr_db: list[float | None] = field(default_factory=lambda: [None])
    """Lists signal-to-noise ratios in decibels; null leaves the audio as it is."""
    max_mismatch_seconds: float | None = 0.08
    """Refuses a clip whose audio and video differ by more; null never compares."""
    num_beams: int = 1
    """Searches with so many beams; 1 is greedy, and beams are deterministic. The LLM's own generation config, which may
    sample, is not followed."""
    length_penalty: float = 1.0
    """Divides the log-probability of a beam by its length to this power."""
    max_new_tokens: int = 64
    """Ends answers there at the latest."""
    batch_size: int = 8
    """Takes so many samples in one batch; each is answered at all its budgets at once."""
    max_rows: int | None = None
    """Caps the rows of one pass, a row being a sample at one budget, where memory is short: there are fewer samples in
    a batch then, and one with more budgets than this is encoded several times."""
    constant_prompt: bool = False
    """Keeps what the LLM reads of the text that all prompts begin with, from one batch to the next."""
    static_cache: bool = False
    """Decodes with a cache of a fixed size, which CUDA replays as a graph. Every row then reads its own prompt."""
    seed: int = 0
    """Seeds the noise and the bootstrap intervals."""
    video_backend: Literal["pyav", "decord"] = "pyav"
    """Chooses what decodes videos; both give the same frames."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.manifest:
            raise ValueError("manifest is empty; name at least one")
        names = [Path(path).stem for path in self.manifest]
        if len(set(names)) < len(names) and len(set(self.set_names)) < len(names):
            raise ValueError(f"manifest names one file twice: {', '.join(self.manifest)}")
        check_at_least(self, ("num_beams", "max_new_tokens", "batch_size", "limit", "max_rows"))
        if self.static_cache and (self.num_beams > 1 or self.constant_prompt):
            raise ValueError("static_cache goes neither with num_beams above 1 nor with constant_prompt")
        if self.length_penalty != 1.0 and self.num_beams == 1:
            raise ValueError(f"length_penalty is {self.length_penalty} with num_beams 1; it compares beams")
        self._check_name()
        if not self.parsed_budgets:
            raise ValueError("budgets is empty; name at least one, such as audio=/4")
        if not self.snr_db:
            raise ValueError("snr_db is empty; null stands for no noise")
        if any(ratio is not None for ratio in self.snr_db) != (self.noise is not None):
            raise ValueError(f"noise and snr_db go together; noise is {self.noise!r}, snr_db is {self.snr_db}")

    def _check_name(self) -> None:
        if self.name is None:
            return
        if self.out is not None:
            raise ValueError(f"name is {self.name!r} with out {self.out}; one of the two says where results go")
        if Path(self.name).name != self.name or self.name.startswith(".") or self.name in ("", *TAKEN_NAMES):
            raise ValueError(f"name must be that of a folder, and none of {', '.join(TAKEN_NAMES)}; got {self.name!r}")

    @property
    def parsed_budgets(self) -> list[Budget]:
        """The budgets, read, each once."""
        texts = self.budgets.split(";") if isinstance(self.budgets, str) else self.budgets
        return list(dict.fromkeys(Budget.parse(text) for text in texts))

    @property
    def set_names(self) -> list[str]:
        """A short name for each manifest: its file's, or its path where two files have the same."""
        return set_names_of(self.manifest)

    @property
    def output_folder(self) -> Path:
        """Where results go."""
        if self.out is not None:
            return Path(self.out)
        return self.results_folder(EVALUATION) / (self.name or "")


def set_names_of(manifests: Sequence[str]) -> list[str]:
    """Return a short name for each manifest: its file's, or its path where two files have the same."""
    stems = [Path(path).stem for path in manifests]
    return stems if len(set(stems)) == len(stems) else list(manifests)
