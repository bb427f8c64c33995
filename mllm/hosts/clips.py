"""Computes the soft tokens of audio clips at the full budget, by the host's own method or by the steps of its forward.

Knows mel features as the hosts' feature extractors make them. Does not know waveforms.

Shapes: N clips, C windows of the longest clip, M mel bins, F mel frames of a window, T soft tokens of the longest clip,
H the LLM's hidden size. Windows that a clip does not have are computed too, and lie beyond its count.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers.masking_utils import create_bidirectional_mask

GLM_MERGED_FRAMES = 4
"""Encoder frames that GLM-ASR's projector joins to one soft token."""
VOXTRAL_WINDOW_SECONDS = 30
VOXTRAL_TOKENS_PER_SECOND = 12.5


def qwen2_audio_inputs(outputs: Mapping[str, Tensor]) -> tuple[Tensor, int]:
    """Return the mel window (M, F) of one clip and how many of its frames are the clip."""
    return outputs["input_features"][0], int(outputs["feature_attention_mask"].sum())


def qwen2_audio_features(body: Any, values: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    """Encode windows (N, M, F); the steps of `Qwen2AudioModel.forward`, which has no method for them."""
    encoder_lengths, counts = body.audio_tower._get_feat_extract_output_lengths(lengths)
    frames = (values.shape[-1] - 2) // 2 + 1
    seen = (torch.arange(frames, device=values.device) < encoder_lengths[:, None]).long()
    mask = create_bidirectional_mask(
        config=body.audio_tower.config,
        inputs_embeds=values.new_zeros(len(values), frames, 1),
        attention_mask=seen,
    )
    hidden = body.audio_tower(values, attention_mask=mask).last_hidden_state
    return body.multi_modal_projector(hidden), counts


def voxtral_outputs(processor: Any, samples: np.ndarray) -> Mapping[str, Tensor]:
    """Return the mel windows (C, M, F) of one clip, and how prompts show it.

    Voxtral's processor takes audio through mistral-common alone. What that makes of samples (L,) is silence behind them
    up to whole windows and, in a prompt, a token that begins audio before one placeholder per soft token.
    """
    extractor, tokenizer = processor.feature_extractor, processor.tokenizer
    num_samples = VOXTRAL_WINDOW_SECONDS * extractor.sampling_rate
    mel = extractor(
        samples,
        sampling_rate=extractor.sampling_rate,
        truncation=False,
        padding=True,
        pad_to_multiple_of=num_samples,
        return_tensors="pt",
    )["input_features"][0]
    windows = mel.unflatten(1, (-1, num_samples // extractor.hop_length)).transpose(0, 1)
    begin, audio = tokenizer.convert_tokens_to_ids(["[BEGIN_AUDIO]", processor.audio_token])
    num_tokens = round(len(windows) * VOXTRAL_WINDOW_SECONDS * VOXTRAL_TOKENS_PER_SECOND)
    return {"input_features": windows, "input_ids": torch.tensor([[begin, *[audio] * num_tokens]])}


def voxtral_inputs(outputs: Mapping[str, Tensor]) -> tuple[Tensor, int]:
    """Return the mel windows (C, M, F) of one clip, and all their frames, the silence behind it included."""
    windows = outputs["input_features"]
    return windows, windows.shape[0] * windows.shape[-1]


def voxtral_features(body: Any, values: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    """Encode windows (N, C, M, F); every window is whole."""
    soft = body.get_audio_features(values.flatten(0, 1), return_dict=True).pooler_output
    num_windows = torch.div(lengths, values.shape[-1], rounding_mode="floor")
    return soft.view(len(values), -1, soft.shape[-1]), num_windows * (soft.shape[0] // values.shape[:2].numel())


def voxtral_window(config: Any) -> tuple[Tensor, Tensor]:
    """Make one silent window."""
    audio = config.audio_config
    frames = 2 * audio.max_source_positions
    return torch.zeros(1, 1, audio.num_mel_bins, frames), torch.tensor([frames])


def mel_window(config: Any) -> tuple[Tensor, Tensor]:
    """Make a silent window (1, M, F) of an encoder like Whisper's, and the length of the shortest clip that counts."""
    audio = config.audio_config
    return torch.zeros(1, audio.num_mel_bins, 2 * audio.max_source_positions), torch.tensor([8])


def granite_inputs(outputs: Mapping[str, Tensor]) -> tuple[Tensor, int]:
    """Return the stacked mel frames (F, 2M) of one clip, and how many they are."""
    values = outputs["input_features"][0]
    return values, len(values)


def granite_features(body: Any, values: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    """Encode stacked mel frames (N, F, 2M).

    As in the host itself, the last block of a clip sees the padding behind it, so what a clip gives depends a little on
    the longest of its batch.
    """
    config = body.config
    soft = body.get_audio_features(values, return_dict=True).pooler_output
    windows = torch.div(lengths + config.window_size - 1, config.window_size, rounding_mode="floor")
    return soft, windows * (config.window_size // config.downsample_rate)


def granite_window(config: Any) -> tuple[Tensor, Tensor]:
    """Make the silent frames of one window of the projector."""
    frames = config.window_size
    return torch.zeros(1, frames, config.encoder_config.input_dim), torch.tensor([frames])


def glmasr_inputs(outputs: Mapping[str, Tensor]) -> tuple[Tensor, int]:
    """Return the mel windows (C, M, F) of one clip, and how many of all their frames are the clip."""
    return outputs["input_features"], int(outputs["input_features_mask"].sum())


def glmasr_features(body: Any, values: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    """Encode windows (N, C, M, F); all windows of a clip but its last are full, so its tokens lie together."""
    windows = values.flatten(0, 1)
    full = torch.ones(windows.shape[0], windows.shape[-1], dtype=torch.long, device=values.device)
    soft = body.get_audio_features(windows, full, return_dict=True).pooler_output
    counts = torch.div((lengths - 1) // 2 + 1, GLM_MERGED_FRAMES, rounding_mode="floor")
    return soft.view(len(values), -1, soft.shape[-1]), counts


def glmasr_window(config: Any) -> tuple[Tensor, Tensor]:
    """Make one silent window."""
    audio = config.audio_config
    return torch.zeros(1, 1, audio.num_mel_bins, 2 * audio.max_position_embeddings), torch.tensor([16])


def window_positions(config: Any, num_tokens: int) -> int:
    """Count the encoder frames of the one window there is, whatever the clip."""
    return int(config.audio_config.max_source_positions)


def granite_positions(config: Any, num_tokens: int) -> int:
    """Count the stacked mel frames of a clip."""
    return num_tokens * int(config.downsample_rate)


def voxtral_positions(config: Any, num_tokens: int) -> int:
    """Count the encoder frames of all windows of a clip; the projector joins as many as make its width."""
    audio = config.audio_config
    return num_tokens * audio.intermediate_size // audio.hidden_size


def glmasr_positions(config: Any, num_tokens: int) -> int:
    """Count the encoder frames of all windows of a clip, each computed whole."""
    frames = int(config.audio_config.max_position_embeddings)
    return -(-num_tokens * GLM_MERGED_FRAMES // frames) * frames
