"""Holds what released checkpoints of Llama-AVSR, Llama-MTSK and Omni-AVSR do not, with the published values.

Plain dataclasses. Knows no torch, so that `--help` is quick.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class System:
    """Holds what the checkpoints of one system have in common.

    Args:
        title: as its paper calls it.
        lists: whether a medium has a list of projectors, one per rate, or a single one.
        variants: of the LLM's LoRAs; "" for none at all.
        has_prompts: whether the embeddings of the prompts are in the checkpoint.
        rates: frames per token by medium where it takes both media. rates_alone: where it takes that one alone.
    """

    title: str
    lists: tuple[bool, ...]
    variants: tuple[str, ...]
    has_prompts: bool
    rates: Mapping[str, tuple[int, ...]]
    rates_alone: Mapping[str, tuple[int, ...]]

    def published_rates(self, medium: str, media: Sequence[str]) -> tuple[int, ...]:
        """Look up the published rates of a medium of a checkpoint with these media."""
        return (self.rates if len(media) > 1 else self.rates_alone)[medium]


SYSTEMS = {
    "omni-avsr": System(
        "Omni-AVSR",
        lists=(True, False),
        variants=("", "s", "t", "st"),
        has_prompts=True,
        rates={"audio": (4, 16), "video": (2, 5)},
        rates_alone={"audio": (4, 16), "video": (2, 5)},
    ),
    "llama-avsr": System(
        "Llama-AVSR",
        lists=(False,),
        variants=("", "s"),
        has_prompts=False,
        rates={"audio": (4,), "video": (2,)},
        rates_alone={"audio": (3,), "video": (3,)},
    ),
    "llama-mtsk": System(
        "Llama-MTSK",
        lists=(True,),
        variants=("", "s"),
        has_prompts=False,
        rates={"audio": (4, 16), "video": (2, 5)},
        rates_alone={"audio": (4, 8, 12, 16, 20), "video": (1, 2, 3, 4, 5)},
    ),
}


@dataclass(frozen=True, kw_only=True)
class Options:
    """Hold what was used to train the checkpoint and is not in it."""

    llm: str = "meta-llama/Llama-3.2-1B"
    """Folder or hub name of the LLM: its config and its tokenizer are read, its weights are in the checkpoint."""
    whisper: str = "openai/whisper-medium.en"
    """Folder or hub name of Whisper: its config and its feature extractor are read."""
    audio_rates: list[int] = field(default_factory=list)
    """Frames per audio token, in the order of the projectors; the shapes tell them where frames are stacked."""
    video_rates: list[int] = field(default_factory=list)
    """Frames per video token, likewise."""
    video_heads: int | None = None
    """Number of attention heads of AV-HuBERT; one per 64 of its size when left out."""
    video_norms_first: bool = True
    """Whether AV-HuBERT has its norms before attention, as all that were released."""
    video_scaling: float = 2.0
    """Factor of the update of the LoRAs inside AV-HuBERT."""
    reduction: int | None = None
    """What the released training calls --rank: the LLM's hidden size divided by the LoRAs' inner size; the shapes tell
    it where that is a whole number."""
    alpha: float | None = None
    """The released --alpha: the LoRAs' update is multiplied by alpha / reduction; by default reduction / 8."""
    prompt_audio: str = "Transcribe speech to text."
    """Question that the model is asked about audio alone."""
    prompt_video: str = "Transcribe video to text."
    """Question that the model is asked about video alone."""
    prompt_audiovisual: str = "Transcribe speech and video to text."
    """Question that the model is asked about audio and video together."""
    normalize_audio: bool = True
    """Scale each clip to zero mean and unit variance before the features."""
    released_behaviour: bool = False
    """Compute batches as the released code does: no masks, so that an answer depends on what else is in its batch."""

    @property
    def prompts(self) -> dict[str, str]:
        """Prompts by the names in the checkpoints."""
        return {"audio": self.prompt_audio, "video": self.prompt_video, "audiovisual": self.prompt_audiovisual}
