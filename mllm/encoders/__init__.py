"""Encoders turn raw images, audio or video into features. One file per family.

Knows transformers' model types, and the `encoder` block of a medium's config.
Does not know compressors, budgets, the LLM, or where weights come from.
"""

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel

from mllm.config.medium import AudioEncoderConfig, ImageEncoderConfig, LipsConfig
from mllm.encoders.audio import wave_class, wave_facts, whisper_class, whisper_facts, wrap_wave, wrap_whisper
from mllm.encoders.av_hubert import AVHubertAudioConfig, AVHubertConfig, AVHubertEncoder, register_av_hubert
from mllm.encoders.av_hubert_audio import av_hubert_audio_facts, wrap_av_hubert_audio
from mllm.encoders.av_hubert_video import av_hubert_class, av_hubert_video_facts, wrap_av_hubert_video
from mllm.encoders.base import Encoder, EncoderFacts, freeze
from mllm.encoders.naflex import naflex_facts, wrap_naflex
from mllm.encoders.vision import vision_class, vision_facts, wrap_vision
from mllm.utils.registry import Registry

__all__ = [
    "ENCODERS",
    "AVHubertAudioConfig",
    "AVHubertConfig",
    "AVHubertEncoder",
    "Encoder",
    "EncoderBlock",
    "EncoderFacts",
    "Family",
    "backbone_class",
    "backbone_config",
    "build_encoder",
    "check_block",
    "default_block",
    "encoder_facts",
    "freeze",
    "register_av_hubert",
    "register_encoder",
    "wrap_encoder",
]

EncoderBlock = ImageEncoderConfig | AudioEncoderConfig | LipsConfig
BLOCKS: dict[str, type] = {"image": ImageEncoderConfig, "audio": AudioEncoderConfig, "video": LipsConfig}


@dataclass(frozen=True)
class Family:
    """Says how one family of backbones becomes an encoder of a medium.

    Args:
        flops: counts those of one item, given the config, an `mllm.evaluation.flops.Item` and the block; only families
            from outside have it.
        refused: keys of the medium's `encoder` block that this family has no use for, each with the reason.
    """

    medium: str
    backbone: Callable[[PreTrainedConfig], type[PreTrainedModel]]
    facts: Callable[[PreTrainedConfig, Any], EncoderFacts]
    wrap: Callable[[Any, Any], Encoder]
    refused: Mapping[str, str] = field(default_factory=dict)
    flops: Callable[[PreTrainedConfig, Any, Any], int] | None = None


_VISION = Family(
    "image",
    vision_class,
    vision_facts,
    wrap_vision,
    {"max_num_patches": "goes with siglip2_vision_model, whose images keep their shape; allowed: image_size"},
)
_NAFLEX = Family(
    "image",
    vision_class,
    naflex_facts,
    wrap_naflex,
    {
        "image_size": "does not go with images that keep their shape; allowed: max_num_patches",
        "pad_to_square": "does not go with images that keep their shape; leave it out",
    },
)
_WHISPER = Family("audio", whisper_class, whisper_facts, wrap_whisper)
_ABOUT_WINDOW = "is about Whisper's window; leave it out"
_WINDOW_KEYS = {"released_cut": _ABOUT_WINDOW, "padding": _ABOUT_WINDOW}
_WAVE = Family("audio", wave_class, wave_facts, wrap_wave, _WINDOW_KEYS)
_AV_HUBERT_AUDIO = Family(
    "audio",
    av_hubert_class,
    av_hubert_audio_facts,
    wrap_av_hubert_audio,
    {**_WINDOW_KEYS, "normalize": "does not go with AV-HuBERT, whose features are normalised; leave it out"},
)

ENCODERS: Registry[Family] = Registry(
    "encoder",
    {
        "clip_vision_model": _VISION,
        "siglip_vision_model": _VISION,
        "siglip2_vision_model": _NAFLEX,
        "dinov2": _VISION,
        "dinov2_with_registers": _VISION,
        "dinov3_vit": _VISION,
        "whisper": _WHISPER,
        "hubert": _WAVE,
        "wav2vec2": _WAVE,
        "wavlm": _WAVE,
        "av_hubert": Family("video", av_hubert_class, av_hubert_video_facts, wrap_av_hubert_video),
        "av_hubert_audio": _AV_HUBERT_AUDIO,
    },
)
"""By the `model_type` of the backbone's config."""


