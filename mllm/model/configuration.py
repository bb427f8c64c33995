"""Defines the configuration of an elastic model: the configs of its parts, and per medium how tokens are made.

Knows plain values only. Does not know weights, files or how anything is computed.
"""

from collections.abc import Iterable, Mapping
from dataclasses import fields, replace
from functools import cache
from typing import Any, ClassVar

from transformers import AutoConfig, PreTrainedConfig

from mllm.budget import MEDIA, Space
from mllm.config.medium import AudioConfig, FramesConfig, ImageConfig, VideoConfig
from mllm.config.model import ADAPTERS, QUANTIZATIONS
from mllm.config.nearest import nearest
from mllm.config.reading import plain, read
from mllm.config.space import space_of
from mllm.encoders.av_hubert import register_av_hubert
from mllm.hosts import find_family, host_tiling
from mllm.utils.registry import Registry

# Names that generation utilities and serving engines look for.
CONFIG_KEYS = {"image": "vision_config", "audio": "audio_config", "video": "video_config"}
TOWER_NAMES = {"image": "vision_tower", "audio": "audio_tower", "video": "video_tower"}
BLOCKS: dict[str, type] = {"image": ImageConfig, "audio": AudioConfig, "video": VideoConfig}
FILE = "config.json"
# What transformers puts among a config's keys beside its fields: when it saves a quantised model or one with its own
# code, and, from the keywords of `from_pretrained`, when it reads a file.
LIBRARY_KEYS = frozenset({"auto_map", "quantization_config"}) | {
    *("attn_implementation", "experts_implementation", "name_or_path", "num_labels", "output_attentions", "torch_dtype")
}


class ElasticConfig(PreTrainedConfig):
    """Holds everything that shapes an elastic model, and the one place on disk where its trained space stands.

    Args:
        text_config: config of the LLM, any decoder that `AutoModel` builds.
        vision_config, audio_config, video_config: configs of the encoders; a medium without one is not taken.
        host_config: config of a pretrained model that is kept whole, in place of all of these; see `mllm.hosts`.
        media: the block of each medium, of `mllm.config.medium` or as plain values; where its encoder came from is
            left out of it and stands in `sources`.
        placeholder_ids: per medium the token id that stands once per soft token in the prompt.
        new_tokens: by its text the id of each token that has an embedding row of its own beside the LLM's; rows are in
            the order of the ids. See `mllm.model.new_tokens`.
        adapter: the adapter inside the LLM, of `mllm.config.model` or as plain values.
        quantization: how bitsandbytes keeps the frozen LLM, of `mllm.config.model` or as plain values.
        holds_adapter: the adapter is among the model's own weights, as in the export of a model on a host.
        trained_parts: what trains, and so what a run's checkpoint holds; see `mllm.model.trainables.PARTS`.
        sources: where each frozen part came from, by part (`llm`, `image`, ...), with its digest once trained.

    Raises:
        ValueError: a key that neither this config nor the library has, media without an encoder config or a placeholder
            id, or a block that is none; the key is named.
    """

    model_type = "elastic"
    sub_configs: ClassVar[Any] = {
        "text_config": AutoConfig,
        "vision_config": AutoConfig,
        "audio_config": AutoConfig,
        "video_config": AutoConfig,
        "host_config": AutoConfig,
    }

    text_config: Any = None
    vision_config: Any = None
    audio_config: Any = None
    video_config: Any = None
    host_config: Any = None
    media: Any = None
    placeholder_ids: Any = None
    new_tokens: Any = None
    adapter: Any = None
    quantization: Any = None
    holds_adapter: bool = False
    sources: Any = None
    trained_parts: list[str] | tuple[str, ...] = ("compressors", "adapter")
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        _check_keys(kwargs)
        register_av_hubert()
        for key in self.sub_configs:
            value = getattr(self, key)
            if isinstance(value, dict):
                setattr(self, key, AutoConfig.for_model(**value))
        if self.host_config is not None:
            find_family(self.host_config.model_type, reference=f"{FILE}: host_config")
            self.text_config = self.host_config.get_text_config()
        self.media = {medium: _read_medium(medium, block) for medium, block in (self.media or {}).items()}
        if isinstance(self.adapter, Mapping):
            self.adapter = _read_kind("adapter", ADAPTERS, self.adapter, default="lora")
        if isinstance(self.quantization, Mapping):
            self.quantization = _read_kind("quantization", QUANTIZATIONS, self.quantization)
        self.placeholder_ids = self.placeholder_ids or {}
        # A JSON file has its keys in the order of the alphabet.
        self.new_tokens = dict(sorted((self.new_tokens or {}).items(), key=lambda item: item[1]))
        self.sources = self.sources or {}
        if self.text_config is not None:
            tied = self.text_config if self.host_config is None else self.host_config
            self.tie_word_embeddings = bool(getattr(tied, "tie_word_embeddings", False))
        super().__post_init__(**kwargs)
        for medium in self.encoded_media:
            if self.host_config is None and getattr(self, CONFIG_KEYS[medium]) is None:
                raise ValueError(f"{FILE} has media.{medium}, but {CONFIG_KEYS[medium]} is missing")
            if medium not in self.placeholder_ids:
                raise ValueError(f"{FILE} has media.{medium}, but placeholder_ids.{medium} is missing")
        _ = self.space  # refuses frames that the compressor of images does not serve

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, as they are written."""
        values = super().to_dict()
        values["media"] = {medium: plain(block) for medium, block in (self.media or {}).items()}
        for block in values["media"].values():
            block.get("encoder", {}).pop("source", None)
        if self.host_config is not None:  # it stands in the host's own
            values.pop("text_config", None)
        values["adapter"] = plain(self.adapter)
        if self.quantization is None:
            values.pop("quantization", None)
        else:
            values["quantization"] = plain(self.quantization)
        return values

    @property
    def space(self) -> Space:
        """Return the budgets this model was trained on."""
        space = space_of(self.media)
        if self.host_config is None or (tiling := host_tiling(self.host_config)) is None:
            return space
        return Space({medium: replace(one, tiling=tiling) for medium, one in space.media.items()})

    @property
    def encoded_media(self) -> dict[str, Any]:
        """Return the blocks of the media that have an encoder of their own."""
        media: dict[str, Any] = self.media or {}
        return {m: media[m] for m in MEDIA if m in media and not isinstance(media[m].encoder, FramesConfig)}

    @property
    def encoder_configs(self) -> dict[str, PreTrainedConfig]:
        """Return the encoders' configs by medium, for the media that have an encoder of their own, or the host's."""
        if self.host_config is not None:
            config: PreTrainedConfig = self.host_config
            return dict.fromkeys(self.encoded_media, config)
        return {medium: getattr(self, CONFIG_KEYS[medium]) for medium in self.encoded_media}

    @property
    def unsaid_ids(self) -> list[int]:
        """Return the ids that no answer may hold: those of placeholders and of marks around media, which are no words.

        Some may lie behind the LLM's vocabulary, where they have no logit.
        """
        return sorted({*(self.placeholder_ids or {}).values(), *(self.new_tokens or {}).values()})

    def get_text_config(self, *args: Any, **kwargs: Any) -> PreTrainedConfig:
        """Return the LLM's config, whatever part is asked for: caches and generation only ever concern the LLM."""
        return self.text_config


