"""Combines what came with an encoder with what its block in a config says, and compares the files of a checkpoint.

Knows plain values of image processors and feature extractors. Does not know pixels, audio or text.
"""

import os
from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedConfig

from mllm.config.medium import AudioEncoderConfig, ImageEncoderConfig, LipsConfig
from mllm.config.nearest import nearest
from mllm.encoders.audio import SAMPLE_RATE_HZ, WHISPER_SAMPLES_PER_FRAME
from mllm.model.configuration import FILE as MODEL_FILE
from mllm.model.configuration import ElasticConfig

FILE = "processor_config.json"
PADDED = {"image_processor_type": "LlavaImageProcessorPil", "do_pad": True}
"""What makes an image processor put margins in its mean colour around an image, computed as LLaVA's code does."""
_LIBRARY_KEYS = ("processor_class", "auto_map", "chat_template")
"""What transformers itself writes into the file of a processor, or adds to it from a file beside it."""


def preprocessor_values(block: Any, encoder: PreTrainedConfig, values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the plain values that `build_transform` makes the encoder's input of a decoded file by.

    Args:
        block: the `encoder` block of a medium.
        encoder: config of its backbone.
        values: the image processor or feature extractor that came with it.
    """
    if isinstance(block, LipsConfig):
        return {"size_pixels": block.size_pixels, "crop_pixels": block.crop_pixels}
    if isinstance(block, AudioEncoderConfig):
        own = {"normalize_audio": block.normalize, **({} if block.padding == "window" else {"pads_audio": False})}
        return {**values, **own} if values else {}
    assert isinstance(block, ImageEncoderConfig)
    if encoder.model_type == "siglip2_vision_model":
        most = getattr(encoder, "num_patches", 0) if block.max_num_patches == "auto" else block.max_num_patches
        return {**values, "max_num_patches": most, "patch_size": getattr(encoder, "patch_size", 0)}
    if block.image_size is not None:
        height, width = block.image_size
        squeezed = {"do_resize": True, "size": {"height": height, "width": width}, "do_center_crop": False}
        values = {**values, **squeezed}
    return {"do_center_crop": False, **values, **PADDED} if block.pad_to_square else dict(values)


def check_has_config(folder: str | os.PathLike[str]) -> None:
    """Refuse a folder that holds a processor alone; transformers would make an empty config of that.

    Raises:
        FileNotFoundError: there is no config of a model in it.
    """
    if not os.path.isfile(os.path.join(folder, MODEL_FILE)):
        raise FileNotFoundError(
            f"{folder} holds no {MODEL_FILE}, where the media and budgets of a model stand; save the model there too"
        )


def check_keys(values: Mapping[str, Any]) -> None:
    """Refuse keys of a processor's file that are neither ours nor the library's, which would drop them.

    Raises:
        ValueError: naming the file, the key and the nearest one.
    """
    for key in values:
        if key != "elastic" and key not in _LIBRARY_KEYS:
            raise ValueError(f"{FILE}: unknown key {key}; {nearest(key, ['elastic', *_LIBRARY_KEYS])}")


def check_files(
    config: ElasticConfig, tokenizer: Any, placeholder_ids: Mapping[str, int], preprocessors: Mapping[str, Any]
) -> None:
    """Refuse files of a processor that are not those of the model's config.

    Args:
        config: of the model.
        tokenizer, placeholder_ids, preprocessors: of the processor; ids and plain values by medium.

    Raises:
        ValueError: naming both files and the key.
    """
    for medium, token_id in (config.placeholder_ids or {}).items():
        if (known := placeholder_ids[medium]) != token_id:
            raise ValueError(
                f"{MODEL_FILE} says placeholder_ids.{medium} is {token_id}, but in tokenizer.json it is {known}"
            )
    if config.host_config is not None:
        return
    for token, token_id in (config.new_tokens or {}).items():
        if (known := tokenizer.convert_tokens_to_ids(token)) != token_id:
            raise ValueError(f"{MODEL_FILE} says new_tokens.{token} is {token_id}, but in tokenizer.json it is {known}")
    for medium in sorted(preprocessors.keys() ^ config.encoder_configs.keys()):
        has, lacks = (FILE, MODEL_FILE) if medium in preprocessors else (MODEL_FILE, FILE)
        raise ValueError(f"{has} has {medium}, but {lacks} has not (elastic.preprocessors and media)")
    audio = config.encoder_configs.get("audio")
    if audio is not None and audio.model_type == "whisper":
        _check_extractor(audio, preprocessors["audio"])


def _check_extractor(encoder: Any, values: Mapping[str, Any]) -> None:
    """Refuse a feature extractor of another Whisper."""
    key = f"{FILE}: elastic.preprocessors.audio"
    window = encoder.max_source_positions * WHISPER_SAMPLES_PER_FRAME
    from_encoder = {
        "feature_size": (encoder.num_mel_bins, "audio_config.num_mel_bins"),
        "sampling_rate": (SAMPLE_RATE_HZ, "Whisper's rate"),
        "chunk_length": (window / SAMPLE_RATE_HZ, "the seconds of audio_config.max_source_positions"),
    }
    for name, (expected, where) in from_encoder.items():
        if values.get(name, expected) != expected:
            raise ValueError(f"{key}.{name} is {values[name]}, but {where} in {MODEL_FILE} is {expected:g}")
