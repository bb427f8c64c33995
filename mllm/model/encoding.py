"""Encodes the media of a batch before its forward pass, so that several passes can use the same features.

Knows the model and the names of its media arguments. Does not know rows, budgets or text.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from mllm.model.media_arguments import SIZE_KEYS, VALUE_KEYS
from mllm.model.modeling import ElasticForConditionalGeneration, Features


def encode_media(
    model: ElasticForConditionalGeneration,
    values: Mapping[str, Tensor],
    device: torch.device,
    *,
    frozen_only: bool = False,
) -> dict[str, Features]:
    """Run each medium's encoder over its items once.

    Args:
        values: media arguments of the forward pass by name, such as `pixel_values` (N, C, H, W); on any device.
        device: of the model.
        frozen_only: leave out media whose encoder trains.

    Returns:
        By medium what `ElasticModel.encode` gives, which `forward` and `generate` take as `features`.
    """
    features = {}
    for medium, key in VALUE_KEYS.items():
        if (raw := values.get(key)) is None:
            continue
        if frozen_only and any(parameter.requires_grad for parameter in model.model.encoder(medium).parameters()):
            continue
        sizes = values.get(SIZE_KEYS[medium])
        sizes = None if sizes is None else sizes.to(device, non_blocking=True)
        features[medium] = model.model.encode(medium, raw.to(device, non_blocking=True), sizes)
    return features
