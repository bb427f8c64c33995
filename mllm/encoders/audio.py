"""Encodes audio at 16 kHz into feature frames and their true number, by audio encoders of transformers.

Knows raw audio as the two families want it: a log-mel window of fixed length (Whisper), or the waveform (HuBERT, WavLM
and wav2vec 2.0). Does not know files, resampling, what compresses the frames, or the LLM.

Shapes: N clips, L samples of the longest clip, T feature frames of the longest clip (of the window, for Whisper), C
channels inside the waveform's convolutions, D feature size.
"""

import math

import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.masking_utils import create_bidirectional_mask
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from mllm.config.medium import AudioEncoderConfig
from mllm.encoders.base import Encoder, EncoderFacts

SAMPLE_RATE_HZ = 16_000
# One Whisper frame: mel frames are 160 samples apart, and its second convolution keeps every other one.
WHISPER_SAMPLES_PER_FRAME = 320
WHISPER_FRAMES_PER_SECOND = 50
RELEASED_LEAST_FRAMES = 25

WAVE_CLASSES = {"hubert": "HubertModel", "wav2vec2": "Wav2Vec2Model", "wavlm": "WavLMModel"}


class WhisperClipEncoder(Encoder):
    """Runs Whisper's encoder on clips at their own lengths, without the silence that would fill its window.

    A clip gives what the library's encoder gives with as many positions as the clip has frames: each convolution sees
    zeros behind its end, and attention sees nothing there. A published Whisper was trained on whole windows, and hears
    worse so until it has learned it.
    """

    def __init__(self, *, backbone: WhisperEncoder) -> None:
        super().__init__(backbone)
        backbone.layerdrop = 0.0  # see `WaveformEncoder`
        self.hidden_size: int = backbone.config.d_model
        self.frames_per_second = SAMPLE_RATE_HZ / WHISPER_SAMPLES_PER_FRAME

    def lengths(self, raw: Tensor) -> Tensor:
        """Counts feature frames (N,) of samples (N,)."""
        return raw // WHISPER_SAMPLES_PER_FRAME

    def forward(self, values: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Encodes clips.

        Args:
            values: (N, 2 * T, mel bins) log-mel of the longest clip; what follows a clip's end does not matter.
            lengths: (N,) true samples of each clip at 16 kHz.

        Returns:
            features (N, T, D) and the true frames (N,).
        """
        backbone, num_frames = self.backbone, self.lengths(lengths)
        is_mel = torch.arange(values.shape[1], device=values.device) < 2 * num_frames[:, None]
        mel = values.masked_fill(~is_mel[..., None], 0.0).transpose(1, 2)
        hidden = nn.functional.gelu(backbone.conv1(mel)).masked_fill(~is_mel[:, None], 0.0)
        hidden = nn.functional.gelu(backbone.conv2(hidden)).transpose(1, 2)
        hidden = hidden + backbone.embed_positions.weight[: hidden.shape[1]]
        hidden = nn.functional.dropout(hidden, p=backbone.dropout, training=backbone.training)
        is_frame = torch.arange(hidden.shape[1], device=values.device) < num_frames[:, None]
        mask = create_bidirectional_mask(backbone.config, inputs_embeds=hidden, attention_mask=is_frame)
        for layer in backbone.layers:
            hidden = layer(hidden, mask)
        return backbone.layer_norm(hidden), num_frames

    def smallest_input(self) -> tuple[Tensor, Tensor]:
        """Makes a clip of a single frame."""
        return torch.zeros(1, 2, self.backbone.config.num_mel_bins), torch.tensor([WHISPER_SAMPLES_PER_FRAME])


class WhisperWindowEncoder(Encoder):
    """Runs Whisper's encoder and counts its output to the true length of each clip.

    Whisper reads a whole window (30 s in the published models), silence included, whatever the clip. The first L // 320
    frames belong to a clip of L samples, the count of Llama-AVSR and its successors (50 frames per second, a partial
    frame dropped); unlike there it does not depend on the longest clip of the batch. Training drops no layer at random;
    see `WaveformEncoder`.

    Args:
        released_cut: count as their code does, see `released_frames`.
    """

    def __init__(self, *, backbone: WhisperEncoder, released_cut: bool = False) -> None:
        super().__init__(backbone)
        self.released_cut = released_cut
        backbone.layerdrop = 0.0
        self.hidden_size: int = backbone.config.d_model
        self.frames_per_second = SAMPLE_RATE_HZ / WHISPER_SAMPLES_PER_FRAME

    def lengths(self, raw: Tensor) -> Tensor:
        """Counts feature frames (N,) of samples (N,)."""
        if self.released_cut:
            seconds = raw.double() / SAMPLE_RATE_HZ  # in this order, so that the cut is theirs bit for bit
            return (seconds * WHISPER_FRAMES_PER_SECOND).long().clamp(min=RELEASED_LEAST_FRAMES)
        return raw // WHISPER_SAMPLES_PER_FRAME

    def forward(self, values: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Encodes whole windows.

        Args:
            values: (N, mel bins, 2 * T) log-mel, silence after the clip's end.
            lengths: (N,) true samples of each clip at 16 kHz.

        Returns:
            features (N, T, D) and the frames (N,) that belong to the clip.
        """
        return self.backbone(values).last_hidden_state, self.lengths(lengths)

    def smallest_input(self) -> tuple[Tensor, Tensor]:
        """Makes one window that holds a single frame."""
        config = self.backbone.config
        window = torch.zeros(1, config.num_mel_bins, 2 * config.max_source_positions)
        return window, torch.tensor([WHISPER_SAMPLES_PER_FRAME])


class WaveformEncoder(Encoder):
    """Runs HuBERT, WavLM or wav2vec 2.0 on waveforms of different lengths.

    A clip's features do not depend on its batch mates: what follows its end is silenced and masked, and the group norm
    of the base models, which averages over time, averages over the clip's frames alone.

    Two habits of these models in training are left out: masking frames at random, since augmentation belongs to the
    data, and dropping whole layers at random, which leaves a process without gradients that the others wait for.
    """

    def __init__(self, *, backbone: PreTrainedModel) -> None:
        super().__init__(backbone)
        config = backbone.config
        config.layerdrop = 0.0
        if hasattr(backbone, "masked_spec_embed"):  # only the random masking reads it
            del backbone.masked_spec_embed
        self.hidden_size: int = config.hidden_size
        self.frames_per_second = SAMPLE_RATE_HZ / math.prod(config.conv_stride)
        self._kernels = tuple(zip(config.conv_kernel, config.conv_stride, strict=True))

    def lengths(self, raw: Tensor) -> Tensor:
        """Counts feature frames (N,) of samples (N,): those whose whole window lies inside the clip."""
        for kernel, stride in self._kernels:
            raw = (raw - kernel) // stride + 1
        return raw

    def forward(self, values: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Encodes waveforms.

        Args:
            values: (N, L) samples at 16 kHz; what follows a clip's end does not matter.
            lengths: (N,) true samples of each clip.

        Returns:
            features (N, T, D) and the true frames (N,).
        """
        is_sample = torch.arange(values.shape[1], device=values.device) < lengths[:, None]
        hidden = self._convolve(values.masked_fill(~is_sample, 0.0), lengths).transpose(1, 2)
        num_frames = self.lengths(lengths)
        is_frame = torch.arange(hidden.shape[1], device=values.device) < num_frames[:, None]
        projected = self.backbone.feature_projection(hidden)
        if isinstance(projected, tuple):  # wav2vec 2.0 and WavLM also return what they would quantise
            projected = projected[0]
        return self.backbone.encoder(projected, attention_mask=is_frame).last_hidden_state, num_frames

    def _convolve(self, values: Tensor, lengths: Tensor) -> Tensor:
        """Convolves (N, L) -> (N, C, T) as the backbone does, but for padding under a group norm."""
        hidden = values[:, None]
        for (kernel, stride), layer in zip(self._kernels, self.backbone.feature_extractor.conv_layers, strict=True):
            lengths = (lengths - kernel) // stride + 1
            norm = getattr(layer, "layer_norm", None)
            if isinstance(norm, nn.GroupNorm):
                hidden = layer.activation(_norm_over_clip(layer.conv(hidden), lengths, norm))
            else:
                hidden = layer(hidden)
        return hidden

    def smallest_input(self) -> tuple[Tensor, Tensor]:
        """Makes silence of a single frame."""
        num_samples = _samples_of_one_frame(self._kernels)
        return torch.zeros(1, num_samples), torch.tensor([num_samples])


def _norm_over_clip(hidden: Tensor, lengths: Tensor, norm: nn.GroupNorm) -> Tensor:
    """Applies a group norm with one channel per group to (N, C, T), with the statistics of each clip's frames alone."""
    # In float32, as the norm of torch computes it; the mean over frames is taken by hand since padding must not count.
    is_frame = (torch.arange(hidden.shape[2], device=hidden.device) < lengths[:, None])[:, None]
    values = hidden.float()
    mean = (values * is_frame).sum(dim=2, keepdim=True) / lengths[:, None, None]
    variance = ((values - mean).square() * is_frame).sum(dim=2, keepdim=True) / lengths[:, None, None]
    normed = ((values - mean) * torch.rsqrt(variance + norm.eps)).to(hidden.dtype)
    return normed * norm.weight[:, None] + norm.bias[:, None]


def _samples_of_one_frame(kernels: tuple[tuple[int, int], ...]) -> int:
    num_samples = 1
    for kernel, stride in reversed(kernels):
        num_samples = (num_samples - 1) * stride + kernel
    return num_samples


def released_frames(num_samples: int) -> int:
    """Counts the frames that Llama-AVSR, Llama-MTSK and Omni-AVSR keep of a clip.

    Never below 25, silence where the clip is shorter; and where a product of floats falls short of a whole number, one
    frame less than the clip has (28 of 9280 samples, which are 29).
    """
    return max(int(num_samples / SAMPLE_RATE_HZ * WHISPER_FRAMES_PER_SECOND), RELEASED_LEAST_FRAMES)


def whisper_facts(config: PreTrainedConfig, block: AudioEncoderConfig) -> EncoderFacts:
    """Returns the facts of a Whisper encoder; `num_frames` refuses clips below one frame and beyond the window."""
    longest = config.max_source_positions

    def num_frames(num_samples: int) -> int:
        frames = num_samples // WHISPER_SAMPLES_PER_FRAME
        if block.released_cut:
            frames = released_frames(num_samples)
        if not 1 <= frames <= longest:
            raise ValueError(
                f"a clip of {num_samples} samples ({num_samples / SAMPLE_RATE_HZ:.2f} s) does not fit this encoder: "
                f"allowed are {WHISPER_SAMPLES_PER_FRAME} to {(longest + 1) * WHISPER_SAMPLES_PER_FRAME - 1} samples "
                f"at {SAMPLE_RATE_HZ} Hz"
            )
        return frames

    return EncoderFacts(
        "audio",
        config.d_model,
        frames_per_second=SAMPLE_RATE_HZ / WHISPER_SAMPLES_PER_FRAME,
        num_frames=num_frames,
    )


def wave_facts(config: PreTrainedConfig, block: AudioEncoderConfig) -> EncoderFacts:
    """Returns the facts of a waveform encoder; `num_frames` refuses clips below one frame.

    Raises:
        ValueError: a config with a length adapter behind the encoder, which this project does not read.
    """
    if getattr(config, "add_adapter", False):
        raise ValueError(f"{config.model_type} with add_adapter=true is not supported; compressors do that work here")
    kernels = tuple(zip(config.conv_kernel, config.conv_stride, strict=True))
    shortest = _samples_of_one_frame(kernels)

    def num_frames(num_samples: int) -> int:
        if num_samples < shortest:
            raise ValueError(f"a clip of {num_samples} samples is too short: this encoder needs at least {shortest}")
        frames = num_samples
        for kernel, stride in kernels:
            frames = (frames - kernel) // stride + 1
        return frames

    rate = SAMPLE_RATE_HZ / math.prod(config.conv_stride)
    return EncoderFacts("audio", config.hidden_size, frames_per_second=rate, num_frames=num_frames)


def whisper_class(config: PreTrainedConfig) -> type[PreTrainedModel]:
    """Returns the class of Whisper without its decoder."""
    return WhisperEncoder


def wave_class(config: PreTrainedConfig) -> type[PreTrainedModel]:
    """Returns the transformers class of a waveform config."""
    return getattr(transformers, WAVE_CLASSES[config.model_type])


def wrap_whisper(backbone: WhisperEncoder, block: AudioEncoderConfig) -> Encoder:
    """Wraps Whisper's encoder as an encoder of this project."""
    if block.padding == "none":
        return WhisperClipEncoder(backbone=backbone)
    return WhisperWindowEncoder(backbone=backbone, released_cut=block.released_cut)


def wrap_wave(backbone: PreTrainedModel, block: AudioEncoderConfig) -> WaveformEncoder:
    """Wraps a waveform encoder; no key of a config shapes it."""
    return WaveformEncoder(backbone=backbone)
