"""Encodes images of a fixed size by vision models of transformers, one feature per patch.

Knows which hidden layer to read, which tokens of a model are no patches, and the grid the patches form.
Does not know how an image got its size, what compresses the patches, or the LLM.

Shapes: N images, h x w pixels, T = rows x columns patches in reading order, D feature size.
"""

from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from mllm.config.medium import ImageEncoderConfig
from mllm.encoders.base import Encoder, EncoderFacts


@dataclass(frozen=True)
class BackboneLayout:
    """Tells where a family of vision models keeps its parts."""

    class_name: str
    layers: str
    final_norm: str
    has_class_token: bool
    interpolates: bool
    """Whether `forward` must be told that the image does not have the size of the position table."""


LAYOUTS = {
    "clip_vision_model": BackboneLayout("CLIPVisionModel", "encoder.layers", "post_layernorm", True, True),
    "siglip_vision_model": BackboneLayout("SiglipVisionModel", "encoder.layers", "post_layernorm", False, True),
    "siglip2_vision_model": BackboneLayout("Siglip2VisionModel", "encoder.layers", "post_layernorm", False, False),
    "dinov2": BackboneLayout("Dinov2Model", "encoder.layer", "layernorm", True, False),
    "dinov2_with_registers": BackboneLayout("Dinov2WithRegistersModel", "encoder.layer", "layernorm", True, False),
    "dinov3_vit": BackboneLayout("DINOv3ViTModel", "model.layer", "norm", True, False),
}


class VisionEncoder(Encoder):
    """Reads the patch features of one hidden layer of a vision model.

    The model is cut behind that layer: what follows would cost time and memory, and could never train.

    Args:
        backbone: a model of one of the families in `LAYOUTS`; it is changed in place.
        feature_layer: which hidden states to read, counted as transformers does: 1 is the output of the first layer,
            -1 that of the last, -2 (LLaVA, MQT, M3) that of the last but one.
        final_norm: send what is read through the model's final norm (PaliGemma's choice, with -1).
        image_size: pixels (h, w) of the images; None means the size in the backbone's config.

    Raises:
        ValueError: a layer that the encoder does not have.
    """

    def __init__(
        self,
        *,
        backbone: PreTrainedModel,
        feature_layer: int = -2,
        final_norm: bool = False,
        image_size: tuple[int, int] | None = None,
    ) -> None:
        super().__init__(backbone)
        config = backbone.config
        layout = LAYOUTS[config.model_type]
        trained_size = _pair(config.image_size)
        self.image_size = image_size or trained_size
        self.grid = grid_of(self.image_size, _pair(config.patch_size))
        self.hidden_size: int = config.hidden_size
        self._num_extra_tokens = int(layout.has_class_token) + getattr(config, "num_register_tokens", 0)
        resized = layout.interpolates and self.image_size != trained_size
        self._options = {"interpolate_pos_encoding": True} if resized else {}
        cut(backbone, feature_layer, final_norm)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Encodes (N, 3, h, w) normalised pixels as (N, T, D) patch features in reading order.

        Raises:
            ValueError: images of another size.
        """
        if tuple(pixel_values.shape[-2:]) != self.image_size:
            raise ValueError(
                f"images are {tuple(pixel_values.shape[-2:])} pixels; this encoder reads {self.image_size}"
            )
        hidden = self.backbone(pixel_values, **self._options).last_hidden_state
        return hidden[:, self._num_extra_tokens :]

    def smallest_input(self) -> tuple[Tensor, None]:
        """Makes one blank image."""
        return torch.zeros(1, 3, *self.image_size), None


def vision_facts(config: PreTrainedConfig, block: ImageEncoderConfig) -> EncoderFacts:
    """Returns the facts of a vision encoder that reads images of the size in the block, or of its own."""
    size = image_size_of(block) or _pair(config.image_size)
    grid = grid_of(size, _pair(config.patch_size))
    return EncoderFacts("image", config.hidden_size, grid=grid, image_pixels=size)


def vision_class(config: PreTrainedConfig) -> type[PreTrainedModel]:
    """Returns the transformers class of a vision config."""
    return getattr(transformers, LAYOUTS[config.model_type].class_name)


def wrap_vision(backbone: PreTrainedModel, block: ImageEncoderConfig) -> VisionEncoder:
    """Wraps a vision model as an encoder, shaped by a config."""
    return VisionEncoder(
        backbone=backbone,
        feature_layer=block.feature_layer,
        final_norm=block.final_norm,
        image_size=image_size_of(block),
    )


def image_size_of(block: ImageEncoderConfig) -> tuple[int, int] | None:
    """Returns the (h, w) that a config asks for, or None."""
    return None if block.image_size is None else _pair(block.image_size)


def grid_of(image_size: tuple[int, int], patch_size: tuple[int, int]) -> tuple[int, int]:
    """Counts the rows and columns of whole patches in an image.

    Raises:
        ValueError: an image smaller than a patch.
    """
    grid = (image_size[0] // patch_size[0], image_size[1] // patch_size[1])
    if not all(grid):
        raise ValueError(f"image_size {image_size} is smaller than one patch {patch_size}")
    return grid


def _pair(size: int | list[int] | tuple[int, ...]) -> tuple[int, int]:
    height, width = (size, size) if isinstance(size, int) else size
    return int(height), int(width)


def cut(backbone: PreTrainedModel, feature_layer: int, final_norm: bool) -> None:
    """Drops everything behind the hidden layer that is read, in place.

    Raises:
        ValueError: a layer that the encoder does not have.
    """
    layout = LAYOUTS[backbone.config.model_type]
    layers: Any = backbone.get_submodule(layout.layers)
    num_layers = len(layers)
    depth = feature_layer if feature_layer > 0 else num_layers + 1 + feature_layer
    if feature_layer == 0 or not 1 <= depth <= num_layers:
        raise ValueError(
            f"feature_layer={feature_layer} is not a layer of this encoder; "
            f"allowed: 1..{num_layers} or -{num_layers}..-1"
        )
    del layers[depth:]
    if not final_norm:
        backbone.set_submodule(layout.final_norm, nn.Identity())
    if getattr(backbone, "use_head", False):  # SigLIP's pooling head reads the features, nothing reads it
        backbone.use_head = False  # pyright: ignore[reportArgumentType]
        del backbone.head
