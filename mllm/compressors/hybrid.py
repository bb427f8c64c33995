"""Joins pooled anchors and nested queries: a coarse grid of the image, then queries for what it leaves out.

Knows features, counts and the grid. Does not know the LLM, or who chose the budget.

Of n soft tokens the first are anchors: means over the cells of the largest coarse grid that is not above n, of those
this model has (say 1, 16 and 64 cells). The rest are queries, in their order. A query first reads the anchors of its
item, then the features, and so can ask for what the anchors do not show.

Within one size of the coarse grid a smaller count is a prefix of a larger one. Between two sizes none is: the first
tokens are then other means, and the queries have read other anchors.

Shapes: N items, T features, D feature size, A anchors of the largest map in use, Q queries in use, n soft tokens of an
item, H the LLM's hidden size.
Source: PARCEL (arXiv 2605.30126), of which no code is public: anchors of 4 x 4 below 64 tokens and of 8 x 8 up to 256,
nested queries, self-attention of queries and anchors, then cross-attention to the features. Here queries read anchors
without seeing each other, for otherwise no count would be a prefix of another; below the smallest grid there is one
anchor, so that every count from 1 on can be met; anchors stay means, as in M3 (arXiv 2405.17430), whatever the queries
do; and there is one layer of each attention, without a feed-forward, as in MQT (arXiv 2405.19315), but with residuals.
"""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from transformers import initialization as init

from mllm.budget.nesting import num_queries
from mllm.compressors.area_pooling import average, grid_cover
from mllm.compressors.base import Compressor, zero_padding_tokens
from mllm.compressors.query import CrossAttention, sincos_positions


class Hybrid(Compressor):
    """Makes soft tokens of a grid: anchors, then queries, and one projector for both.

    Args:
        in_size: D.
        projector: D -> H.
        grid: (rows, columns) of the features.
        anchors: sizes of the coarse grid in ascending order, the first of them 1.
        max_tokens: the largest count of an item.
        num_heads: of both attentions, dividing D.

    Raises:
        ValueError: a size that the heads or the positions do not divide.
    """

    nested = "none"

    def __init__(
        self,
        *,
        in_size: int,
        projector: nn.Module,
        grid: tuple[int, int],
        anchors: Sequence[int],
        max_tokens: int,
        num_heads: int,
    ) -> None:
        super().__init__()
        if in_size % num_heads or in_size % 4:
            raise ValueError(
                f"the encoder's size {in_size} must be a multiple of 4 and of compressor.num_heads={num_heads}"
            )
        assert anchors[0] == 1
        assert list(anchors) == sorted(set(anchors))
        self.grid = grid
        self.anchors = tuple(anchors)
        self.max_tokens = max_tokens
        self.projector = projector
        self.query = nn.Parameter(torch.empty(self._queries_up_to(max_tokens), in_size))
        self.anchor_attn = CrossAttention(size=in_size, num_heads=num_heads)
        self.feature_attn = CrossAttention(size=in_size, num_heads=num_heads)
        self.ln_query, self.ln_anchor, self.ln_query_read, self.ln_feature = (
            nn.LayerNorm(in_size, eps=1e-6) for _ in range(4)
        )
        if not self.query.is_meta:
            self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialises the queries as MQT does."""
        init.trunc_normal_(self.query, std=0.02)

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
        """See `Compressor.forward`; every item has the same grid.

        In training a query is read even where every count is that of a coarse grid, since every process has to touch
        every weight in every step.
        """
        assert grids is None
        num_tokens = min(max_tokens, self.max_tokens)
        num_anchors = self._num_anchors(tokens)
        most_anchors = max(size for size in self.anchors if size <= num_tokens)
        cover, area = grid_cover(num_anchors, self.grid, max_tokens=most_anchors)
        read = pooled = average(features, cover, area)
        if most_queries := max(self._queries_up_to(num_tokens), int(self.training)):
            positions = sincos_positions(self.grid, features.shape[2], features.device).to(features.dtype)
            anchor_positions = average(positions.expand(len(features), -1, -1), cover, area)
            is_anchor = torch.arange(most_anchors, device=tokens.device) < num_anchors[:, None]
            queried = self._read_anchors(self.query[:most_queries], pooled, anchor_positions, is_anchor)
            read = torch.cat([pooled, self._read_features(queried, features, positions)], dim=1)
        # `read` holds most_anchors anchors, of which an item may have fewer, and then the queries; its tokens are its
        # anchors and, right behind them, as many queries as are left.
        token = torch.arange(num_tokens, device=tokens.device)
        shift = (most_anchors - num_anchors)[:, None]  # from an item's last anchor to the first query
        index = torch.where(token < num_anchors[:, None], token, token + shift).clamp(max=read.shape[1] - 1)
        rows = torch.arange(len(read), device=read.device)[:, None]
        return zero_padding_tokens(self.projector(read[rows, index]), tokens, max_tokens)

    @torch.no_grad()
    def attention(self, num_tokens: int, features: Tensor) -> Tensor:
        """Computes how much the queries among the first tokens of one image look at each patch.

        Args:
            num_tokens: n, anchors among them.
            features: (T, D) of the image.

        Returns:
            (heads, Q, T), which sums to 1 over the patches; Q is what is left of n behind the anchors.
        """
        count = torch.tensor([num_tokens], device=features.device)
        most = num_queries(num_tokens, self.anchors)
        cover, area = grid_cover(self._num_anchors(count), self.grid, max_tokens=num_tokens - most)
        positions = sincos_positions(self.grid, features.shape[1], features.device).to(features.dtype)
        anchors, anchor_positions = average(features[None], cover, area), average(positions[None], cover, area)
        is_anchor = torch.ones(1, num_tokens - most, dtype=torch.bool, device=features.device)
        queried = self._read_anchors(self.query[:most], anchors, anchor_positions, is_anchor)
        return self.feature_attn.weights(self.ln_query_read(queried), self.ln_feature(features[None]) + positions)[0]

    def _num_anchors(self, tokens: Tensor) -> Tensor:
        """Counts the anchors of each item (N,) on the device, without a look-up on the host."""
        count = torch.ones_like(tokens)
        for smaller, size in pairwise(self.anchors):
            count = count + (tokens >= size) * (size - smaller)
        return count

    def _queries_up_to(self, num_tokens: int) -> int:
        """Returns the most queries that any count up to this one has."""
        return max(num_queries(count, self.anchors) for count in range(1, num_tokens + 1))

    def _read_anchors(self, query: Tensor, pooled: Tensor, anchor_positions: Tensor, is_anchor: Tensor) -> Tensor:
        """Lets queries read anchors: (Q, D), anchors and positions (N, A, D), those that exist (N, A) -> (N, Q, D).

        Positions are added behind the norm, so that large features do not drown them.
        """
        anchors = self.ln_anchor(pooled)
        return query + self.anchor_attn(self.ln_query(query)[None], anchors + anchor_positions, anchors, is_anchor)

    def _read_features(self, query: Tensor, features: Tensor, positions: Tensor) -> Tensor:
        """Lets queries read features: (N, Q, D), (N, T, D) and positions (T, D) -> (N, Q, D)."""
        values = self.ln_feature(features)
        return query + self.feature_attn(self.ln_query_read(query), values + positions, values)
