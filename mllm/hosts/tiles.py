"""Computes soft tokens of images at the full budget, by the host's own method: tiles of one size, each a square grid.

Knows configs of hosts, and tiles in the order of the host's processor. Does not know how an image was cut.

Shapes: N tiles, h x w pixels of one, T soft tokens of one, H the LLM's hidden size.
"""

import inspect
import math
import re
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from mllm.budget.tiling import Tiling

_SETTINGS = ("vision_feature_layer", "vision_feature_select_strategy")
"""Values of their own config that some methods take as arguments."""


def tile_features(body: Any, pixel_values: Tensor, *, is_nested: bool) -> Tensor:
    """Encode and project tiles by the host's own method.

    Args:
        body: the host without its head.
        pixel_values: (N, 3, h, w).
        is_nested: whether the method takes the tiles of one image as (1, N, 3, h, w).

    Returns:
        (N, T, H), each tile in reading order.
    """
    if hasattr(body, "pack_image_features"):
        return unpacked_features(body, pixel_values)
    values = pixel_values[None] if is_nested else pixel_values
    output = body.get_image_features(pixel_values=values, **method_settings(body), return_dict=True)
    soft = output.pooler_output
    soft = soft if isinstance(soft, Tensor) else torch.cat([one.flatten(0, -2) for one in soft])
    return soft.reshape(len(pixel_values), -1, soft.shape[-1])


def method_settings(body: Any) -> dict[str, Any]:
    """Return the values of a host's config that its `get_image_features` takes as arguments."""
    known = inspect.signature(body.get_image_features).parameters
    return {key: getattr(body.config, key) for key in _SETTINGS if key in known and hasattr(body.config, key)}


def unpacked_features(body: Any, pixel_values: Tensor) -> Tensor:
    """Encode and project tiles by the steps of LLaVA-NeXT's method, which then puts them together as one map."""
    config = body.config
    hidden = body.vision_tower(pixel_values, output_hidden_states=True, return_dict=True).hidden_states
    layer = config.vision_feature_layer
    features = hidden[layer] if isinstance(layer, int) else torch.cat([hidden[number] for number in layer], dim=-1)
    features = features[:, 1:] if config.vision_feature_select_strategy == "default" else features
    return body.multi_modal_projector(features)


def pinpoint_tiling(config: Any) -> Tiling:
    """Return how a LLaVA-NeXT cuts images and puts their tiles together."""
    return Tiling(pinpoints=tuple((height, width) for height, width in config.image_grid_pinpoints))


def scaled_tiling(config: Any) -> Tiling:
    """Return how a LLaVA-OneVision cuts images, puts their tiles together, and scales down what that gives.

    Raises:
        ValueError: another way than to allow the features of so many tiles.
    """
    known = re.fullmatch(r"anyres_max_([1-9]\d*)", config.vision_aspect_ratio)
    if known is None:
        raise ValueError(
            f"this llava_onevision has vision_aspect_ratio {config.vision_aspect_ratio!r}; allowed: anyres_max_N"
        )
    return replace(pinpoint_tiling(config), merge="whole_map", keeps_single=True, max_map_tiles=int(known[1]))


def image_side(config: Any) -> int:
    """Return the side of a tile in pixels.

    Raises:
        ValueError: tiles that are not square.
    """
    size = config.vision_config.image_size
    height, width = (size, size) if isinstance(size, int) else size
    if height != width:
        raise ValueError(f"the tiles of this {config.model_type} have {height} x {width} pixels; only squares are read")
    return int(height)


def num_patches(config: Any) -> int:
    """Count the patches of a tile."""
    return _patches(config) ** 2


def _patches(config: Any) -> int:
    """Count the patches of a tile along a side."""
    patch = config.vision_config.patch_size
    return image_side(config) // int(patch if isinstance(patch, int) else patch[0])


def _square(config: Any, divisor: int) -> tuple[int, int]:
    side = _patches(config)
    if side % divisor:
        raise ValueError(
            f"a tile of this {config.model_type} has {side} patches a side, which {divisor} does not divide"
        )
    return side // divisor, side // divisor


def llava_grid(config: Any) -> tuple[int, int]:
    """Return rows and columns of a LLaVA's soft tokens: one per patch.

    Raises:
        ValueError: features that are no grid: with a class token, or of an encoder whose images keep their shape.
    """
    kind = config.vision_config.model_type
    if kind not in ("clip_vision_model", "siglip_vision_model"):
        raise ValueError(f"this llava has a vision encoder {kind}; allowed: clip_vision_model, siglip_vision_model")
    has_class_token = kind == "clip_vision_model"
    if has_class_token != (config.vision_feature_select_strategy == "default"):
        raise ValueError(
            f"this llava selects features by {config.vision_feature_select_strategy!r} from a {kind}, so that its soft "
            "tokens are no grid of patches"
        )
    return _square(config, 1)


def internvl_grid(config: Any) -> tuple[int, int]:
    """Return rows and columns of an InternVL's soft tokens: neighbouring patches become one."""
    return _square(config, round(1 / config.downsample_ratio))


def idefics_grid(config: Any) -> tuple[int, int]:
    """Return rows and columns of the soft tokens of an Idefics3 or SmolVLM."""
    return _square(config, int(config.scale_factor))


def downsampled_grid(config: Any) -> tuple[int, int]:
    """Return rows and columns of the soft tokens of Cohere's vision models."""
    return _square(config, int(config.downsample_factor))


def patch_grid(config: Any) -> tuple[int, int]:
    """Return rows and columns where every patch becomes a soft token, as in PaliGemma."""
    return _square(config, 1)


def gemma3_grid(config: Any) -> tuple[int, int]:
    """Return rows and columns of a Gemma 3's soft tokens: patches averaged to a square of so many."""
    side = math.isqrt(config.mm_tokens_per_image)
    return _square(config, _patches(config) // side)
