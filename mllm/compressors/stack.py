"""Stacks neighbouring features side by side in one soft token, with one projector per rate.

Knows features and the rates (or grid counts) it was built for. Does not know which medium this is.

Shapes: N items, T features of the longest item, D feature size, r features per token, K soft tokens asked for, H the
LLM's hidden size.
Sources: Llama-AVSR (arXiv 2409.12319) and Llama-MTSK (2503.06362) stack r frames and drop the remainder; on a grid this
is the pixel shuffle of several vision-language models.
"""

import torch
from torch import Tensor
from torch.nn import functional

from mllm.compressors.base import Compressor, zero_padding_features, zero_padding_tokens
from mllm.compressors.projector import ProjectorBank, keep_budget


class Stack(Compressor):
    """Concatenates and projects r features of each full window, or of each block of the grid.

    A projector's input is r * D wide, so there is one per budget by nature and no budget between the trained ones. All
    of them run on every item; see `ProjectorBank` for why.

    Args:
        projectors: one per budget: a rate r for streams, a count n for grids.
        grid_rows: rows of blocks at each budget, for grids; empty for streams.
        grid: (rows, columns) of the features, for grids.
    """

    nested = "none"

    def __init__(self, *, projectors: ProjectorBank, grid_rows: tuple[int, ...] = (), grid: tuple[int, int] = (0, 0)):
        super().__init__()
        assert not grid_rows or len(grid_rows) == len(projectors.budgets)
        self.projectors = projectors
        self.grid_rows = grid_rows
        self.grid = grid

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
        """See `Compressor.forward`; every item has the same grid."""
        assert grids is None
        if not self.grid_rows:
            features = zero_padding_features(features, lengths)
        item_budgets = tokens if self.grid_rows else rates
        num_tokens = min(max_tokens, features.shape[1])
        soft = torch.zeros((), device=features.device, dtype=features.dtype)
        for index, (budget, projector) in enumerate(zip(self.projectors.budgets, self.projectors, strict=True)):
            windows = self._blocks(features, index) if self.grid_rows else _windows(features, budget)
            projected = zero_padding_tokens(projector(windows[:, :num_tokens]), tokens, num_tokens)
            soft = soft + keep_budget(projected, item_budgets, budget)
        return zero_padding_tokens(soft, tokens, max_tokens)

    def _blocks(self, features: Tensor, index: int) -> Tensor:
        """Cuts a grid into blocks, (N, H*W, D) -> (N, n, r * D): they and the patches in them are in reading order."""
        (height, width), rows = self.grid, self.grid_rows[index]
        columns = self.projectors.budgets[index] // rows
        blocks = features.unflatten(1, (rows, height // rows, columns, width // columns))
        return blocks.transpose(2, 3).flatten(3).flatten(1, 2)


def _windows(features: Tensor, rate: int) -> Tensor:
    """Cuts streams into windows, (N, T, D) -> (N, T // r, r * D).

    There is at least one window, so that a batch too short for any still touches the weights.
    """
    features = functional.pad(features, (0, 0, 0, max(rate - features.shape[1], 0)))
    longest = features.shape[1] // rate
    return features[:, : longest * rate].unflatten(1, (longest, rate)).flatten(2)
