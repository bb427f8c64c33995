"""Puts a host's own encoder and projector behind the contract of an encoder.

Knows a host's body and its family. Does not know compressors, budgets, or what the soft tokens are for.
"""

from typing import Any

import torch
from torch import Tensor, nn

from mllm.encoders import Encoder
from mllm.hosts.families import find_family, host_facts
from mllm.hosts.maps import map_features
from mllm.hosts.tiles import image_side, tile_features


class HostEncoder(Encoder):
    """Gives what the host itself would read: its encoder's features, projected, (N, T, H).

    The host's parts stay where they are in its body; this holds them without owning them, all but the LLM.

    Args:
        body: the host without its head.

    Raises:
        ValueError: a host of a family that is not supported.
    """

    def __init__(self, body: Any) -> None:
        family = find_family(body.config.model_type, reference="the host")
        parts = {name: part for name, part in body.named_children() if name != family.decoder}
        super().__init__(nn.ModuleDict(parts))
        self._body = (body,)  # a tuple, so that it is not registered a second time
        self.family = family
        facts = host_facts(body.config)
        self.hidden_size = facts.hidden_size
        self.grid = facts.grid
        self.max_patches = facts.max_patches
        # What the host puts behind the rows of a map; a parameter of the body itself, and of none of its parts.
        self.newline: nn.Parameter | None = getattr(body, "image_newline", None)

    def forward(self, values: Tensor, lengths: Tensor | None = None) -> Any:
        """Encodes media by the host's own method.

        Args:
            values: tiles (N, 3, h, w), the tiles of maps (N, P, D), patches (N, P, D), or clips as `mllm.hosts.clips`
                says of the family.
            lengths: (N,) true lengths of clips; (N, 2) grids of images that keep their shape; (N, 6) sizes of maps.

        Returns:
            (N, T, H) of tiles; of all else also the counts (N,).
        """
        (body,) = self._body
        if self.family.patches is not None:
            assert lengths is not None
            return self.family.patches.features(body, values, lengths), lengths.prod(dim=1)
        if self.family.images is not None:
            if self.family.images.reads_maps:
                assert lengths is not None
                return map_features(body, values, lengths), lengths[:, :2].prod(dim=1)
            return tile_features(body, values, is_nested=self.family.images.is_nested)
        assert self.family.clips is not None
        assert lengths is not None
        return self.family.clips.features(body, values, lengths)

    def smallest_input(self) -> tuple[Tensor, Tensor | None]:
        """Makes one tile, or the smallest image or clip."""
        (body,) = self._body
        if self.family.patches is not None:
            return self.family.patches.smallest(body.config)
        if self.family.images is not None:
            side = image_side(body.config)
            if self.family.images.reads_maps:
                assert self.grid is not None
                return torch.zeros(1, 1, 3 * side * side), torch.tensor([[*self.grid, 1, 1, *self.grid]])
            return torch.ones(1, 3, side, side), None  # zeros would be padding to Idefics3
        assert self.family.clips is not None
        return self.family.clips.smallest(body.config)
