"""What a user writes to describe how features are brought to the LLM's size: the block `projector` of a medium."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from mllm.config.checks import Auto, check_at_least
from mllm.config.reading import ConfigError


@dataclass(frozen=True, kw_only=True)
class MlpConfig:
    """A projector of two layers."""

    kind: Literal["mlp"] = "mlp"
    """Projects by two linear layers."""
    hidden_size: int | Auto = "auto"
    """Sets the size between the layers; auto is the LLM's hidden size."""
    activation: Literal["gelu", "relu"] = "gelu"
    """Names the function between the layers."""
    norm: bool = False
    """Puts a LayerNorm behind the projector."""
    before_pooling: bool = False
    """Projects features first and pools then, as M3 does; for the compressor pool."""
    per_budget: bool = False
    """Gives every trained budget a projector of its own (Llama-MTSK, Omni-AVSR); budgets between them are refused."""

    def __post_init__(self) -> None:
        if self.hidden_size == 0:
            raise ConfigError("hidden_size", "is 0; one linear layer is kind linear")
        check_at_least(self, ("hidden_size",))


@dataclass(frozen=True, kw_only=True)
class LinearConfig:
    """A projector of one layer."""

    kind: Literal["linear"] = "linear"
    """Projects by one linear layer."""
    norm: bool = False
    """Puts a LayerNorm behind the projector."""
    before_pooling: bool = False
    """Projects features first and pools then, as M3 does; for the compressor pool."""
    per_budget: bool = False
    """Gives every trained budget a projector of its own (Llama-MTSK, Omni-AVSR); budgets between them are refused."""


@dataclass(frozen=True, kw_only=True)
class MoeConfig:
    """A mixture of projectors with a router (Llama-SMoP)."""

    kind: Literal["moe"] = "moe"
    """Projects each soft token by some of several projectors."""
    num_experts: int = 4
    """Sets how many projectors there are."""
    top_k: int = 2
    """Sets how many of them a soft token uses."""
    balance_weight: float = 0.01
    """Weighs the loss that keeps all of them in use."""
    z_weight: float = 0.001
    """Weighs the loss that keeps the router's logits small."""
    hidden_size: int | Auto = "auto"
    """Sets the size between the two layers of each; auto is the LLM's hidden size, 0 leaves one linear layer."""
    activation: Literal["gelu", "relu"] = "gelu"
    """Names the function between the layers."""
    norm: bool = False
    """Puts a LayerNorm behind each projector."""
    per_budget: bool = False
    """Gives every trained budget a mixture of its own; budgets between them are refused."""

    def __post_init__(self) -> None:
        check_at_least(self, ("num_experts", "top_k"))
        check_at_least(self, ("hidden_size",), 0)
        for key in ("balance_weight", "z_weight"):
            if getattr(self, key) < 0:
                raise ConfigError(key, f"is {getattr(self, key)}; it cannot be negative")
        if self.top_k > self.num_experts:
            raise ConfigError("top_k", f"is {self.top_k}, of {self.num_experts} experts (num_experts)")


@dataclass(frozen=True, kw_only=True)
class WordsConfig:
    """A projector to mixtures of the LLM's word embeddings (LegoSLM)."""

    kind: Literal["words"] = "words"
    """Says of each feature which words are heard in it, and pools their embeddings; for audio and lips, with
    data.captions, on which it learns to hear before the first step."""
    num_words: int = 1024
    """Sets how many tokens of the LLM are words by themselves, characters among them; rarer ones are spelled by
    these. With train.word_decoder some ten thousand, since it knows words that no caption holds."""
    stretch_frames: int = 4
    """Hears so many features at once: 4 of Whisper are 80 milliseconds."""
    hidden_size: int | Auto = "auto"
    """Sets the size between the two layers of the part that is not linear; auto is the LLM's hidden size."""
    norm: ClassVar[bool] = False
    before_pooling: ClassVar[bool] = True
    per_budget: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_at_least(self, ("num_words", "stretch_frames", "hidden_size"))


@dataclass(frozen=True, kw_only=True)
class NoProjectorConfig:
    """No projector: the features of a host model, which are as wide as its LLM."""

    kind: Literal["none"] = "none"
    """Leaves features as they are; goes with model.host."""
    norm: ClassVar[bool] = False
    before_pooling: ClassVar[bool] = False
    per_budget: ClassVar[bool] = False
