"""Uses AV-HuBERT as an audio encoder: filterbank frames in, 25 features per second out.

The video half of its input is zeros.

Knows filterbank frames and the true length of each clip in samples. `av_hubert.py` holds the network,
`transforms/filterbank.py` makes the frames.

Shapes: N clips, T stacked filterbank frames of the longest clip, D feature size.
Source: the encoder `avhubert-audio` of Llama-AVSR (arXiv 2409.12319).
"""

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from mllm.config.medium import AudioEncoderConfig
from mllm.encoders.av_hubert import AVHubertEncoder
from mllm.encoders.base import Encoder, EncoderFacts
from mllm.transforms.filterbank import HOP_SAMPLES, NUM_STACKED, WINDOW_SAMPLES, num_stacked_frames


class AVHubertAudioEncoder(Encoder):
    """Runs AV-HuBERT on audio alone.

    The backbone loses its video path: it could never train, and would keep processes that train together waiting.
    """

    def __init__(self, *, backbone: AVHubertEncoder) -> None:
        super().__init__(backbone)
        backbone.feature_extractor_video = None
        self.hidden_size: int = backbone.config.hidden_size
        self.frames_per_second = float(backbone.config.frames_per_second)

    def lengths(self, raw: Tensor) -> Tensor:
        """Counts feature frames (N,) of samples (N,), as `num_stacked_frames` does."""
        frames = 1 + (-((WINDOW_SAMPLES - raw) // HOP_SAMPLES)).clamp(min=0)
        return -(-frames // NUM_STACKED)

    def forward(self, values: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Encodes clips.

        Args:
            values: (N, T, 104) stacked filterbank frames; what follows a clip's end does not matter.
            lengths: (N,) true samples of each clip at 16 kHz.

        Returns:
            features (N, T, D) and the true frames (N,).
        """
        num_frames = self.lengths(lengths)
        return self.backbone(audio=values, lengths=num_frames), num_frames

    def smallest_input(self) -> tuple[Tensor, Tensor]:
        """Makes one frame of a clip of one sample."""
        return torch.zeros(1, 1, self.backbone.config.audio_feature_size), torch.tensor([1])


def av_hubert_audio_facts(config: PreTrainedConfig, block: AudioEncoderConfig) -> EncoderFacts:
    """Returns the facts of AV-HuBERT as an audio encoder."""
    return EncoderFacts(
        "audio", config.hidden_size, frames_per_second=float(config.frames_per_second), num_frames=num_stacked_frames
    )


def wrap_av_hubert_audio(backbone: PreTrainedModel, block: AudioEncoderConfig) -> AVHubertAudioEncoder:
    """Wraps AV-HuBERT as an audio encoder of this project; no key of a config shapes it."""
    return AVHubertAudioEncoder(backbone=backbone)  # pyright: ignore[reportArgumentType]
