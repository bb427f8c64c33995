"""Computes soft tokens of images that keep their shape, at the full budget, by the host's own method.

Knows configs of hosts, patches in the order of the host's processor, and grids of soft tokens. Does not know images.

Shapes: N images, P patches of the longest, D values of a patch, T soft tokens of the longest, H the LLM's hidden size,
L levels of the encoder that the decoder reads beside its output.
"""

from collections.abc import Mapping
from typing import Any

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
