"""Tiny random hosts of every family, saved as a hub would hold them: weights, processor, tokenizer, chat template."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_tekken
import torch
import transformers as hf
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

TEXT = {
    "vocab_size": 400,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}
VISION = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "patch_size": 4,
    "num_channels": 3,
    "image_size": 24,
}
SPECIAL = ["<pad>", "<s>", "</s>", "<unk>"]
TYPED = (
    "{% for message in messages %}{{ message.role | upper }}: {% for part in message.content %}"
    "{% if part.type == 'MEDIUM' %}TOKEN{% else %}{{ part.text }}{% endif %}{% endfor %}"
    "{% if message.role == 'assistant' %}</s>{% endif %}{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT: {% endif %}"
)
"""A template of typed parts, as most hosts have."""
IMAGES_FIRST = (
    "{% for message in messages %}{{ message.role | upper }}: {% for part in message.content %}"
    "{% if part.type == 'image' %}<image>\n{% endif %}{% endfor %}{% for part in message.content %}"
    "{% if part.type == 'text' %}{{ part.text }}{% endif %}{% endfor %}"
    "{% if message.role == 'assistant' %}</s>{% else %} {% endif %}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
"""As LLaVA's: all images of a message stand first."""


@dataclass(frozen=True)
class TinyHost:
    """Makes one family: its config, of a tokenizer, and its processor."""

    special: tuple[str, ...]
    template: str
    config: Callable[[Any], Any]
    processor: Callable[[Any], Any]
    medium: str = "image"
    names: tuple[tuple[str, str], ...] = ()
    """Special tokens that the processor knows by attributes of the tokenizer."""