def register_encoder(model_type: str, family: Family) -> None:
    """Add a family of encoders from outside, which is taken wherever a config's source has this `model_type`.

    The classes of its config and its model are registered with transformers' Auto classes by the package that has them.

    Raises:
        ValueError: the name is taken by another family.
    """
    ENCODERS.register(model_type, family)


def backbone_config(config: PreTrainedConfig, medium: str | None = None) -> PreTrainedConfig:
    """Returns what of a source's config an encoder is built from; most configs are it as they are.

    It is the vision half of an image-and-text config (CLIP, SigLIP), and AV-HuBERT's as a listener where `medium`, the
    block that names it, is `audio`.
    """
    if medium == "audio" and config.model_type == AVHubertConfig.model_type:
        values = config.to_dict()
        values.pop("model_type")
        return AVHubertAudioConfig(**values)
    return config.vision_config if hasattr(config, "vision_config") else config


def default_block(config: PreTrainedConfig) -> EncoderBlock:
    """Return the `encoder` block that says nothing of how a backbone is used.

    Raises:
        ValueError: a backbone that is none of `ENCODERS`.
    """
    return BLOCKS[_family(config).medium](source="")


def check_block(config: PreTrainedConfig, block: EncoderBlock) -> None:
    """Refuse keys that other families of the same medium have.

    Args:
        config: config of the backbone.
        block: the medium's `encoder` block.

    Raises:
        ValueError: a backbone that is none of `ENCODERS`, or a key that this family has no use for.
    """
    family = _family(config)
    defaults = {item.name: item.default for item in fields(block)}
    for key, reason in family.refused.items():
        if (value := getattr(block, key)) != defaults[key]:
            name = f"model.{family.medium}.encoder.{key}"
            raise ValueError(f"{name} is {value} and the encoder a {config.model_type}; it {reason}")


def encoder_facts(config: PreTrainedConfig, block: EncoderBlock | None = None) -> EncoderFacts:
    """Return what an encoder publishes, from its config alone.

    Args:
        config: config of the backbone.
        block: the medium's `encoder` block; the default one when left out.

    Raises:
        ValueError: a backbone that is none of `ENCODERS`, or a key that it has no use for.
    """
    block = default_block(config) if block is None else block
    check_block(config, block)
    return _family(config).facts(config, block)


def backbone_class(config: PreTrainedConfig) -> type[PreTrainedModel]:
    """Return the class whose `from_pretrained` reads the backbone's weights.

    Raises:
        ValueError: a backbone that is none of `ENCODERS`.
    """
    return _family(config).backbone(config)


def wrap_encoder(backbone: PreTrainedModel, block: EncoderBlock | None = None) -> Encoder:
    """Make an encoder of a backbone that has its weights; the backbone is kept as `.backbone` and may be cut.

    Raises:
        ValueError: a backbone that is none of `ENCODERS`, or a key that it cannot meet.
    """
    block = default_block(backbone.config) if block is None else block
    check_block(backbone.config, block)
    return _family(backbone.config).wrap(backbone, block)


def build_encoder(medium: str, config: PreTrainedConfig, block: EncoderBlock | None = None) -> Encoder:
    """Make an encoder with random weights; works on the meta device.

    Args:
        medium: what it is wanted for: `image`, `audio` or `video`.
        config: config of the backbone.
        block: the medium's `encoder` block; the default one when left out.

    Raises:
        ValueError: a backbone that is none of `ENCODERS` or reads another medium, or a key that it cannot meet.
    """
    if (reads := _family(config).medium) != medium:
        raise ValueError(f"{config.model_type} reads {reads}, not {medium}; for {medium}: {_names(medium)}")
    return wrap_encoder(backbone_class(config)._from_config(copy.deepcopy(config)), block)


def _family(config: PreTrainedConfig) -> Family:
    if config.model_type not in ENCODERS:
        raise ValueError(f"no encoder for model_type {config.model_type!r}; allowed: {', '.join(ENCODERS)}")
    return ENCODERS[config.model_type]


def _names(medium: str) -> str:
    return ", ".join(name for name, family in ENCODERS.items() if family.medium == medium) or "none"
