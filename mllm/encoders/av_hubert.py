"""Encodes lip crops and audio by AV-HuBERT, at 25 feature frames per second.

Knows gray lip crops, stacked filterbank frames and the true length of each clip.
Does not know how the crops were cut, what compresses its features, or which LLM reads them.

    video (N, T, 1, H, W) -> 3-D conv stem -> ResNet-18 on each frame -> Linear --+
    audio (N, T, 104)     -> Linear ----------------------------------------------+-> [audio; video] (N, T, 2D)
        -> LayerNorm -> Linear -> + positional conv -> pre-norm transformer -> LayerNorm -> features (N, T, D)

Shapes: N clips, T frames of the longest clip, H x W pixels of a crop, D feature size.
Source: Shi et al., AV-HuBERT (arXiv 2201.02184). The trunk is HuBERT's, taken from transformers; the names follow the
published checkpoints, so that those load by renames alone (`pos_conv.0` -> `pos_conv_embed.conv`, `self_attn` ->
`attention`, `self_attn_layer_norm` -> `layer_norm`, `fc1`/`fc2` -> `feed_forward.intermediate_dense`/`output_dense`).
"""

import math

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.models.hubert.modeling_hubert import (
    HubertEncoder,
    HubertEncoderStableLayerNorm,
    HubertPositionalConvEmbedding,
)


@strict
class AVHubertConfig(PreTrainedConfig):
    """Sizes of an AV-HuBERT encoder; the defaults are those of AV-HuBERT Large.

    Fields that `HubertConfig` has too mean the same here (`do_stable_layer_norm`: the norms stand before attention and
    feed-forward, as in all released models, or behind them); `num_conv_pos_embeddings` is the kernel of the positional
    convolution in frames. `resnet_channels` are the widths of the four ResNet stages; the stem has the width of the
    first. `audio_feature_size` is the size of one audio frame (26 filterbank bins of 4 stacked frames). Without
    `masks_front_end` the front end sees what stands beyond a clip's end, as the released code does; only the trunk is
    masked then.
    """

    model_type = "av_hubert"
    attribute_map = {"feat_extract_activation": "hidden_act"}  # noqa: RUF012 (transformers' own way to say ClassVar)

    hidden_size: int = 1024
    num_hidden_layers: int = 24
    num_attention_heads: int = 16
    intermediate_size: int = 4096
    hidden_act: str = "gelu"
    resnet_channels: list[int] | tuple[int, ...] = (64, 128, 256, 512)
    audio_feature_size: int = 104
    do_stable_layer_norm: bool = True
    masks_front_end: bool = True
    num_conv_pos_embeddings: int = 128
    num_conv_pos_embedding_groups: int = 16
    frames_per_second: float | int = 25
    feature_dropout: float | int = 0.0
    hidden_dropout: float | int = 0.1
    attention_dropout: float | int = 0.1
    activation_dropout: float | int = 0.1
    layerdrop: float | int = 0.0
    layer_norm_eps: float = 1e-5
    initializer_range: float = 0.02

    def validate_architecture(self) -> None:
        """Check the sizes; transformers calls this after the field types have been checked."""
        if len(self.resnet_channels) != 4:
            raise ValueError(f"resnet_channels needs four widths, one per stage, got {list(self.resnet_channels)}")
        for key in ("num_attention_heads", "num_conv_pos_embedding_groups"):
            if self.hidden_size % getattr(self, key):
                raise ValueError(f"{key}={getattr(self, key)} must divide hidden_size={self.hidden_size}")


@strict
class AVHubertAudioConfig(AVHubertConfig):
    """The same encoder, used for audio: what `backbone_config` makes of an AV-HuBERT that an `audio` block names."""

    model_type = "av_hubert_audio"


