"""Averages the features of a stream or a grid, to any rate or count.

Knows features, counts and, for images, the grid. Does not know which medium this is, or who chose the budget.

Shapes: N items, T features of the longest item, D feature size, K soft tokens asked for, H the LLM's hidden size.
Sources: M3 (arXiv 2405.17430) pools grids 24 -> 12 -> 6 -> 3 -> 1 behind its projector (`project_first`); Llama-MTSK
(2503.06362) and Omni-AVSR (2511.07253) pool streams at rates and drop the remainder. Counts between those are area
pooling, see `area_pooling.py`. The Haar order is ours, see `haar.py`.
"""

from typing import Literal

import torch
from torch import Tensor

from mllm.compressors.area_pooling import average, grid_cover, item_grid_cover, stream_cover
from mllm.compressors.base import Compressor, zero_padding_features, zero_padding_tokens
from mllm.compressors.haar import haar
from mllm.compressors.projector import ProjectorBank

Order = Literal["raster", "haar"]


class Pool(Compressor):
    """Takes the mean of the features in each soft token's cell; only the projectors learn.

    Streams: at rate r each full window of r features (the remainder is dropped, as in the published systems); at rate 0
    the whole item in equal stretches. Grids: equal rectangles.

    In Haar order a grid's tokens are a coarse grid and then details, and the tokens of a smaller budget are the first
    ones of a larger. The projector stands behind the transform, on each token by itself: then a token costs what it
    costs in raster order, a prefix needs nothing of what follows it, and the projector can tell details, which are
    small, from means. `project_first` transforms what the projector gives instead, so that prefixes hold the means of
    projected patches exactly, as M3 pools them; it runs the projector on every patch whatever the budget.

    Args:
        projectors: D -> H.
        grid: (rows, columns) of the features, for images; `forward` takes `grids` where each item has its own.
        project_first: pool what the projector gives, instead of projecting what was pooled.
        order: of the tokens of a grid.
        keeps_full: give an item that keeps all of its features exactly those, and not their averages over one, which a
            product in reduced precision would round.
    """

    def __init__(
        self,
        *,
        projectors: ProjectorBank,
        grid: tuple[int, int] | None = None,
        project_first: bool = False,
        order: Order = "raster",
        keeps_full: bool = False,
    ) -> None:
        super().__init__()
        assert order == "raster" or (grid is not None and not projectors.budgets)
        self.nested = "pooled" if order == "raster" else "prefix"
        self.order = order
        self.projectors = projectors
        self.grid = grid
        self.project_first = project_first
        self.keeps_full = keeps_full

    def forward(
        self,
        features: Tensor,
        lengths: Tensor,
        *,
        tokens: Tensor,
        rates: Tensor,
        max_tokens: int,
        grids: Tensor | None = None,
    ) -> Tensor:
        """See `Compressor.forward`."""
        prepared = self.prepare(features, lengths)
        return self.compress_prepared(prepared, lengths, tokens=tokens, rates=rates, max_tokens=max_tokens, grids=grids)

    def prepare(self, features: Tensor, lengths: Tensor) -> Tensor:
        """See `Compressor.prepare`: projects the features, where that comes first and one projector serves all."""
        features = zero_padding_features(features, lengths)
        if not self.project_first or self.projectors.budgets:
            return features
        return self.projectors(features, features.new_zeros(len(features)))

    def compress_prepared(
        self,
        prepared: Tensor,
        lengths: Tensor,
        *,
        tokens: Tensor,
        rates: Tensor,
        max_tokens: int,
        grids: Tensor | None = None,
    ) -> Tensor:
        """See `Compressor.compress_prepared`."""
        budgets = rates.where(rates > 0, tokens)
        if self.project_first and self.projectors.budgets:
            prepared = self.projectors(prepared, budgets)
        if self.order == "haar":
            assert self.grid is not None
            pooled = haar(prepared, self.grid)[:, :max_tokens]  # does not depend on how many tokens an item has
        else:
            num_features = prepared.shape[1]
            num_tokens = min(max_tokens, num_features)  # no item has more tokens than features
            if self.grid is None:
                cover = stream_cover(lengths, tokens, rates, num_features=num_features, max_tokens=num_tokens)
            elif grids is not None:
                cover = item_grid_cover(tokens, grids, num_features=num_features, max_tokens=num_tokens)
            else:
                cover = grid_cover(tokens, self.grid, max_tokens=num_tokens)
            pooled = average(prepared, *cover)
            if self.keeps_full:
                is_full = (tokens >= lengths)[:, None, None]
                pooled = torch.where(is_full, prepared[:, :num_tokens], pooled)
        soft = pooled if self.project_first else self.projectors(pooled, budgets)
        return zero_padding_tokens(soft, tokens, max_tokens)
