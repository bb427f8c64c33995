"""Encoders: raw images, sound or video to features. One file per family.

Knows transformers' model types, and the block of a config that shapes an encoder.
Does not know compressors, budgets, the LLM, or where weights come from.
"""

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel

from mllm.encoders.audio import SETTINGS as AUDIO_SETTINGS
from mllm.encoders.audio import wave_class, wave_facts, whisper_class, whisper_facts, wrap_wave, wrap_whisper
from mllm.encoders.av_hubert import AVHubertAudioConfig, AVHubertConfig, AVHubertEncoder, register_av_hubert
from mllm.encoders.av_hubert_audio import av_hubert_audio_facts, wrap_av_hubert_audio
from mllm.encoders.av_hubert_video import av_hubert_class, av_hubert_video_facts, wrap_av_hubert_video
from mllm.encoders.base import Encoder, EncoderFacts, freeze
from mllm.encoders.naflex import SETTINGS as NAFLEX_SETTINGS
from mllm.encoders.naflex import naflex_facts, wrap_naflex
from mllm.encoders.vision import SETTINGS as VISION_SETTINGS
from mllm.encoders.vision import vision_class, vision_facts, wrap_vision

__all__ = [
    "ENCODERS",
    "SETTINGS",
    "AVHubertAudioConfig",
    "AVHubertConfig",
    "AVHubertEncoder",
    "Encoder",
    "EncoderFacts",
    "backbone_class",
    "backbone_config",
    "build_encoder",
    "encoder_facts",
    "freeze",
    "register_av_hubert",
    "wrap_encoder",
]

SETTINGS = (*VISION_SETTINGS, *NAFLEX_SETTINGS, *AUDIO_SETTINGS)
"""The keys of a `media.<medium>` block that shape an encoder."""


@dataclass(frozen=True)
class Family:
    """How one family of backbones becomes an encoder of a medium."""

    medium: str
    backbone: Callable[[PreTrainedConfig], type[PreTrainedModel]]
    facts: Callable[[PreTrainedConfig, Mapping[str, Any]], EncoderFacts]
    wrap: Callable[[Any, Mapping[str, Any]], Encoder]


_VISION = Family("image", vision_class, vision_facts, wrap_vision)
_WAVE = Family("audio", wave_class, wave_facts, wrap_wave)

ENCODERS = {
    "clip_vision_model": _VISION,
    "siglip_vision_model": _VISION,
    "siglip2_vision_model": Family("image", vision_class, naflex_facts, wrap_naflex),
    "dinov2": _VISION,
    "dinov2_with_registers": _VISION,
    "dinov3_vit": _VISION,
    "whisper": Family("audio", whisper_class, whisper_facts, wrap_whisper),
    "hubert": _WAVE,
    "wav2vec2": _WAVE,
    "wavlm": _WAVE,
    "av_hubert": Family("video", av_hubert_class, av_hubert_video_facts, wrap_av_hubert_video),
    "av_hubert_audio": Family("audio", av_hubert_class, av_hubert_audio_facts, wrap_av_hubert_audio),
}
"""By the `model_type` of the backbone's config."""


def backbone_config(config: PreTrainedConfig, medium: str | None = None) -> PreTrainedConfig:
    """What of a source's config an encoder is built from; most configs are it as they are.

    It is the vision half of an image-and-text config (CLIP, SigLIP), and AV-HuBERT's as a listener where `medium`, the
    block that names it, is `audio`.
    """
    if medium == "audio" and config.model_type == AVHubertConfig.model_type:
        values = config.to_dict()
        values.pop("model_type")
        return AVHubertAudioConfig(**values)
    return config.vision_config if hasattr(config, "vision_config") else config


def encoder_facts(config: PreTrainedConfig, settings: Mapping[str, Any] | None = None) -> EncoderFacts:
    """What an encoder publishes, from its config alone.

    Args:
        config: config of the backbone.
        settings: the `media.<medium>` block; only the keys in `SETTINGS` are read.

    Raises:
        ValueError: a backbone that is none of `ENCODERS`.
    """
    return _family(config).facts(config, settings or {})


def backbone_class(config: PreTrainedConfig) -> type[PreTrainedModel]:
    """The class whose `from_pretrained` reads the backbone's weights.

    Raises:
        ValueError: a backbone that is none of `ENCODERS`.
    """
    return _family(config).backbone(config)


def wrap_encoder(backbone: PreTrainedModel, settings: Mapping[str, Any] | None = None) -> Encoder:
    """An encoder around a backbone that has its weights; the backbone is kept as `.backbone` and may be cut.

    Raises:
        ValueError: a backbone that is none of `ENCODERS`, or settings it cannot meet.
    """
    return _family(backbone.config).wrap(backbone, settings or {})


def build_encoder(medium: str, config: PreTrainedConfig, settings: Mapping[str, Any] | None = None) -> Encoder:
    """An encoder with random weights; works on the meta device.

    Args:
        medium: what it is wanted for: `image`, `audio` or `video`.
        config: config of the backbone.
        settings: the `media.<medium>` block; only the keys in `SETTINGS` are read.

    Raises:
        ValueError: a backbone that is none of `ENCODERS` or reads another medium, or settings it cannot meet.
    """
    facts = encoder_facts(config, settings)
    if facts.medium != medium:
        raise ValueError(f"{config.model_type} reads {facts.medium}, not {medium}; for {medium}: {_names(medium)}")
    return wrap_encoder(backbone_class(config)._from_config(copy.deepcopy(config)), settings)


def _family(config: PreTrainedConfig) -> Family:
    if config.model_type not in ENCODERS:
        raise ValueError(f"no encoder for model_type {config.model_type!r}; allowed: {', '.join(ENCODERS)}")
    return ENCODERS[config.model_type]


def _names(medium: str) -> str:
    return ", ".join(name for name, family in ENCODERS.items() if family.medium == medium) or "none"
