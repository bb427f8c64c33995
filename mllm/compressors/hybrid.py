"""Pooled anchors and nested queries in one: a coarse map of the picture, then queries for what it leaves out.

Knows features, counts and the grid. Does not know the LLM, or who chose the budget.

Of n soft tokens the first are anchors: means over the cells of the largest map that is not above n, of those trained
(say 1, 16 and 64). The rest are queries, in their order. A query first reads the anchors of its item, then the
features, and so can ask for what they do not show.

Within one size of the map a smaller count is a prefix of a larger one. Between two sizes nothing is: the first tokens
are then other means, and the queries have read other anchors.

Shapes: N items, T features, D feature size, A anchors of the largest map in use, Q queries in use, n soft tokens of an
item, H the LLM's hidden size.
Source: PARCEL (arXiv 2605.30126), of which no code is public: anchors of 4 x 4 below 64 tokens and of 8 x 8 up to 256,
nested queries, self-attention of queries and anchors, then cross-attention to the features. Here queries read anchors
without seeing each other, for otherwise no count would be a prefix of another; below 16 tokens there is one anchor; and
anchors stay means, as in M3 (arXiv 2405.17430), instead of being changed by the queries.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers import initialization as init

from mllm.compressors.areas import average, grid_cover
from mllm.compressors.base import Compressor, own_tokens
from mllm.compressors.query import CrossAttention, sincos_positions


class Hybrid(Compressor):
    """Soft tokens of a grid: anchors, then queries; one projector for both.

    Args:
        projector: D -> H.
        grid: (rows, columns) of the features.
        anchors: sizes of the pooled map in ascending order, the first of them 1.
        num_queries: the most queries of an item.
        num_heads: of both attentions.
    """

    nested = "none"

    def __init__(
        self,
        *,
        in_size: int,
        projector: nn.Module,
        grid: tuple[int, int],
        anchors: Sequence[int],
        num_queries: int,
        num_heads: int,
    ) -> None:
        super().__init__()
        if in_size % num_heads or in_size % 4:
            raise ValueError(f"the encoder's size {in_size} must be a multiple of 4 and of query_heads={num_heads}")
        assert anchors[0] == 1
        assert list(anchors) == sorted(set(anchors))
        self.grid = grid
        self.anchors = tuple(anchors)
        self.num_queries = num_queries
        self.projector = projector
        self.query = nn.Parameter(torch.empty(num_queries, in_size))
        self.anchor_attn = CrossAttention(size=in_size, num_heads=num_heads)
        self.feature_attn = CrossAttention(size=in_size, num_heads=num_heads)
        self.ln_anchor, self.ln_query, self.ln_feature = (nn.LayerNorm(in_size, eps=1e-6) for _ in range(3))
        if not self.query.is_meta:
            self.reset_parameters()

    def reset_parameters(self) -> None:
        """Queries as in MQT."""
        init.trunc_normal_(self.query, std=0.02)

    def forward(self, features: Tensor, lengths: Tensor, *, tokens: Tensor, rates: Tensor, max_tokens: int) -> Tensor:
        """See `Compressor.forward`."""
        num_tokens = min(max_tokens, self.anchors[-1] + self.num_queries)
        sizes = torch.tensor(self.anchors, device=tokens.device)
        num_anchors = sizes[((tokens[:, None] >= sizes).sum(dim=1) - 1).clamp(min=0)]  # (N,)
        most_anchors = max(size for size in self.anchors if size <= max(num_tokens, 1))
        cover, area = grid_cover(num_anchors, self.grid, max_tokens=most_anchors)
        positions = sincos_positions(self.grid, features.shape[2], features.device).to(features.dtype)
        pooled = average(features, cover, area)
        read = pooled
        if num_queries := queries_in_use(num_tokens, self.anchors):
            is_anchor = torch.arange(most_anchors, device=tokens.device) < num_anchors[:, None]
            places = average(positions.expand(len(features), -1, -1), cover, area)
            queries = self._queries(features, positions, pooled, places, is_anchor, num_queries)
            read = torch.cat([pooled, queries], dim=1)
        token = torch.arange(num_tokens, device=tokens.device)
        shift = (most_anchors - num_anchors)[:, None]  # from an item's own anchors to its queries
        index = torch.where(token < num_anchors[:, None], token, token + shift).clamp(max=read.shape[1] - 1)
        rows = torch.arange(len(read), device=read.device)[:, None]
        return own_tokens(self.projector(read[rows, index]), tokens, max_tokens)

    def _queries(
        self, features: Tensor, positions: Tensor, pooled: Tensor, places: Tensor, is_anchor: Tensor, num_queries: int
    ) -> Tensor:
        """What the first queries read: features (N, T, D), anchors and their positions (N, A, D) -> (N, Q, D).

        Positions are added behind the norms, so that large features do not drown them.
        """
        query = self.query[:num_queries][None]
        anchors = self.ln_anchor(pooled)
        query = query + self.anchor_attn(query, anchors + places, anchors, is_anchor)
        values = self.ln_feature(features)
        return query + self.feature_attn(self.ln_query(query), values + positions, values)


def queries_in_use(num_tokens: int, anchors: Sequence[int]) -> int:
    """The most queries among all counts up to this one."""
    ends = [*(size - 1 for size in anchors[1:] if size <= num_tokens), num_tokens]
    return max(end - size for end, size in zip(ends, anchors, strict=False))
