"""Holds what a user writes to describe a model: the `model` block of a run config.

Plain dataclasses, read from YAML, the command line and Python by `mllm.config.reading`. Knows no torch, so that
`--help` is quick.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from mllm.budget import MEDIA
from mllm.config.medium import (
    AudioConfig,
    EncoderAdapterConfig,
    ImageConfig,
    ImagePoolConfig,
    MediumConfig,
    NoProjectorConfig,
    PoolConfig,
    VideoConfig,
    check_at_least,
    with_source,
)
from mllm.config.reading import ConfigError, kinds
from mllm.config.space import space_of
from mllm.utils.registry import Registry

__all__ = [
    "ADAPTERS",
    "AdapterConfig",
    "AudioConfig",
    "EncoderAdapterConfig",
    "GatedLoraConfig",
    "ImageConfig",
    "Int8Config",
    "LoraBankConfig",
    "LoraConfig",
    "MediumConfig",
    "ModelConfig",
    "MomeConfig",
    "Nf4Config",
    "QuantizationConfig",
    "VideoConfig",
    "check_at_least",
    "check_parts",
]


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """One LoRA for all rows."""

    kind: Literal["lora"] = "lora"
    """Adds LoRA by PEFT."""
    rank: int = 16
    """Sets the inner size itself."""
    alpha: float = 32.0
    """Scales the update by alpha / rank."""
    targets: list[str] = field(default_factory=lambda: ["q_proj", "v_proj"])
    """Names the linear layers that get one, by the last parts of their names."""
    dropout: float = 0.0
    """Drops so much of what LoRA reads, in training."""


@dataclass(frozen=True, kw_only=True)
class LoraBankConfig:
    """A bank of LoRAs, of which a row uses those of its scale and its task (Llama-MTSK, Omni-AVSR)."""

    kind: Literal["lora_bank"] = "lora_bank"
    """Adds a bank of LoRAs: a shared one, one per scale, one per task."""
    variant: Literal["ms", "ss", "mss", "s", "t", "st"]
    """Chooses one shared LoRA (ms, s), one per scale (ss) or task (t), or a shared one beside those (mss, st)."""
    rank: int = 16
    """Sets the inner size of each itself."""
    alpha: float = 32.0
    """Scales the update by alpha / rank."""
    targets: list[str] = field(default_factory=lambda: ["q_proj", "v_proj"])
    """Names the linear layers that get them, by the last parts of their names."""
    scales: list[str] = field(default_factory=list)
    """Lists the scales that have a LoRA, e.g. ["audio=/4,video=/2"]; every combination of the budgets when empty."""
    tasks: list[str] = field(default_factory=list)
    """Lists the tasks of samples that have a LoRA; asr, vsr and avsr by the media held when empty."""


@dataclass(frozen=True, kw_only=True)
class GatedLoraConfig:
    """One LoRA for rows at a reduced budget; rows at the full budget, and rows without media, are the host's own."""

    kind: Literal["gated_lora"] = "gated_lora"
    """Adds a LoRA that rows at the full budget do not use; goes with model.host."""
    rank: int = 16
    """Sets the inner size itself."""
    alpha: float = 32.0
    """Scales the update by alpha / rank."""
    targets: list[str] = field(default_factory=lambda: ["q_proj", "v_proj"])
    """Names the linear layers that get one, by the last parts of their names."""


@dataclass(frozen=True, kw_only=True)
class MomeConfig:
    """A mixture of small experts beside the frozen layers (MoME)."""

    kind: Literal["mome"] = "mome"
    """Adds a mixture of experts."""
    placement: Literal["attention", "ffn", "layer"] = "layer"
    """Names the block the experts stand beside."""
    num_experts: int = 23
    """Sets how many routed experts there are."""
    num_shared: int = 1
    """Sets how many experts every token uses."""
    top_k: int = 4
    """Sets how many routed experts a token uses."""
    bottleneck: int = 12
    """Sets the width of an expert."""
    renormalise: bool = False
    """Lets the gates of the experts that a token uses sum to 1."""
    balance_weight: float = 0.01
    """Weighs the loss that keeps experts in use."""
    disjoint_routers: bool = False
    """Gives every scale a router instead of one for all."""
    scales: list[str] = field(default_factory=list)
    """Lists the scales that have a router, with disjoint routers; every combination of the budgets when empty."""

    def __post_init__(self) -> None:
        check_at_least(self, ("num_experts", "top_k", "bottleneck"))
        check_at_least(self, ("num_shared", "balance_weight"), 0)
        if self.top_k > self.num_experts:
            raise ConfigError("top_k", f"is {self.top_k}, but num_experts is {self.num_experts}")
        if self.scales and not self.disjoint_routers:
            raise ConfigError("scales", f"is {self.scales}, but disjoint_routers is false")


