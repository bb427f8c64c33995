"""Computes soft tokens of images that keep their shape, at the full budget, by the host's own method.

Knows configs of hosts, patches in the order of the host's processor, and grids of soft tokens. Does not know images.

Shapes: N images, P patches of the longest, D values of a patch, T soft tokens of the longest, H the LLM's hidden size,
L levels of the encoder that the decoder reads beside its output.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence


def merged_inputs(outputs: Mapping[str, Tensor], config: Any) -> tuple[Tensor, tuple[int, int]]:
    """Return the patches (P, D) of one image, and the rows and columns of what they are merged to."""
    side = int(config.vision_config.spatial_merge_size)
    _, rows, columns = outputs["image_grid_thw"][0].tolist()
    return outputs["pixel_values"], (rows // side, columns // side)


def merged_features(body: Any, values: Tensor, grids: Tensor) -> Tensor:
    """Encode patches (N, P, D) of images of several shapes in one pass, as Qwen-VL and GLM-4V do.

    Args:
        body: the host without its head.
        grids: (N, 2) rows and columns of soft tokens.

    Returns:
        (N, T, H), each image in reading order; (N, T, (1 + L) * H) where the decoder reads levels.
    """
    side = int(body.config.vision_config.spatial_merge_size)
    is_patch = torch.arange(values.shape[1], device=values.device) < side * side * grids.prod(dim=1, keepdim=True)
    shapes = torch.cat([torch.ones_like(grids[:, :1]), side * grids], dim=1)
    output = body.get_image_features(values[is_patch], shapes, return_dict=True)
    levels = [output.pooler_output, *(getattr(output, "deepstack_features", None) or ())]
    return torch.cat([pad_sequence(list(level), batch_first=True) for level in levels], dim=-1)


def merged_smallest(config: Any) -> tuple[Tensor, Tensor]:
    """Make the patches of an image of one soft token."""
    vision = config.vision_config
    channels = getattr(vision, "in_channels", 3)
    values = channels * vision.temporal_patch_size * vision.patch_size**2
    return torch.zeros(1, num_merged(config), values), torch.ones(1, 2, dtype=torch.long)


def num_merged(config: Any) -> int:
    """Count the patches that are merged to one soft token."""
    return int(config.vision_config.spatial_merge_size) ** 2


def padded_inputs(outputs: Mapping[str, Tensor], config: Any) -> tuple[Tensor, tuple[int, int]]:
    """Return the patches (P, D) of one image, padded as the host pads them, and the rows and columns of its tokens.

    The padding stays: without it kernels round otherwise, and what an image gives is no longer the host's own.
    """
    side = int(config.vision_config.pooling_kernel_size)
    columns, rows = (outputs["image_position_ids"][0].amax(dim=0) + 1).tolist()
    return outputs["pixel_values"][0], (rows // side, columns // side)


def padded_features(body: Any, values: Tensor, grids: Tensor) -> Tensor:
    """Encode padded patches (N, P, D) as Gemma 4 does; (N, T, H), each image in reading order."""
    patch_grids = int(body.config.vision_config.pooling_kernel_size) * grids
    patch = torch.arange(values.shape[1], device=values.device)
    columns = patch_grids[:, 1:]
    places = torch.stack([patch % columns, patch // columns], dim=-1)
    places = places.masked_fill((patch >= patch_grids.prod(dim=1, keepdim=True))[..., None], -1)
    output = body.get_image_features(values, places, return_dict=True)
    return pad_sequence(list(output.pooler_output), batch_first=True)


def padded_smallest(config: Any) -> tuple[Tensor, Tensor]:
    """Make the patches of an image of one soft token."""
    values = 3 * int(config.vision_config.patch_size) ** 2
    return torch.zeros(1, num_pooled(config), values), torch.ones(1, 2, dtype=torch.long)


def num_pooled(config: Any) -> int:
    """Count the patches that Gemma 4 pools to one soft token."""
    return int(config.vision_config.pooling_kernel_size) ** 2


def padded_grid(image_processor: Any, config: Any, height: int, width: int) -> tuple[int, int]:
    """Return rows and columns of an image's soft tokens of its size alone, as Gemma 4's image processor resizes it."""
    from transformers.models.gemma4.image_processing_pil_gemma4 import get_aspect_ratio_preserving_size

    pooled, patch = image_processor.pooling_kernel_size, image_processor.patch_size
    max_patches = image_processor.max_soft_tokens * pooled**2
    if image_processor.do_resize:
        height, width = get_aspect_ratio_preserving_size(height, width, patch, max_patches, pooled)
    return height // (patch * pooled), width // (patch * pooled)


def cell_inputs(outputs: Mapping[str, Tensor], config: Any) -> tuple[Tensor, tuple[int, int]]:
    """Return an image as the cells (P, D) of pixels that a soft token is made of each, and their rows and columns."""
    side = _cell_side(config)
    height, width = outputs["image_sizes"][0].tolist()
    rows, columns = height // side, width // side
    pixels = outputs["pixel_values"][0, :, :height, :width].reshape(-1, rows, side, columns, side)
    return pixels.permute(1, 3, 0, 2, 4).flatten(2).flatten(0, 1), (rows, columns)


def cell_features(body: Any, values: Tensor, grids: Tensor) -> Tensor:
    """Encode cells of pixels (N, P, D) as Mistral 3 does its images; (N, T, H), each in reading order."""
    side = _cell_side(body.config)
    sizes = side * grids
    rows, columns = grids.amax(dim=0).tolist()
    pixels = values.new_zeros(len(values), values.shape[-1] // side**2, rows * side, columns * side)
    for image, cells, (rows, columns) in zip(pixels, values, grids.tolist(), strict=True):
        shown = cells[: rows * columns].view(rows, columns, -1, side, side).permute(2, 0, 3, 1, 4)
        image[:, : rows * side, : columns * side] = shown.reshape(-1, rows * side, columns * side)
    layer = body.config.vision_feature_layer
    output = body.get_image_features(pixels, sizes, vision_feature_layer=layer, return_dict=True)
    return pad_sequence(list(output.pooler_output), batch_first=True)


def cell_smallest(config: Any) -> tuple[Tensor, Tensor]:
    """Make the cell of an image of one soft token."""
    return torch.zeros(1, 1, config.vision_config.num_channels * _cell_side(config) ** 2), torch.ones(1, 2).long()


def num_in_cell(config: Any) -> int:
    """Count the patches that Mistral 3 merges to one soft token."""
    return int(config.spatial_merge_size) ** 2


def cell_grid(image_processor: Any, config: Any, height: int, width: int) -> tuple[int, int]:
    """Return rows and columns of an image's soft tokens of its size alone, as Pixtral's image processor resizes it."""
    from transformers.image_utils import ChannelDimension
    from transformers.models.pixtral.image_processing_pil_pixtral import get_resize_output_image_size

    side = _cell_side(config)
    if image_processor.do_resize:
        blank = np.broadcast_to(np.uint8(0), (height, width, 3))  # of which the shape alone is looked at
        edge = image_processor.size["longest_edge"]
        height, width = get_resize_output_image_size(blank, edge, side, input_data_format=ChannelDimension.LAST)
    return height // side, width // side


def _cell_side(config: Any) -> int:
    """Return the side of a cell in pixels."""
    return int(config.vision_config.patch_size * config.spatial_merge_size)