def _check_keys(keys: Iterable[str]) -> None:
    """Refuse keys that are no fields and not the library's, which the library would keep and nobody read."""
    for key in keys:
        if key not in _base_keys() and key not in LIBRARY_KEYS:
            allowed = sorted(field.name for field in fields(ElasticConfig))  # type: ignore[arg-type]
            raise ValueError(f"{FILE}: unknown key {key}; {nearest(key, allowed)}")


@cache
def _base_keys() -> frozenset[str]:
    """Return what every config of transformers writes, such as `model_type`, which is not a field."""
    return frozenset(PreTrainedConfig().to_dict())


def _read_medium(medium: str, block: Any) -> Any:
    """Read a block and forget where its encoder came from, which `sources` tells."""
    if medium not in BLOCKS:
        raise ValueError(f"{FILE}: media.{medium} is not a medium; allowed: {', '.join(BLOCKS)}")
    if isinstance(block, Mapping):
        encoder = block.get("encoder")
        if encoder is not None and encoder.get("kind", "lips") != "frames":
            block = {**block, "encoder": {"source": "", **encoder}}
        try:
            block = read(BLOCKS[medium], block, path=f"media.{medium}")
        except ValueError as error:
            raise ValueError(f"{FILE}: {error}") from error
    if block.encoder is None or isinstance(block.encoder, FramesConfig):  # a host's own, or that of images
        return block
    return replace(block, encoder=replace(block.encoder, source=""))


def _read_kind(key: str, classes: Registry[type], values: Mapping[str, Any], *, default: str = "") -> Any:
    """Read a block that comes in kinds.

    Raises:
        ValueError: another kind, or a key that it has not.
    """
    kind = values.get("kind", default)
    if kind not in classes:
        raise ValueError(f"{FILE}: {key}.kind is {kind!r}; allowed: {', '.join(classes)}")
    try:
        return read(classes[kind], values, path=key)
    except ValueError as error:
        raise ValueError(f"{FILE}: {error}") from error