AdapterConfig = LoraConfig | LoraBankConfig | GatedLoraConfig | MomeConfig
ADAPTERS: Registry[type] = Registry(
    "adapter",
    {"lora": LoraConfig, "lora_bank": LoraBankConfig, "gated_lora": GatedLoraConfig, "mome": MomeConfig},
)


@dataclass(frozen=True, kw_only=True)
class Int8Config:
    """Keeps the frozen linear layers of the LLM in 8 bits a weight, by bitsandbytes on a GPU (LLM.int8())."""

    kind: Literal["int8"] = "int8"
    """Keeps weights in 8 bits."""
    threshold: float = 6.0
    """Computes inputs beyond this in 16 bits, as outliers."""


@dataclass(frozen=True, kw_only=True)
class Nf4Config:
    """Keeps the frozen linear layers of the LLM in 4 bits a weight, by bitsandbytes on a GPU (QLoRA's NF4)."""

    kind: Literal["nf4"] = "nf4"
    """Keeps weights in 4 bits."""
    double: bool = True
    """Keeps the scales of blocks of weights in 8 bits too, which saves 0.4 bits a weight."""


QuantizationConfig = Int8Config | Nf4Config
QUANTIZATIONS: Registry[type] = Registry("quantization", {"int8": Int8Config, "nf4": Nf4Config})


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The parts of a model and where they come from."""

    llm: str | None = None
    """Names the folder, hub name or synthetic part of the LLM with its tokenizer, or a GGUF file; or give a host."""
    host: str | None = None
    """Names the folder or hub name of a whole pretrained VLM or audio LLM, which is kept as it is: its encoder,
    projector, LLM, processor and chat template. See `mllm adopt`."""
    chat_format: Literal["plain", "llava_plain", "avsr", "vicuna_v1", "chat"] = "chat"
    """Makes text of a conversation; `chat` is the LLM's own template, llava_plain that of LLaVA's first stage."""
    released_behaviour: bool = False
    """Computes batches as the released code of Llama-AVSR, Llama-MTSK and Omni-AVSR does: every clip is as long as the
    longest of its batch, nothing is masked, and audio has their number of frames. Needs chat_format avsr."""
    names_images: bool = False
    """Says "image 1 is" before the first image of a conversation and so on (MMICL), so that questions name them."""
    image: ImageConfig | None = None
    """Makes the model read images; it does not when left out."""
    audio: AudioConfig | None = None
    """Makes the model read audio; it does not when left out."""
    video: VideoConfig | None = None
    """Makes the model read videos, of lips or of anything; it does not when left out."""
    adapter: Any = field(default=None, metadata=kinds(ADAPTERS, default="lora"))
    """Trains something inside the frozen LLM; nothing when left out. Plain text is its kind."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Keeps the frozen parts in this type; what trains is kept in float32."""
    quantization: Any = field(default=None, metadata=kinds(QUANTIZATIONS))
    """Keeps the frozen linear layers of the LLM in 8 or 4 bits; it does not when left out. Plain text is its kind
    (int8, nf4); needs a GPU, and goes with the LLM of a host too."""
    attention: Literal["sdpa", "eager", "flash_attention_2", "flex_attention"] = "sdpa"
    """Chooses what computes the LLM's attention."""
    seed: int = 0
    """Seeds the initial values of compressors and adapter."""

    def __post_init__(self) -> None:
        if (self.llm is None) == (self.host is None):
            raise ConfigError("llm", "or host must be given, and not both")
        if self.host is not None:
            self._check_host()
        else:
            self._check_parts()
        if self.released_behaviour and self.chat_format != "avsr":
            raise ConfigError(
                "released_behaviour", f"needs chat_format avsr, the released layout; got {self.chat_format}"
            )
        if self.names_images and self.image is None:
            raise ConfigError("names_images", "is set, but there is no image block")
        if self.shows_frames and self.image is None:
            raise ConfigError("video.encoder.kind", "is frames, which are encoded like images; give an image block too")
        space_of(self.media)

    def _check_host(self) -> None:
        """Refuse what a host decides itself, and what would change its answers at the full budget.

        Raises:
            ConfigError: the first such key.
        """
        if self.chat_format != "chat":
            raise ConfigError("chat_format", f"is {self.chat_format}, and a host has its own template; leave it out")
        if self.names_images:
            raise ConfigError("names_images", "is set, and a host has its own chat template; leave it out")
        if self.video is not None:
            raise ConfigError("video", "does not go with a host yet; allowed: image, audio")
        if self.image is None and self.audio is None:
            raise ConfigError("host", "is given without a medium; give the budgets of image or audio")
        for medium, block in self.media.items():
            _check_host_block(medium, block)
        if self.adapter is not None and not isinstance(self.adapter, GatedLoraConfig):
            raise ConfigError(
                "adapter.kind",
                f"is {self.adapter.kind}, which would change answers at the host's full budget; allowed: gated_lora",
            )

    def _check_parts(self) -> None:
        """Refuse what only a host has a use for, and encoders that are missing.

        Raises:
            ConfigError: the first such key.
        """
        for medium, block in self.encoded_media.items():
            if block.encoder is None:
                raise ConfigError(f"{medium}.encoder", "is missing")
            if isinstance(block.projector, NoProjectorConfig):
                raise ConfigError(f"{medium}.projector.kind", "is none, which goes with model.host alone")
            if getattr(block, "positions", None) is not None:
                raise ConfigError(f"{medium}.positions", f"is {block.positions}, which goes with model.host alone")
        if isinstance(self.adapter, GatedLoraConfig):
            raise ConfigError("adapter.kind", "is gated_lora, which goes with model.host alone")

    @property
    def encoded_media(self) -> dict[str, Any]:
        """Return the blocks of the media that have an encoder of their own."""
        return {m: medium for m, medium in self.media.items() if not (m == "video" and self.shows_frames)}

    @property
    def shows_frames(self) -> bool:
        """Tell whether videos are frames that are encoded like images."""
        return self.video is not None and self.video.shows_frames

    @property
    def media(self) -> dict[str, Any]:
        """Return the blocks by medium, of the media this model takes."""
        audio = self.audio
        if audio is not None and audio.encoder is not None and self.released_behaviour:
            audio = replace(audio, encoder=replace(audio.encoder, released_cut=True))
        every = {"image": self.image, "audio": audio, "video": self.video}
        return {medium: every[medium] for medium in MEDIA if every[medium] is not None}

    @property
    def sources(self) -> dict[str, str]:
        """Tell where the frozen parts come from: `host`, or `llm` and the media that have an encoder of their own."""
        if self.host is not None:
            return {"host": self.host}
        assert self.llm is not None
        return {"llm": self.llm, **{medium: block.encoder.source for medium, block in self.encoded_media.items()}}

    def with_sources(self, sources: Mapping[str, str]) -> "ModelConfig":
        """Return the same model with some frozen parts, `host`, `llm` or media, read from elsewhere.

        Raises:
            ValueError: a part that it has not.
        """
        check_parts(sources, self.sources)
        whole = {part: source for part, source in sources.items() if part in ("host", "llm")}
        media = {m: with_source(getattr(self, m), source) for m, source in sources.items() if m not in whole}
        return replace(self, **whole, **media)

    @property
    def has_adapter(self) -> bool:
        """Tell whether there is an adapter, in the LLM or in an encoder."""
        encoders = [block.encoder for block in self.encoded_media.values()]
        return self.adapter is not None or any(encoder is not None and encoder.adapter for encoder in encoders)


