"""Average pooling of a stream or a grid, to any rate or count.

Knows features, counts and, for images, the grid. Does not know which medium this is, or who chose the budget.

Shapes: N items, T features of the longest item, D feature size, K soft tokens asked for, H the LLM's hidden size.
Sources: M3 (arXiv 2405.17430) pools grids 24 -> 12 -> 6 -> 3 -> 1 behind its projector (`project_first`); Llama-MTSK
(2503.06362) and Omni-AVSR (2511.07253) pool streams at rates and drop the remainder. Counts between those are area
pooling, see `areas.py`. The Haar order is ours, see `haar.py`.
"""

from typing import Literal

from torch import Tensor

from mllm.compressors.area_pooling import average, grid_cover, own_grid_cover, stream_cover
from mllm.compressors.base import Compressor, own_tokens, without_padding
from mllm.compressors.haar import haar
from mllm.compressors.projector import ProjectorBank

Order = Literal["raster", "haar"]


class Pool(Compressor):
    """Mean of the features in each soft token's cell; nothing to learn but the projectors.

    Streams: at rate r each full window of r features (the remainder is dropped, as in the published systems); at rate 0
    the whole item in equal stretches. Grids: equal rectangles.

    In Haar order a grid's tokens are a coarse map and then details, and the tokens of a smaller budget are the first
    ones of a larger. The projector stands behind the transform, on each token by itself: then a token costs what it
    costs in raster order, a prefix needs nothing of what follows it, and the projector can tell details, which are
    small, from means. `project_first` transforms what the projector gives instead, so that prefixes hold the means of
    projected patches exactly, as M3 pools them; it runs the projector on every patch whatever the budget.

    Args:
        projectors: D -> H.
        grid: (rows, columns) of the features, for images; each item's own where `forward` is told `grids`.
        project_first: pool what the projector gives, instead of projecting what was pooled.
        order: of the tokens of a grid.
    """

    def __init__(
        self,
        *,
        projectors: ProjectorBank,
        grid: tuple[int, int] | None = None,
        project_first: bool = False,
        order: Order = "raster",
    ) -> None:
        super().__init__()
        assert order == "raster" or (grid is not None and not projectors.budgets)
        self.nested = "pooled" if order == "raster" else "prefix"
        self.order = order
        self.projectors = projectors
        self.grid = grid
        self.project_first = project_first

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
        read = self.read_items(features, lengths)
        return self.serve(read, lengths, tokens=tokens, rates=rates, max_tokens=max_tokens, grids=grids)

    def read_items(self, features: Tensor, lengths: Tensor) -> Tensor:
        """See `Compressor.read_items`: features behind the projector, where it comes first and is that of all."""
        features = without_padding(features, lengths)
        if not self.project_first or self.projectors.budgets:
            return features
        return self.projectors(features, features.new_zeros(len(features)))

    def serve(
        self,
        read: Tensor,
        lengths: Tensor,
        *,
        tokens: Tensor,
        rates: Tensor,
        max_tokens: int,
        grids: Tensor | None = None,
    ) -> Tensor:
        """See `Compressor.serve`."""
        asked = rates.where(rates > 0, tokens)
        if self.project_first and self.projectors.budgets:
            read = self.projectors(read, asked)
        if self.order == "haar":
            assert self.grid is not None
            pooled = haar(read, self.grid)[:, :max_tokens]  # does not depend on how many tokens an item has
        else:
            # No item has more tokens than features.
            sizes = {"num_features": read.shape[1], "max_tokens": min(max_tokens, read.shape[1])}
            pooled = average(read, *self._cover(lengths, tokens, rates, grids, sizes))
        soft = pooled if self.project_first else self.projectors(pooled, asked)
        return own_tokens(soft, tokens, max_tokens)

    def _cover(
        self, lengths: Tensor, tokens: Tensor, rates: Tensor, grids: Tensor | None, sizes: dict[str, int]
    ) -> tuple[Tensor, Tensor]:
        """Which features each token averages, see `areas.py`."""
        if self.grid is None:
            return stream_cover(lengths, tokens, rates, **sizes)
        if grids is not None:
            return own_grid_cover(tokens, grids, **sizes)
        return grid_cover(tokens, self.grid, max_tokens=sizes["max_tokens"])