def tokenizer_of(host: TinyHost) -> Any:
    """A tokenizer of bytes, with the special tokens of a family."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    pieces = [*SPECIAL, *letters]
    # As in Gemma's vocabularies the line break is token 108.
    other, line_break = 108, pieces.index("Ċ")
    pieces[other], pieces[line_break] = pieces[line_break], pieces[other]
    vocabulary = {token: number for number, token in enumerate(pieces)}
    backend = Tokenizer(models.BPE(vocabulary, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    made = hf.PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        extra_special_tokens=dict(host.names),
    )
    made.add_special_tokens({"additional_special_tokens": list(host.special)})
    made.chat_template = host.template or None
    return made


def _id(tokenizer: Any, token: str) -> int:
    return int(tokenizer.convert_tokens_to_ids(token))


def _llava_config(tokenizer: Any) -> Any:
    return hf.LlavaConfig(
        vision_config=hf.CLIPVisionConfig(projection_dim=16, **VISION),
        text_config=hf.LlamaConfig(**TEXT),
        image_token_id=_id(tokenizer, "<image>"),
        vision_feature_layer=-2,
        tie_word_embeddings=False,
    )


def _llava_processor(tokenizer: Any) -> Any:
    return hf.LlavaProcessor(
        image_processor=hf.CLIPImageProcessorPil(size={"shortest_edge": 24}, crop_size={"height": 24, "width": 24}),
        tokenizer=tokenizer,
        patch_size=4,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=tokenizer.chat_template,
    )


def _siglip_llava_config(tokenizer: Any) -> Any:
    return hf.LlavaConfig(
        vision_config=hf.SiglipVisionConfig(vision_use_head=False, **VISION),
        text_config=hf.LlamaConfig(**TEXT),
        image_token_id=_id(tokenizer, "<image>"),
        vision_feature_layer=-2,
        vision_feature_select_strategy="full",
        tie_word_embeddings=False,
    )


def _siglip_llava_processor(tokenizer: Any) -> Any:
    return hf.LlavaProcessor(
        image_processor=hf.SiglipImageProcessorPil(size={"height": 24, "width": 24}),
        tokenizer=tokenizer,
        patch_size=4,
        vision_feature_select_strategy="full",
        num_additional_image_tokens=0,
        chat_template=tokenizer.chat_template,
    )


def _internvl_config(tokenizer: Any) -> Any:
    vision = {**VISION, "image_size": [24, 24], "patch_size": [4, 4]}
    return hf.InternVLConfig(
        vision_config=hf.InternVLVisionConfig(**vision),
        text_config=hf.Qwen2Config(**TEXT),
        image_token_id=_id(tokenizer, "<IMG_CONTEXT>"),
        image_seq_length=9,
        downsample_ratio=0.5,
        tie_word_embeddings=False,
    )


def _internvl_processor(tokenizer: Any) -> Any:
    return processor_class("internvl")(
        image_processor=hf.GotOcr2ImageProcessorPil(
            size={"height": 24, "width": 24}, crop_to_patches=True, min_patches=1, max_patches=4
        ),
        tokenizer=tokenizer,
        video_processor=None,
        image_seq_length=9,
        chat_template=tokenizer.chat_template,
    )


_IDEFICS_TAGS = (
    *("<image>", "<fake_token_around_image>", "<global-img>", "<end_of_utterance>"),
    *(f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7)),
)


def _idefics3_config(tokenizer: Any) -> Any:
    return hf.Idefics3Config(
        vision_config=hf.Idefics3VisionConfig(**VISION),
        text_config=hf.LlamaConfig(**TEXT),
        image_token_id=_id(tokenizer, "<image>"),
        scale_factor=2,
        pad_token_id=0,
        tie_word_embeddings=False,
    )


def _idefics3_processor(tokenizer: Any) -> Any:
    return hf.Idefics3Processor(
        image_processor=hf.Idefics3ImageProcessorPil(size={"longest_edge": 48}, max_image_size={"longest_edge": 24}),
        tokenizer=tokenizer,
        image_seq_len=9,
        chat_template=tokenizer.chat_template,
    )


def _smolvlm_config(tokenizer: Any) -> Any:
    return hf.SmolVLMConfig(
        vision_config=hf.SmolVLMVisionConfig(**VISION),
        text_config=hf.LlamaConfig(**TEXT),
        image_token_id=_id(tokenizer, "<image>"),
        scale_factor=2,
        pad_token_id=0,
        tie_word_embeddings=False,
    )


def _smolvlm_processor(tokenizer: Any) -> Any:
    return processor_class("smolvlm")(
        image_processor=hf.SmolVLMImageProcessorPil(size={"longest_edge": 48}, max_image_size={"longest_edge": 24}),
        tokenizer=tokenizer,
        video_processor=None,
        image_seq_len=9,
        chat_template=tokenizer.chat_template,
    )


_COHERE_TEXT = {**TEXT, "sliding_window": 64, "logit_scale": 0.25}


def _aya_vision_config(tokenizer: Any) -> Any:
    return hf.AyaVisionConfig(
        vision_config=hf.SiglipVisionConfig(vision_use_head=False, **VISION),
        text_config=hf.Cohere2Config(**_COHERE_TEXT),
        image_token_id=_id(tokenizer, "<|IMG_PATCH|>"),
        downsample_factor=2,
        alignment_intermediate_size=64,
        vision_feature_select_strategy="full",
        tie_word_embeddings=False,
    )


def _aya_vision_processor(tokenizer: Any) -> Any:
    return hf.AyaVisionProcessor(
        image_processor=hf.GotOcr2ImageProcessorPil(
            size={"height": 24, "width": 24}, crop_to_patches=True, min_patches=1, max_patches=4
        ),
        tokenizer=tokenizer,
        patch_size=4,
        img_size=24,
        downsample_factor=2,
        chat_template=tokenizer.chat_template,
    )


def _cohere2_vision_config(tokenizer: Any) -> Any:
    return hf.Cohere2VisionConfig(
        vision_config=hf.SiglipVisionConfig(vision_use_head=False, **VISION),
        text_config=hf.Cohere2Config(**_COHERE_TEXT),
        image_token_id=_id(tokenizer, "<|IMG_PATCH|>"),
        downsample_factor=2,
        alignment_intermediate_size=64,
        tie_word_embeddings=False,
    )


def _cohere2_vision_processor(tokenizer: Any) -> Any:
    return hf.Cohere2VisionProcessor(
        image_processor=hf.Cohere2VisionImageProcessor(
            size={"height": 24, "width": 24}, patch_size=3, downsample_factor=2, max_patches=4
        ),
        tokenizer=tokenizer,
        chat_template=tokenizer.chat_template,
    )


_MERGED_VISION = {
    **{"depth": 2, "num_heads": 2, "patch_size": 4, "spatial_merge_size": 2, "temporal_patch_size": 2},
    **{"hidden_size": 16, "intermediate_size": 24, "out_hidden_size": 32, "in_channels": 3},
}
_PIXELS = {"shortest_edge": 8 * 8 * 4, "longest_edge": 8 * 8 * 40}
"""Of images that keep their shape: from 4 to 40 soft tokens of 8 x 8 pixels."""


def _merged_ids(tokenizer: Any, image: str = "<|image_pad|>", video: str = "<|video_pad|>") -> dict[str, int]:
    return {"image_token_id": _id(tokenizer, image), "video_token_id": _id(tokenizer, video)}


def _mrope_text(section: tuple[int, int, int] = (1, 1, 2), **more: Any) -> dict[str, Any]:
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": list(section), **more}
    return {**TEXT, "rope_parameters": rope}


def _vision_ids(tokenizer: Any) -> dict[str, int]:
    return {f"vision_{end}_token_id": _id(tokenizer, f"<|vision_{end}|>") for end in ("start", "end")}


def _qwen2_vl_config(tokenizer: Any) -> Any:
    vision = {**_MERGED_VISION, "embed_dim": 16, "hidden_size": 32, "mlp_ratio": 2}
    return hf.Qwen2VLConfig(
        vision_config={key: vision[key] for key in vision if key not in ("intermediate_size", "out_hidden_size")},
        text_config=_mrope_text(),
        tie_word_embeddings=False,
        **_merged_ids(tokenizer),
        **_vision_ids(tokenizer),
    )


def _qwen2_5_vl_config(tokenizer: Any) -> Any:
    return hf.Qwen2_5_VLConfig(
        vision_config={**_MERGED_VISION, "window_size": 16, "fullatt_block_indexes": [1]},
        text_config=_mrope_text(),
        tie_word_embeddings=False,
        **_merged_ids(tokenizer),
        **_vision_ids(tokenizer),
    )


_EXPERTS = {"moe_intermediate_size": 16, "num_experts": 4, "num_experts_per_tok": 2}


def _qwen3_vl_config(tokenizer: Any, kind: str = "Qwen3VLConfig", **text: Any) -> Any:
    return getattr(hf, kind)(
        vision_config={**_MERGED_VISION, "deepstack_visual_indexes": [0, 1], "num_position_embeddings": 144},
        text_config={**_mrope_text((2, 1, 1), mrope_interleaved=True), "head_dim": 8, **text},
        tie_word_embeddings=False,
        **_merged_ids(tokenizer),
        **_vision_ids(tokenizer),
    )


def _qwen3_5_config(tokenizer: Any, kind: str = "Qwen3_5Config", **more: Any) -> Any:
    text = _mrope_text((2, 1, 1), mrope_interleaved=True, partial_rotary_factor=1.0)
    linear = {f"linear_{kind}_head_dim": 8 for kind in ("key", "value")}
    return getattr(hf, kind)(
        vision_config={**_MERGED_VISION, "num_position_embeddings": 144},
        text_config={
            **{**text, "head_dim": 8, "layer_types": ["linear_attention", "full_attention"]},
            **{**linear, "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_conv_kernel_dim": 4},
            **more,
        },
        tie_word_embeddings=False,
        **_merged_ids(tokenizer),
        **_vision_ids(tokenizer),
    )


def _glm4v_config(tokenizer: Any, kind: str = "Glm4vConfig", **text: Any) -> Any:
    names = ("image_start", "image_end", "video_start", "video_end")
    tokens = ("<|begin_of_image|>", "<|end_of_image|>", "<|begin_of_video|>", "<|end_of_video|>")
    return getattr(hf, kind)(
        vision_config={**_MERGED_VISION, "image_size": 48},
        text_config={**_mrope_text(), **text},
        tie_word_embeddings=False,
        **_merged_ids(tokenizer, "<|image|>", "<|video|>"),
        **{f"{name}_token_id": _id(tokenizer, token) for name, token in zip(names, tokens, strict=True)},
    )


def _qwen3_vl_moe_config(tokenizer: Any) -> Any:
    return _qwen3_vl_config(tokenizer, "Qwen3VLMoeConfig", **_EXPERTS)


def _qwen3_5_moe_config(tokenizer: Any) -> Any:
    return _qwen3_5_config(tokenizer, "Qwen3_5MoeConfig", **_EXPERTS, shared_expert_intermediate_size=16)


def _glm4v_moe_config(tokenizer: Any) -> Any:
    experts = {"n_routed_experts": 4, "moe_intermediate_size": 16, "num_experts_per_tok": 2, "first_k_dense_replace": 1}
    rope = _mrope_text(partial_rotary_factor=1.0)["rope_parameters"]
    return _glm4v_config(tokenizer, "Glm4vMoeConfig", **experts, rope_parameters=rope)


def _merged_processor(family: str) -> Callable[[Any], Any]:
    """Qwen3-VL has the image processor of Qwen2-VL, with other sizes."""
    kind = hf.Glm4vImageProcessorPil if family.startswith("glm4v") else hf.Qwen2VLImageProcessorPil

    def make_processor(tokenizer: Any) -> Any:
        return processor_class(family)(
            image_processor=kind(patch_size=4, temporal_patch_size=2, merge_size=2, size=dict(_PIXELS)),
            tokenizer=tokenizer,
            video_processor=None,
            chat_template=tokenizer.chat_template,
        )

    return make_processor


def _gemma3_config(tokenizer: Any) -> Any:
    return hf.Gemma3Config(
        vision_config=hf.SiglipVisionConfig(vision_use_head=False, **{**VISION, "image_size": 32}),
        text_config=hf.Gemma3TextConfig(**TEXT, head_dim=8, sliding_window=16, sliding_window_pattern=2),
        mm_tokens_per_image=16,
        image_token_id=_id(tokenizer, "<image_soft_token>"),
        boi_token_id=_id(tokenizer, "<start_of_image>"),
        eoi_token_id=_id(tokenizer, "<end_of_image>"),
        tie_word_embeddings=False,
    )


def _gemma3_processor(tokenizer: Any) -> Any:
    return hf.Gemma3Processor(
        image_processor=hf.Gemma3ImageProcessorPil(size={"height": 32, "width": 32}),
        tokenizer=tokenizer,
        image_seq_length=16,
        chat_template=tokenizer.chat_template,
    )


def _paligemma_config(tokenizer: Any) -> Any:
    text = {**TEXT, "vocab_size": 1600, "attn_logit_softcapping": 20.0, "final_logit_softcapping": 5.0}
    return hf.PaliGemmaConfig(
        vision_config=hf.SiglipVisionConfig(vision_use_head=False, **VISION),
        text_config=hf.Gemma2Config(**text, head_dim=8, query_pre_attn_scalar=8, sliding_window=16),
        projection_dim=32,
        hidden_size=32,
        vocab_size=1600,
        image_token_index=_id(tokenizer, "<image>"),
        tie_word_embeddings=False,
    )


def _paligemma_1_config(tokenizer: Any) -> Any:
    config = _paligemma_config(tokenizer).to_dict()
    text = hf.GemmaConfig(**{**TEXT, "vocab_size": 1600}, head_dim=8)
    return hf.PaliGemmaConfig(**{**config, "text_config": text.to_dict()})


def _paligemma_processor(tokenizer: Any) -> Any:
    return hf.PaliGemmaProcessor(
        image_processor=hf.SiglipImageProcessorPil(size={"height": 24, "width": 24}, image_seq_length=36),
        tokenizer=tokenizer,
    )


def _gemma4_config(tokenizer: Any) -> Any:
    heads = {"head_dim": 8, "global_head_dim": 8}
    return hf.Gemma4Config(
        vision_config={
            **{"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, **heads},
            **{"num_key_value_heads": 2, "patch_size": 4, "pooling_kernel_size": 3, "position_embedding_size": 64},
            "default_output_length": 70,
        },
        text_config={
            **{**TEXT, "num_hidden_layers": 3},
            **{"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 400, "sliding_window": 16, **heads},
            **{"num_kv_shared_layers": 0, "num_global_key_value_heads": 2, "use_bidirectional_attention": "vision"},
            "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
            "final_logit_softcapping": 5.0,
        },
        audio_config=None,
        image_token_id=_id(tokenizer, "<image>"),
        video_token_id=_id(tokenizer, "<|video|>"),
        audio_token_id=_id(tokenizer, "<audio>"),
        boi_token_id=_id(tokenizer, "<boi>"),
        eoi_token_id=_id(tokenizer, "<eoi>"),
        tie_word_embeddings=False,
    )


def _gemma4_processor(tokenizer: Any) -> Any:
    return processor_class("gemma4")(
        feature_extractor=None,
        image_processor=hf.Gemma4ImageProcessorPil(patch_size=4, pooling_kernel_size=3, max_soft_tokens=70),
        tokenizer=tokenizer,
        video_processor=None,
        chat_template=tokenizer.chat_template,
    )


_PINPOINTS = [[24, 48], [48, 24], [48, 48]]


def _llava_next_config(tokenizer: Any) -> Any:
    return hf.LlavaNextConfig(
        vision_config=hf.CLIPVisionConfig(projection_dim=16, **VISION),
        text_config=hf.LlamaConfig(**TEXT),
        image_token_id=_id(tokenizer, "<image>"),
        image_grid_pinpoints=_PINPOINTS,
        vision_feature_layer=-2,
        tie_word_embeddings=False,
    )


def _llava_next_processor(tokenizer: Any) -> Any:
    return hf.LlavaNextProcessor(
        image_processor=hf.LlavaNextImageProcessorPil(
            size={"shortest_edge": 24}, crop_size={"height": 24, "width": 24}, image_grid_pinpoints=_PINPOINTS
        ),
        tokenizer=tokenizer,
        patch_size=4,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=tokenizer.chat_template,
    )


_ONEVISION_PINPOINTS = [[24 * rows, 24 * columns] for rows in (1, 2, 3) for columns in (1, 2, 3)]


def _llava_onevision_config(tokenizer: Any) -> Any:
    return hf.LlavaOnevisionConfig(
        vision_config=hf.SiglipVisionConfig(vision_use_head=False, **VISION),
        text_config=hf.Qwen2Config(**TEXT),
        image_token_index=_id(tokenizer, "<image>"),
        video_token_index=_id(tokenizer, "<video>"),
        image_grid_pinpoints=_ONEVISION_PINPOINTS,
        vision_aspect_ratio="anyres_max_3",  # of 2 x 2 tiles a map is left as it is, of 3 x 3 it is scaled down
        tie_word_embeddings=False,
    )


def _llava_onevision_processor(tokenizer: Any) -> Any:
    return processor_class("llava_onevision")(
        image_processor=hf.LlavaOnevisionImageProcessorPil(
            size={"height": 24, "width": 24}, image_grid_pinpoints=_ONEVISION_PINPOINTS
        ),
        tokenizer=tokenizer,
        video_processor=None,
        num_image_tokens=36,
        vision_feature_select_strategy="full",
        vision_aspect_ratio="anyres_max_3",
        chat_template=tokenizer.chat_template,
    )


def _mistral3_config(tokenizer: Any) -> Any:
    return hf.Mistral3Config(
        vision_config=hf.PixtralVisionConfig(**{**VISION, "image_size": 128}, head_dim=8),
        text_config=hf.MistralConfig(**TEXT, head_dim=8, sliding_window=None),
        image_token_id=_id(tokenizer, "[IMG]"),
        spatial_merge_size=2,
        projector_hidden_act="gelu",
        vision_feature_layer=-1,
        tie_word_embeddings=False,
    )


def _mistral3_processor(tokenizer: Any) -> Any:
    return hf.PixtralProcessor(
        image_processor=hf.PixtralImageProcessorPil(size={"longest_edge": 48}, patch_size={"height": 8, "width": 8}),
        tokenizer=tokenizer,
        patch_size=4,
        spatial_merge_size=2,
        chat_template=tokenizer.chat_template,
    )


_MEL = {"num_mel_bins": 80, "max_source_positions": 1500}


def _qwen2_audio_config(tokenizer: Any) -> Any:
    return hf.Qwen2AudioConfig(
        audio_config={
            **{"model_type": "qwen2_audio_encoder", "d_model": 16, "encoder_layers": 1},
            **{"encoder_attention_heads": 2, "encoder_ffn_dim": 24},
            **_MEL,
        },
        text_config=hf.Qwen2Config(**TEXT),
        audio_token_id=_id(tokenizer, "<|AUDIO|>"),
        tie_word_embeddings=False,
    )


def _qwen2_audio_processor(tokenizer: Any) -> Any:
    return hf.Qwen2AudioProcessor(
        feature_extractor=hf.WhisperFeatureExtractor(feature_size=80),
        tokenizer=tokenizer,
        chat_template=tokenizer.chat_template,
    )


def _granite_speech_config(tokenizer: Any) -> Any:
    return hf.GraniteSpeechConfig(
        text_config=hf.GraniteConfig(**TEXT, logits_scaling=4.0),
        encoder_config={
            **{"input_dim": 160, "num_layers": 2, "hidden_dim": 16, "num_heads": 2, "dim_head": 8, "output_dim": 6},
            **{"context_size": 20, "max_pos_emb": 32, "conv_kernel_size": 3},
        },
        projector_config={
            **{"model_type": "blip_2_qformer", "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2},
            **{"intermediate_size": 24, "encoder_hidden_size": 16, "vocab_size": 10, "max_position_embeddings": 16},
        },
        audio_token_index=_id(tokenizer, "<|audio|>"),
        downsample_rate=5,
        window_size=15,
        has_lora_adapter=False,
        tie_word_embeddings=False,
    )


def _granite_speech_processor(tokenizer: Any) -> Any:
    return hf.GraniteSpeechProcessor(
        audio_processor=hf.GraniteSpeechFeatureExtractor(),
        tokenizer=tokenizer,
        chat_template=tokenizer.chat_template,
    )


def _glmasr_config(tokenizer: Any) -> Any:
    return hf.GlmAsrConfig(
        audio_config={
            **{"hidden_size": 16, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2},
            **{"num_key_value_heads": 2, "num_mel_bins": 80, "max_position_embeddings": 1500, "head_dim": 8},
        },
        text_config=hf.LlamaConfig(**TEXT),
        audio_token_id=_id(tokenizer, "<|pad|>"),
        tie_word_embeddings=False,
    )


def _glmasr_processor(tokenizer: Any) -> Any:
    return hf.GlmAsrProcessor(
        feature_extractor=hf.WhisperFeatureExtractor(feature_size=80),
        tokenizer=tokenizer,
        chat_template=tokenizer.chat_template,
    )


def _voxtral_config(_tokenizer: Any) -> Any:
    # Four frames are as wide as the encoder's inner layer, and are projected to one soft token.
    sizes = {"hidden_size": 16, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    ids = {"pad_token_id": 11, "bos_token_id": 1, "eos_token_id": 2}
    return hf.VoxtralConfig(
        audio_config={"model_type": "voxtral_encoder", **sizes, **_MEL},
        text_config=hf.LlamaConfig(**{**TEXT, **ids}, head_dim=8),
        audio_token_id=tiny_tekken.AUDIO_ID,
        tie_word_embeddings=False,
    )


def _voxtral_processor(_tokenizer: Any) -> Any:
    return tiny_tekken.TekkenProcessor()


def _typed(token: str, medium: str = "image") -> str:
    return TYPED.replace("MEDIUM", medium).replace("TOKEN", token)


STRINGS = (
    "{% for message in messages %}{{ message.role | upper }}: {{ message.content }}"
    "{% if message.role == 'assistant' %}</s>{% endif %}{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT: {% endif %}"
)
"""A template of texts, in which a medium's token stands already, as Granite Speech's."""
_COHERE_TAGS = ("<|IMG_PATCH|>", "<|START_OF_IMG|>", "<|END_OF_IMG|>", "TILE_GLOBAL", "TILE", "<|BREAK|>")

HOSTS: dict[str, TinyHost] = {
    "llava": TinyHost(("<image>",), IMAGES_FIRST, _llava_config, _llava_processor),
    "internvl": TinyHost(
        ("<img>", "</img>", "<IMG_CONTEXT>", "<video>"),
        _typed("<IMG_CONTEXT>\n"),
        _internvl_config,
        _internvl_processor,
        names=(
            ("start_image_token", "<img>"),
            ("end_image_token", "</img>"),
            ("context_image_token", "<IMG_CONTEXT>"),
            ("video_token", "<video>"),
        ),
    ),
    "idefics3": TinyHost(_IDEFICS_TAGS, _typed("<image>"), _idefics3_config, _idefics3_processor),
    "smolvlm": TinyHost(_IDEFICS_TAGS, _typed("<image>"), _smolvlm_config, _smolvlm_processor),
    "aya_vision": TinyHost(_COHERE_TAGS, _typed("<image>"), _aya_vision_config, _aya_vision_processor),
    "cohere2_vision": TinyHost(
        _COHERE_TAGS,
        _typed("<|IMG_PATCH|>"),
        _cohere2_vision_config,
        _cohere2_vision_processor,
        names=(
            ("boi_token", "<|START_OF_IMG|>"),
            ("eoi_token", "<|END_OF_IMG|>"),
            ("image_token", "<|IMG_PATCH|>"),
            ("img_line_break_token", "<|BREAK|>"),
        ),
    ),
    **{
        family: TinyHost(
            ("<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>"),
            _typed("<|vision_start|><|image_pad|><|vision_end|>"),
            config,
            _merged_processor(family),
        )
        for family, config in (
            ("qwen2_vl", _qwen2_vl_config),
            ("qwen2_5_vl", _qwen2_5_vl_config),
            ("qwen3_vl", _qwen3_vl_config),
            ("qwen3_5", _qwen3_5_config),
            ("qwen3_vl_moe", _qwen3_vl_moe_config),
            ("qwen3_5_moe", _qwen3_5_moe_config),
        )
    },
    **{
        family: TinyHost(
            (
                *("<|image|>", "<|video|>", "<|begin_of_image|>", "<|end_of_image|>"),
                *("<|begin_of_video|>", "<|end_of_video|>"),
            ),
            _typed("<|begin_of_image|><|image|><|end_of_image|>"),
            config,
            _merged_processor(family),
        )
        for family, config in (("glm4v", _glm4v_config), ("glm4v_moe", _glm4v_moe_config))
    },
    "gemma3": TinyHost(
        ("<start_of_image>", "<end_of_image>", "<image_soft_token>"),
        _typed("<start_of_image>"),
        _gemma3_config,
        _gemma3_processor,
        names=(
            ("boi_token", "<start_of_image>"),
            ("eoi_token", "<end_of_image>"),
            ("image_token", "<image_soft_token>"),
        ),
    ),
    "paligemma": TinyHost(("<image>",), "", _paligemma_config, _paligemma_processor),
    "gemma4": TinyHost(
        ("<image>", "<boi>", "<eoi>", "<audio>", "<boa>", "<eoa>", "<|video|>"),
        _typed("<image>"),
        _gemma4_config,
        _gemma4_processor,
        names=tuple((f"{name}_token", f"<{name}>") for name in ("boi", "eoi", "boa", "eoa", "image", "audio")),
    ),
    "llava_next": TinyHost(("<image>",), IMAGES_FIRST, _llava_next_config, _llava_next_processor),
    "llava_onevision": TinyHost(
        ("<image>", "<video>"), IMAGES_FIRST, _llava_onevision_config, _llava_onevision_processor
    ),
    "mistral3": TinyHost(("[IMG]", "[IMG_BREAK]", "[IMG_END]"), _typed("[IMG]"), _mistral3_config, _mistral3_processor),
    "qwen2_audio": TinyHost(
        ("<|AUDIO|>", "<|audio_bos|>", "<|audio_eos|>"),
        _typed("<|audio_bos|><|AUDIO|><|audio_eos|>\n", "audio"),
        _qwen2_audio_config,
        _qwen2_audio_processor,
        medium="audio",
    ),
    "granite_speech": TinyHost(
        ("<|audio|>",), STRINGS, _granite_speech_config, _granite_speech_processor, medium="audio"
    ),
    "glmasr": TinyHost(("<|pad|>",), _typed("<|pad|>", "audio"), _glmasr_config, _glmasr_processor, medium="audio"),
    "voxtral": TinyHost((), "", _voxtral_config, _voxtral_processor, medium="audio"),
}
SIGLIP_LLAVA = TinyHost(("<image>",), IMAGES_FIRST, _siglip_llava_config, _siglip_llava_processor)
"""Another member of a family, whose encoder has no class token."""
PALIGEMMA_1 = TinyHost(("<image>",), "", _paligemma_1_config, _paligemma_processor)
"""Another member of a family, whose LLM is a Gemma and no Gemma 2."""
MIXTURES = ("qwen3_vl_moe", "qwen3_5_moe", "glm4v_moe")
"""Families whose LLM is a mixture of experts, and which are like the ones without."""
KEEP_SHAPE = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_5", "glm4v", "gemma4", "mistral3", *MIXTURES)
"""Families whose images keep their shape."""
NEEDS = {
    "smolvlm": "num2words",
    "mistral3": "torchvision",
    "cohere2_vision": "torchvision",
    "granite_speech": "torchaudio",
    "voxtral": "mistral_common",
}
"""Packages that the processors of some families want, and that the usual environment does without."""


def require(family: str) -> None:
    """Skip a test of a family whose packages are not here; fail where `make test-hosts` has installed them."""
    if family in NEEDS and not os.environ.get("REQUIRE_HOSTS"):
        pytest.importorskip(NEEDS[family], exc_type=ImportError)


def processor_class(family: str) -> Any:
    """The processor class of a family as hosts are read: without what reads other media, such as videos."""
    from mllm.hosts.families import HOSTS as FAMILIES
    from mllm.hosts.processor import with_read_parts

    return with_read_parts(getattr(hf, FAMILIES[family].processor_class), FAMILIES[family].medium)


def model_class(family: str) -> Any:
    """The model class of a family, with its head."""
    from mllm.hosts.families import HOSTS as FAMILIES

    return getattr(hf, FAMILIES[family].model_class)


def make(family: str, *, seed: int = 0) -> tuple[Any, Any]:
    """A host with random weights that say something, in eval mode, and its processor."""
    return make_host(HOSTS[family], model_class(family), seed=seed)


def make_host(host: TinyHost, model_class: Any, *, seed: int = 0) -> tuple[Any, Any]:
    """The same of a host that need not be in `HOSTS`."""
    tokenizer = tokenizer_of(host)
    config = host.config(tokenizer)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = model_class(config).eval()
        for parameter in model.parameters():
            if parameter.dim() > 1 or not parameter.any():
                torch.nn.init.normal_(parameter, std=0.2)
    model.tie_weights()
    return model, host.processor(tokenizer)


def write(family: str, folder: Path) -> str:
    """Save a host as a hub would hold it."""
    model, processor = make(family)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return str(folder)


def load(folder: str, family: str, dtype: torch.dtype) -> Any:
    """Read the host itself, by transformers alone."""
    return model_class(family).from_pretrained(folder, dtype=dtype).eval()


def adopted(folder: str, family: str, *, dtype: str = "float32", trained: bool = True) -> tuple[Any, Any]:
    """A model on a host, with an adapter that does something unless it is untrained, and its processor."""
    from mllm.checkpoints.adoption import examine
    from mllm.checkpoints.build import build
    from mllm.config.model import ModelConfig
    from mllm.config.reading import read

    findings = examine(folder)
    values = {
        "host": folder,
        "dtype": dtype,
        HOSTS[family].medium: {"budgets": list(findings.budgets)},
        "adapter": {"kind": "gated_lora", "rank": 4, "alpha": 8},
    }
    model, processor = build(read(ModelConfig, values, path="model"))
    generator = torch.Generator().manual_seed(3)
    for name, parameter in model.named_parameters():
        if ".lora_B" in name and trained:
            parameter.data.normal_(std=0.3, generator=generator)
    return model, processor


def image(height: int = 30, width: int = 40, *, seed: int = 0) -> Image.Image:
    """A random image."""
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))


def medium(family: str, *, seed: int = 0) -> Any:
    """A random image, or a second of noise at 16 kHz."""
    if HOSTS[family].medium == "image":
        return image(seed=seed)
    return np.random.default_rng(seed).normal(0, 0.1, 16_000).astype(np.float32)


def inputs(processor: Any, raws: Any, budget: str = "", *, text: str = "what is this?") -> Any:
    """Model inputs of the same question about each medium."""
    is_image = processor.host.medium == "image"
    media = {"images": [[raw] for raw in raws]} if is_image else {"audio": [[(raw, 16_000)] for raw in raws]}
    return processor(text=[text] * len(raws), budget=budget, **media)


@contextmanager
def without_adapter(model: Any) -> Iterator[None]:
    """A model whose adapter does nothing."""
    loras = [value for name, value in model.named_parameters() if ".lora_B" in name]
    kept = [one.data.clone() for one in loras]
    for one in loras:
        one.data.zero_()
    yield
    for one, before in zip(loras, kept, strict=True):
        one.data.copy_(before)


def cached_and_whole(model: Any, inputs: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of three new tokens, made one by one and in one pass."""
    made = model.generate(
        **inputs, max_new_tokens=3, do_sample=False, eos_token_id=None, output_logits=True, return_dict_in_generate=True
    )
    new = made.sequences[:, inputs["input_ids"].shape[1] :]
    ids = torch.cat([inputs["input_ids"], new[:, :2]], dim=1)
    with torch.no_grad():
        whole = model(**{**inputs, "input_ids": ids, "attention_mask": torch.ones_like(ids)}).logits[0, -3:]
    return torch.cat(made.logits), whole
