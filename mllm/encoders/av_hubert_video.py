"""Uses AV-HuBERT as a video encoder: lip crops in, one feature per video frame out.

Knows clips and their true lengths. Does not know how crops are made; `av_hubert.py` holds the network.

Shapes: N clips, T frames of the longest clip, H x W pixels of a crop, D feature size.
"""

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from mllm.config.medium import LipsConfig
from mllm.encoders.av_hubert import AVHubertEncoder
from mllm.encoders.base import Encoder, EncoderFacts


class AVHubertVideoEncoder(Encoder):
    """Runs AV-HuBERT on video alone; the audio half of its input is zeros, as in the published lip-reading systems.

    The backbone loses its audio path: it could never train, and would keep processes that train together waiting.
    """

    def __init__(self, *, backbone: AVHubertEncoder) -> None:
        super().__init__(backbone)
        backbone.feature_extractor_audio = None
        self.hidden_size: int = backbone.config.hidden_size
        self.frames_per_second = float(backbone.config.frames_per_second)

    def lengths(self, raw: Tensor) -> Tensor:
        """Counts feature frames (N,) of video frames (N,): as many."""
        return raw

    def forward(self, values: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Encodes clips.

        Args:
            values: (N, T, 1, H, W) normalised gray lip crops; what follows a clip's end does not matter.
            lengths: (N,) true frames of each clip.

        Returns:
            features (N, T, D) and the true frames (N,).
        """
        return self.backbone(video=values, lengths=lengths), lengths

    def smallest_input(self) -> tuple[Tensor, Tensor]:
        """Makes two blank frames: the batch norms of an encoder that trains need more than one value."""
        return torch.zeros(1, 2, 1, 32, 32), torch.tensor([2])


def av_hubert_video_facts(config: PreTrainedConfig, block: LipsConfig) -> EncoderFacts:
    """Returns the facts of AV-HuBERT as a video encoder."""

    def num_frames(num_video_frames: int) -> int:
        if num_video_frames < 1:
            raise ValueError(f"a video of {num_video_frames} frames is too short: at least 1 frame is needed")
        return num_video_frames

    return EncoderFacts(
        "video", config.hidden_size, frames_per_second=float(config.frames_per_second), num_frames=num_frames
    )


def av_hubert_class(config: PreTrainedConfig) -> type[PreTrainedModel]:
    """Returns the class of AV-HuBERT."""
    return AVHubertEncoder


def wrap_av_hubert_video(backbone: PreTrainedModel, block: LipsConfig) -> AVHubertVideoEncoder:
    """Wraps AV-HuBERT as a video encoder of this project; no key of a config shapes it."""
    return AVHubertVideoEncoder(backbone=backbone)  # pyright: ignore[reportArgumentType]