def _check_host_block(medium: str, block: Any) -> None:
    """Refuse keys of a medium that the host decides, and compressors that would change its features.

    Raises:
        ConfigError: the first such key.
    """
    for key in ("encoder", "tiling", "span"):
        if getattr(block, key, None):
            raise ConfigError(f"{medium}.{key}", "is the host's own; leave it out")
    if type(block.compressor) not in (PoolConfig, ImagePoolConfig):
        raise ConfigError(f"{medium}.compressor.kind", f"is {block.compressor.kind}, and a host allows pool alone")
    if getattr(block.compressor, "order", "raster") != "raster":
        raise ConfigError(f"{medium}.compressor.order", "is haar, and a host allows raster alone")
    if not isinstance(block.projector, NoProjectorConfig):
        raise ConfigError(f"{medium}.projector.kind", f"is {block.projector.kind}, and a host allows none alone")


def check_parts(named: Iterable[str], parts: Iterable[str]) -> None:
    """Refuse a source for a frozen part that a model has not.

    Args:
        named: the parts that a user names.
        parts: those of the model.

    Raises:
        ValueError: the first of them that it has not.
    """
    known = sorted(parts)
    if unknown := sorted(set(named) - set(known)):
        raise ValueError(f"sources names {unknown[0]!r}; the frozen parts of this model are {', '.join(known)}")
