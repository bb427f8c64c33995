"""The configuration of an elastic model: the configs of its parts, and per medium how tokens are made.

Knows plain values only. Does not know weights, files or how anything is computed.
"""

from typing import Any, ClassVar

from transformers import AutoConfig, PreTrainedConfig

from mllm.budget import MEDIA, Space
from mllm.encoders.av_hubert import register_av_hubert

# Names that generation utilities and serving engines look for.
CONFIG_KEYS = {"image": "vision_config", "audio": "audio_config", "video": "video_config"}
TOWER_NAMES = {"image": "vision_tower", "audio": "audio_tower", "video": "video_tower"}


class ElasticConfig(PreTrainedConfig):
    """Everything that shapes an elastic model.

    Args:
        text_config: config of the LLM, any decoder that `AutoModel` builds.
        vision_config, audio_config, video_config: configs of the encoders; a medium without one is not taken.
        media: per medium `{compressor, budgets, ...}`; the budgets are the trained space. See `MediumSpace` for what
            counts and `mllm.compressors.build_compressor` for what shapes the compressor.
        placeholder_ids: per medium the token id that stands once per soft token in the prompt.
        span_ids: per medium the ids put before and after its run, or nothing.
        new_tokens: by its text the id of each token that has an embedding row of its own beside the LLM's; rows are in
            the order of the ids. See `mllm.model.new_tokens`. Runs from before there were such rows have none.
        adapter: the adapter inside the LLM, e.g. `{kind: lora, rank: 16, alpha: 32, targets: [q_proj, v_proj]}`.
        trained_parts: what trains, and so what a run's checkpoint holds; see `mllm.model.trainables.PARTS`.
        sources: where each frozen part came from, by part (`llm`, `image`, ...), with its digest once trained.

    Raises:
        ValueError: media without an encoder config or a placeholder id, or a space that is none.
    """

    model_type = "elastic"
    sub_configs: ClassVar[Any] = {
        "text_config": AutoConfig,
        "vision_config": AutoConfig,
        "audio_config": AutoConfig,
        "video_config": AutoConfig,
    }

    text_config: Any = None
    vision_config: Any = None
    audio_config: Any = None
    video_config: Any = None
    media: Any = None
    placeholder_ids: Any = None
    span_ids: Any = None
    new_tokens: Any = None
    adapter: Any = None
    sources: Any = None
    trained_parts: list[str] | tuple[str, ...] = ("compressors", "adapter")
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        register_av_hubert()
        for key in self.sub_configs:
            value = getattr(self, key)
            if isinstance(value, dict):
                setattr(self, key, AutoConfig.for_model(**value))
        self.media = self.media or {}
        self.placeholder_ids = self.placeholder_ids or {}
        self.span_ids = self.span_ids or {}
        # A JSON file has its keys in the order of the alphabet.
        self.new_tokens = dict(sorted((self.new_tokens or {}).items(), key=lambda item: item[1]))
        self.sources = self.sources or {}
        if self.text_config is not None:
            self.tie_word_embeddings = bool(getattr(self.text_config, "tie_word_embeddings", False))
        super().__post_init__(**kwargs)
        self._check()

    def _check(self) -> None:
        Space.from_settings(self.media)
        for medium in self.media:
            if getattr(self, CONFIG_KEYS[medium]) is None:
                raise ValueError(f"media.{medium} has settings, but {CONFIG_KEYS[medium]} is missing")
            if medium not in self.placeholder_ids:
                raise ValueError(f"media.{medium} has settings, but placeholder_ids.{medium} is missing")

    @property
    def space(self) -> Space:
        """The budgets this model was trained on."""
        return Space.from_settings(self.media)

    @property
    def encoder_configs(self) -> dict[str, PreTrainedConfig]:
        """Encoder configs by medium, for the media this model takes."""
        return {medium: getattr(self, CONFIG_KEYS[medium]) for medium in MEDIA if medium in (self.media or {})}

    def get_text_config(self, *args: Any, **kwargs: Any) -> PreTrainedConfig:
        """The LLM's config, whatever part is asked for: caches and generation only ever concern the LLM."""
        return self.text_config
