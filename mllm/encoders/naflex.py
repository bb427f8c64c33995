"""Encodes images in their native aspect ratio by SigLIP 2 (NaFlex), one feature per patch.

Knows the backbone's packed patches and its mask. Does not know how an image was brought to its number of patches, what
compresses the patches, or the LLM.

Shapes: N images, P patches of the one that has most, D feature size, rows x columns the grid of one image, whose
patches stand in reading order.
Source: SigLIP 2 (arXiv 2502.14786), as in transformers' `siglip2_vision_model`.
"""

import math

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from mllm.config.medium import ImageEncoderConfig
from mllm.encoders.base import Encoder, EncoderFacts
from mllm.encoders.vision import cut


class NaFlexEncoder(Encoder):
    """Reads the patch features of one hidden layer of a backbone whose images keep their shape.

    `grid` is that of a square image; the true one comes with each image. Position embeddings are resized image by
    image by the backbone, which reads their shapes on the host.

    Args:
        backbone: a `Siglip2VisionModel`; it is changed in place.
        feature_layer, final_norm: as for `VisionEncoder`.
        max_num_patches: most patches of an image; None means as many as the backbone was trained on.

    Raises:
        ValueError: a layer that the backbone does not have, or no patches.
    """

    def __init__(
        self,
        *,
        backbone: PreTrainedModel,
        feature_layer: int = -2,
        final_norm: bool = False,
        max_num_patches: int | None = None,
    ) -> None:
        super().__init__(backbone)
        self.hidden_size: int = backbone.config.hidden_size
        self.max_patches = _max_patches(backbone.config, max_num_patches)
        self.grid = square_grid(self.max_patches)
        self._patch_values = backbone.config.num_channels * backbone.config.patch_size**2
        cut(backbone, feature_layer, final_norm)

    def lengths(self, raw: Tensor) -> Tensor:
        """Counts the patches of each image (N,) by its grid (N, 2)."""
        return raw.prod(dim=1)

    def forward(self, pixel_values: Tensor, grids: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Encodes images, padded to the one with most patches.

        Args:
            pixel_values: (N, P, values of a patch) normalised pixels, patches in reading order.
            grids: (N, 2) rows and columns of each image.

        Returns:
            (N, P, D) features, undefined beyond an image's patches, and the number of its patches (N,).

        Raises:
            ValueError: images without their grids.
        """
        if grids is None:
            raise ValueError("pixel_values came without image_grids, the rows and columns of each image")
        lengths = self.lengths(grids)
        mask = torch.arange(pixel_values.shape[1], device=lengths.device) < lengths[:, None]
        output = self.backbone(pixel_values, pixel_attention_mask=mask.to(torch.int32), spatial_shapes=grids)
        return output.last_hidden_state, lengths

    def smallest_input(self) -> tuple[Tensor, Tensor]:
        """Makes one blank image of one patch."""
        return torch.zeros(1, 1, self._patch_values), torch.ones(1, 2, dtype=torch.int64)


def naflex_facts(config: PreTrainedConfig, block: ImageEncoderConfig) -> EncoderFacts:
    """Returns the facts of a NaFlex encoder whose images have at most as many patches as the block says."""
    max_patches = num_patches_of(config, block)
    return EncoderFacts("image", config.hidden_size, grid=square_grid(max_patches), max_patches=max_patches)


def wrap_naflex(backbone: PreTrainedModel, block: ImageEncoderConfig) -> NaFlexEncoder:
    """Wraps a NaFlex backbone as an encoder, shaped by a config."""
    return NaFlexEncoder(
        backbone=backbone,
        feature_layer=block.feature_layer,
        final_norm=block.final_norm,
        max_num_patches=num_patches_of(backbone.config, block),
    )


def num_patches_of(config: PreTrainedConfig, block: ImageEncoderConfig) -> int:
    """Return the most patches of an image: those that a config asks for, or that the encoder was trained on."""
    return config.num_patches if block.max_num_patches == "auto" else block.max_num_patches


def square_grid(max_patches: int) -> tuple[int, int]:
    """Returns rows and columns of a square image of at most so many patches."""
    side = math.isqrt(max_patches)
    return side, side


def _max_patches(config: PreTrainedConfig, max_num_patches: int | None) -> int:
    max_patches = config.num_patches if max_num_patches is None else max_num_patches
    if max_patches < 1:
        raise ValueError(f"max_num_patches is {max_patches}; it must be at least 1")
    return max_patches