class ResidualBlock(nn.Module):
    """The basic ResNet block with one PReLU per convolution; a `stride` of 2 halves the image."""

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.relu1 = nn.PReLU(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.relu2 = nn.PReLU(channels)
        self.downsample = None
        if stride != 1 or in_channels != channels:
            shortcut = nn.Conv2d(in_channels, channels, 1, stride=stride, bias=False)
            self.downsample = nn.Sequential(shortcut, nn.BatchNorm2d(channels))

    def forward(self, images: Tensor) -> Tensor:
        """Convolves (N, C, H, W) -> (N, channels, H / stride, W / stride)."""
        shortcut = images if self.downsample is None else self.downsample(images)
        out = self.relu1(self.bn1(self.conv1(images)))
        return self.relu2(self.bn2(self.conv2(out)) + shortcut)


class ResNetTrunk(nn.Module):
    """ResNet-18 without its stem and classifier: four stages of two blocks, then the mean over the image."""

    def __init__(self, channels: tuple[int, ...]) -> None:
        super().__init__()
        widths = (channels[0], *channels)
        self.layer1, self.layer2, self.layer3, self.layer4 = (
            nn.Sequential(
                ResidualBlock(widths[stage], widths[stage + 1], stride=1 if stage == 0 else 2),
                ResidualBlock(widths[stage + 1], widths[stage + 1], stride=1),
            )
            for stage in range(4)
        )

    def forward(self, images: Tensor) -> Tensor:
        """Convolves and averages (N, channels[0], H, W) -> (N, channels[3])."""
        return self.layer4(self.layer3(self.layer2(self.layer1(images)))).mean(dim=(2, 3))


class VideoResNet(nn.Module):
    """Convolves over five frames, then runs ResNet-18 on each frame by itself."""

    def __init__(self, channels: tuple[int, ...]) -> None:
        super().__init__()
        self.frontend3D = nn.Sequential(
            nn.Conv3d(1, channels[0], (5, 7, 7), stride=(1, 2, 2), padding=(2, 3, 3), bias=False),
            nn.BatchNorm3d(channels[0]),
            nn.PReLU(channels[0]),
            nn.MaxPool3d((1, 3, 3), stride=(1, 2, 2), padding=(0, 1, 1)),
        )
        self.trunk = ResNetTrunk(channels)

    def forward(self, video: Tensor) -> Tensor:
        """Reads each frame: (N, T, 1, H, W) -> (N, T, channels[3])."""
        features = self.frontend3D(video.transpose(1, 2)).transpose(1, 2)  # (N, T, C, H / 4, W / 4)
        return self.trunk(features.flatten(0, 1)).unflatten(0, features.shape[:2])


class VideoFeatures(nn.Module):
    """Makes the video half of the trunk's input."""

    def __init__(self, channels: tuple[int, ...], hidden_size: int) -> None:
        super().__init__()
        self.resnet = VideoResNet(channels)
        self.proj = nn.Linear(channels[-1], hidden_size)

    def forward(self, video: Tensor) -> Tensor:
        """Reads each frame and projects it: (N, T, 1, H, W) -> (N, T, D)."""
        return self.proj(self.resnet(video))


class AudioFeatures(nn.Module):
    """Makes the audio half of the trunk's input of filterbank frames, four stacked to one feature frame."""

    def __init__(self, audio_feature_size: int, hidden_size: int) -> None:
        super().__init__()
        self.proj = nn.Linear(audio_feature_size, hidden_size)

    def forward(self, audio: Tensor) -> Tensor:
        """Projects each frame: (N, T, audio_feature_size) -> (N, T, D)."""
        return self.proj(audio)


class AVHubertEncoder(PreTrainedModel):
    """Encodes lip crops, filterbank frames or both; in `eval()` a clip's features do not depend on its batch mates.

    In `train()` the batch norms use the statistics of the batch, padded frames (which are zeros) included.
    """

    config: AVHubertConfig
    config_class = AVHubertConfig
    base_model_prefix = "av_hubert"
    main_input_name = "video"
    input_modalities = ["video", "audio"]  # noqa: RUF012
    supports_gradient_checkpointing = True
    _no_split_modules = [  # noqa: RUF012
        "HubertEncoderLayerStableLayerNorm",
        "HubertEncoderLayer",
        "ResidualBlock",
        "ParametrizedConv1d",
    ]
    _supports_sdpa = True
    _supports_flash_attn = True

    def __init__(self, config: AVHubertConfig) -> None:
        super().__init__(config)
        hidden_size = config.hidden_size
        self.feature_extractor_audio: nn.Module | None = AudioFeatures(config.audio_feature_size, hidden_size)
        self.feature_extractor_video: nn.Module | None = VideoFeatures(tuple(config.resnet_channels), hidden_size)
        self.layer_norm = nn.LayerNorm(2 * hidden_size, eps=config.layer_norm_eps)
        self.post_extract_proj = nn.Linear(2 * hidden_size, hidden_size)
        self.dropout_input = nn.Dropout(config.feature_dropout)
        trunk = HubertEncoderStableLayerNorm if config.do_stable_layer_norm else HubertEncoder
        self.encoder = trunk(config)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, nn.Conv2d | nn.Conv3d):
            init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(module, nn.PReLU):
            init.constant_(module.weight, 0.25)
        elif isinstance(module, HubertPositionalConvEmbedding):
            # `conv.weight` is computed from these two; writing to it, as the generic rule does, changes nothing.
            parameters = dict(module.conv.named_parameters())
            norm, direction = (parameters[f"parametrizations.weight.original{index}"] for index in (0, 1))
            kernel_frames, hidden_size = direction.shape[2], direction.shape[0]
            init.normal_(direction, std=math.sqrt(4 / (kernel_frames * hidden_size)))
            init.copy_(norm, direction.norm(dim=(0, 1), keepdim=True))

    def forward(
        self, video: Tensor | None = None, audio: Tensor | None = None, lengths: Tensor | None = None
    ) -> Tensor:
        """Encodes a batch of clips.

        Args:
            video: (N, T, 1, H, W) gray lip crops, normalised, or None.
            audio: (N, T, audio_feature_size) filterbank frames at the video's frame rate, or None.
            lengths: (N,) int64, true frames of each clip, at least 1; None when all T frames of every clip are true.
                What the input holds beyond them does not matter.

        Returns:
            features (N, T, D); they are undefined beyond a clip's length.

        Raises:
            ValueError: neither medium is given, they differ in their number of clips or frames, or audio is given to
                an encoder that has lost its audio path (see `AVHubertVideoEncoder`).
        """
        present = [medium for medium in (audio, video) if medium is not None]
        if not present:
            raise ValueError("AV-HuBERT needs video, audio or both, got neither")
        if present[0].shape[:2] != present[-1].shape[:2]:
            raise ValueError(
                "video and audio must hold the same clips and frames (N, T), "
                f"got {tuple(present[-1].shape[:2])} and {tuple(present[0].shape[:2])}"
            )
        is_frame = None
        if lengths is not None:
            is_frame = torch.arange(present[0].shape[1], device=present[0].device) < lengths[:, None]
        halves = self._halves(video, audio, is_frame if self.config.masks_front_end else None)
        hidden = self.dropout_input(self.post_extract_proj(self.layer_norm(torch.cat(halves, dim=-1))))
        return self.encoder(hidden, attention_mask=is_frame).last_hidden_state

    def _halves(self, video: Tensor | None, audio: Tensor | None, is_frame: Tensor | None) -> list[Tensor]:
        """Computes audio and video features (N, T, D); a medium that is absent contributes zeros."""
        features: list[Tensor | None] = []
        for medium, extractor in ((audio, self.feature_extractor_audio), (video, self.feature_extractor_video)):
            if medium is not None and is_frame is not None:
                # The convolution over frames sees past a clip's end: zeros there are what a lone clip is padded with.
                medium = medium.masked_fill(~is_frame.view(*is_frame.shape, *(1,) * (medium.ndim - 2)), 0.0)
            if medium is not None and extractor is None:
                kept = "video" if extractor is self.feature_extractor_audio else "audio"
                raise ValueError(f"this AV-HuBERT was cut to read {kept} alone; the other medium must be None")
            features.append(None if medium is None or extractor is None else extractor(medium))
        template = next(half for half in features if half is not None)
        return [torch.zeros_like(template) if half is None else half for half in features]


def register_av_hubert() -> None:
    """Makes `AutoConfig` and `AutoModel` know AV-HuBERT; calling it again changes nothing."""
    AutoConfig.register(AVHubertConfig.model_type, AVHubertConfig, exist_ok=True)
    AutoModel.register(AVHubertConfig, AVHubertEncoder, exist_ok=True)
    AutoConfig.register(AVHubertAudioConfig.model_type, AVHubertAudioConfig, exist_ok=True)
