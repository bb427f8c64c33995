"""Average pooling of a stream or a grid, to any rate or count.

Knows features, counts and, for pictures, the grid. Does not know which medium this is, or who chose the budget.

Shapes: N items, T features of the longest item, D feature size, K soft tokens asked for, H the LLM's hidden size.
Sources: M3 (arXiv 2405.17430) pools grids 24 -> 12 -> 6 -> 3 -> 1 behind its projector (`project_first`); Llama-MTSK
(2503.06362) and Omni-AVSR (2511.07253) pool streams at rates and drop the remainder. Counts between those are area
pooling, see `areas.py`.
"""

from torch import Tensor

from mllm.compressors.areas import average, grid_cover, own_grid_cover, stream_cover
from mllm.compressors.base import Compressor, own_tokens, without_padding
from mllm.compressors.projector import ProjectorBank


class Pool(Compressor):
    """Mean of the features in each soft token's cell; nothing to learn but the projectors.

    Streams: at rate r each full window of r features (the remainder is dropped, as in the published systems); at rate 0
    the whole item in equal stretches. Grids: equal rectangles.

    Args:
        projectors: D -> H.
        grid: (rows, columns) of the features, for pictures; each item's own where `forward` is told `grids`.
        project_first: pool what the projector gives, instead of projecting what was pooled.
    """

    nested = "pooled"

    def __init__(
        self, *, projectors: ProjectorBank, grid: tuple[int, int] | None = None, project_first: bool = False
    ) -> None:
        super().__init__()
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
        asked = rates.where(rates > 0, tokens)
        num_features = features.shape[1]
        num_cells = min(max_tokens, num_features)  # no item has more tokens than features
        if self.grid is None:
            cover, area = stream_cover(lengths, tokens, rates, num_features=num_features, max_tokens=num_cells)
            features = without_padding(features, lengths)
        elif grids is not None:
            cover, area = own_grid_cover(tokens, grids, num_features=num_features, max_tokens=num_cells)
            features = without_padding(features, lengths)
        else:
            cover, area = grid_cover(tokens, self.grid, max_tokens=num_cells)
        if self.project_first:
            soft = average(self.projectors(features, asked), cover, area)
        else:
            soft = self.projectors(average(features, cover, area), asked)
        return own_tokens(soft, tokens, max_tokens)
