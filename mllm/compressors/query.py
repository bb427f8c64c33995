"""Reads features with learned queries, of which the first m are a budget of m: the Matryoshka query transformer.

Knows features, counts and positions on a grid or inside a window. Does not know which medium this is.

Shapes: N items, T features of the longest item, D feature size, M queries, C size of queries, K soft tokens asked for,
H the LLM's hidden size; on streams W frames per window and m = W / rate queries of each window.
Source: Hu et al., Matryoshka Query Transformer (arXiv 2405.19315), as released: one cross-attention, no residual, no
feed-forward. Parameters have the released names. Streams are an extension of ours.
"""

from typing import Any, Literal, Self

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import initialization as init

from mllm.compressors.base import Compressor, zero_padding_features, zero_padding_tokens
from mllm.compressors.folded_attention import FoldCache, Folded, can_fold

Keys = Literal["position", "content"]
KEYS: tuple[Keys, ...] = ("position", "content")


class CrossAttention(nn.Module):
    """Multi-head attention with the parameter names of `nn.MultiheadAttention`.

    Unlike there, queries and keys that are the same for all items are projected once, and every weight is used by the
    forward of the module that owns it, which is what ZeRO-3 gathers by.
    """

    def __init__(self, *, size: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * size, size))
        self.in_proj_bias = nn.Parameter(torch.empty(3 * size))
        self.out_proj = nn.Linear(size, size)
        _reset_unless_meta(self)

    def reset_parameters(self) -> None:
        """Initialises what is no Linear as the released code does."""
        init.xavier_uniform_(self.in_proj_weight)
        init.zeros_(self.in_proj_bias)

    def forward(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
        """Lets queries read values.

        Args:
            query: (N or 1, M, C).
            key: (N or 1, T, C).
            value: (N, T, C).
            mask: (N, T) bool, true where a feature may be read; None where all may.

        Returns:
            (N, M, C).
        """
        weights = self.in_proj_weight.chunk(3)
        biases = self.in_proj_bias.chunk(3)
        heads = [
            functional.linear(states, weight, bias)
            .unflatten(2, (self.num_heads, -1))
            .transpose(1, 2)
            .expand(value.shape[0], -1, -1, -1)
            for states, weight, bias in zip((query, key, value), weights, biases, strict=True)
        ]
        allowed = None if mask is None else mask[:, None, None]
        read = functional.scaled_dot_product_attention(*heads, attn_mask=allowed)
        return self.out_proj(read.transpose(1, 2).flatten(2))

    def weights(self, query: Tensor, key: Tensor) -> Tensor:
        """Computes how much each head looks at each key, (N, M, C), (N, T, C) -> (N, heads, M, T); sums to 1 over keys.

        `forward` leaves that to a fused kernel, which keeps it to itself.
        """
        weights, biases = self.in_proj_weight.chunk(3), self.in_proj_bias.chunk(3)
        queries, keys = (
            functional.linear(states, weight, bias).unflatten(2, (self.num_heads, -1)).transpose(1, 2)
            for states, weight, bias in zip((query, key), weights, biases, strict=False)
        )
        return (queries @ keys.mT * queries.shape[-1] ** -0.5).softmax(dim=-1)


class Query(Compressor):
    """Makes soft token i of what learned query i reads; queries do not see each other, so the first m stay the same.

    `keys="position"` is MQT as released: keys are positions only, hence the attention is the same for every input and
    the whole is a learned, fixed pooling; in eval mode without gradients a grid is read with constants that are folded
    once, see `folded_attention.py`. `keys="content"` adds the features themselves to the keys.

    Streams are read window by window: W frames, of which the last window of a clip may own fewer; a rate of r frames
    per token takes the first W / r queries of every window.

    Args:
        in_size: D.
        out_size: H.
        query_grid: (rows, columns) of the queries, M in all; (1, M) for streams.
        feature_grid: (rows, columns) of the patches; `forward` takes `grids` where each item has its own; (1, W) for
            streams.
        keys: what the queries look for.
        size: C; None means D, as released.
        num_heads: heads of the attention, dividing C.
        windowed: the features are a stream, read in windows of W frames.

    Raises:
        ValueError: unknown `keys`, or a size that the heads or the positions do not divide.
    """

    nested = "prefix"

    def __init__(
        self,
        *,
        in_size: int,
        out_size: int,
        query_grid: tuple[int, int],
        feature_grid: tuple[int, int],
        keys: Keys = "position",
        size: int | None = None,
        num_heads: int = 1,
        windowed: bool = False,
    ) -> None:
        super().__init__()
        size = size or in_size
        if keys not in KEYS:
            raise ValueError(f"keys={keys!r} is not one of: {', '.join(KEYS)}")
        if size % num_heads or size % 4:
            raise ValueError(
                f"the size {size} of queries must be a multiple of 4 and of compressor.num_heads={num_heads}"
            )
        self.keys = keys
        self.query_grid = query_grid
        self.feature_grid = feature_grid
        self.windowed = windowed
        self.num_queries = query_grid[0] * query_grid[1]
        self.query = nn.Parameter(torch.empty(self.num_queries, size))
        self.pos_embed = nn.Parameter(torch.empty(self.num_queries, size))
        self.kv_proj = nn.Identity() if size == in_size else nn.Linear(in_size, size, bias=False)
        self.attn = CrossAttention(size=size, num_heads=num_heads)
        self.ln_q, self.ln_k, self.ln_v = (nn.LayerNorm(size, eps=1e-6) for _ in range(3))
        self.proj = nn.Parameter(torch.empty(size, out_size))
        self._folds = FoldCache()
        _reset_unless_meta(self)

    def reset_parameters(self) -> None:
        """Initialises the bare parameters as the released code does."""
        init.trunc_normal_(self.query, std=0.02)
        init.normal_(self.proj, std=self.proj.shape[1] ** -0.5)
        init.copy_(self.pos_embed, sincos_positions(self.query_grid, self.pos_embed.shape[1], self.pos_embed.device))

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
        if self.windowed:
            read = self._read_windows(zero_padding_features(features, lengths), lengths, rates, max_tokens)
        elif grids is not None:
            mask = torch.arange(features.shape[1], device=features.device) < lengths[:, None]
            positions = item_positions(self.pos_embed, self.query_grid, grids, num_features=features.shape[1])
            read = self._read(zero_padding_features(features, lengths), mask, positions, num_queries=max_tokens)
        elif self.keys == "position" and not self.training and can_fold(weights := tuple(self.parameters())):
            folded = self._folds.get(weights, self._fold)
            return zero_padding_tokens(folded(self.ln_v(self.kv_proj(features)), max_tokens), tokens, max_tokens)
        else:
            read = self._read(features, num_queries=max_tokens)
        return zero_padding_tokens(read @ self.proj, tokens, max_tokens)

    def values(self, features: Tensor) -> Tensor:
        """Computes what a query would read that looked at one feature alone: (N, T, D) -> (N, T, C)."""
        weight, bias = self.attn.in_proj_weight.chunk(3)[2], self.attn.in_proj_bias.chunk(3)[2]
        return self.attn.out_proj(functional.linear(self.ln_v(self.kv_proj(features)), weight, bias))

    @torch.no_grad()
    def attention(
        self, num_queries: int, *, features: Tensor | None = None, grid: tuple[int, int] | None = None
    ) -> Tensor:
        """Computes how much the first queries look at each patch of one image; not for streams.

        Args:
            num_queries: m.
            features: (T, D) of the image; may be left out where keys are positions.
            grid: rows and columns of the image, where each has its own.

        Returns:
            (heads, m, T), which sums to 1 over the patches.
        """
        assert not self.windowed
        positions = self.key_positions()[None]
        if grid is not None:
            grids = torch.tensor([grid], device=self.query.device)
            positions = item_positions(self.pos_embed, self.query_grid, grids, num_features=grid[0] * grid[1])
        states = None if features is None else self.kv_proj(features)
        return self.attn.weights(self._queries(num_queries)[None], self._keys(positions, states))[0]

    def _queries(self, num_queries: int | None) -> Tensor:
        """Norms the first queries at their positions: (m, C)."""
        return self.ln_q((self.query + self.pos_embed)[:num_queries])

    def _keys(self, positions: Tensor, features: Tensor | None) -> Tensor:
        """Makes keys (N or 1, T, C) of positions (N or 1, T, C) and, where they are content, of projected features."""
        if self.keys == "position":
            return self.ln_k(positions)
        assert features is not None
        # Positions are added behind the norm where there is content, so that large features do not drown them.
        return self.ln_k(features) + positions

    def train(self, mode: bool = True) -> Self:
        """Switches the mode as `nn.Module` does, and forgets what was folded."""
        self._folds.clear()
        return super().train(mode)

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        # Constants of weights that move elsewhere would keep the old ones alive.
        self._folds.clear()
        return super()._apply(fn, recurse)

    def _fold(self) -> Folded:
        query, key = self.ln_q(self.query + self.pos_embed), self.ln_k(self.key_positions())
        return Folded.of(self.attn, query, key, self.proj)

    def _read(
        self,
        features: Tensor,
        mask: Tensor | None = None,
        positions: Tensor | None = None,
        *,
        num_queries: int | None = None,
    ) -> Tensor:
        """Lets the first queries, all M by default, read features.

        Args:
            features: (N, T, D).
            mask: (N, T), those that exist.
            positions: (N, T, C) of the features, where they differ from item to item.

        Returns:
            (N, M, C).
        """
        states = self.kv_proj(features)
        positions = self.key_positions()[None] if positions is None else positions
        query = self._queries(num_queries)[None]
        return self.attn(query, self._keys(positions, states), self.ln_v(states), mask)

    def _read_windows(self, features: Tensor, lengths: Tensor, rates: Tensor, max_tokens: int) -> Tensor:
        """Reads each window with its first W / rate queries and puts the results in order: (N, T, D) -> (N, k, C)."""
        window_frames = self.feature_grid[1]
        num_windows = -(-features.shape[1] // window_frames)
        features = functional.pad(features, (0, 0, 0, num_windows * window_frames - features.shape[1]))
        is_frame = torch.arange(features.shape[1], device=features.device) < lengths[:, None]
        windows = features.unflatten(1, (num_windows, window_frames)).flatten(0, 1)
        mask = is_frame.unflatten(1, (num_windows, window_frames)).flatten(0, 1)
        mask = mask | ~mask.any(dim=1, keepdim=True)  # a softmax over nothing is NaN; windows of padding are cut below
        read = self._read(windows, mask).unflatten(0, (-1, num_windows)).flatten(1, 2)  # (N, windows * M, C)
        # Every window is read with all M queries, since items of different rates share a batch. Token t of an item is
        # query t % m of window t // m, where m is the number of queries its rate uses; a gather picks those.
        per_window = (window_frames // rates.clamp(min=1)).clamp(max=self.num_queries)[:, None]
        token = torch.arange(min(max_tokens, read.shape[1]), device=features.device)
        index = token // per_window * self.num_queries + token % per_window
        rows = torch.arange(len(read), device=features.device)[:, None]
        return read[rows, index.clamp(max=read.shape[1] - 1)]

    def key_positions(self) -> Tensor:
        """Resizes the positions of the queries to the grid of the features, as the released code does: (T, C)."""
        if self.query_grid == self.feature_grid:
            return self.pos_embed
        # (1, C, rows, columns); the batch axis first, so that torch takes its way for channels that lie last.
        table = self.pos_embed.float().unflatten(0, self.query_grid)[None].permute(0, 3, 1, 2)
        if self.windowed:
            line = functional.interpolate(table[:, :, 0], size=self.feature_grid[1], mode="linear")
            return line[0].T.to(self.pos_embed.dtype)
        resized = functional.interpolate(table, size=self.feature_grid, mode="bicubic", align_corners=False)
        return resized[0].flatten(1).T.to(self.pos_embed.dtype)


def _reset_unless_meta(module: "CrossAttention | Query") -> None:
    # Drawing random numbers on the meta device fills nothing and imports torch's compiler, which takes seconds.
    if not any(parameter.is_meta for parameter in module.parameters()):
        module.reset_parameters()


def item_positions(table: Tensor, table_grid: tuple[int, int], grids: Tensor, *, num_features: int) -> Tensor:
    """Resizes a table of positions to each item's grid, as `interpolate` does in mode `bicubic` for one grid.

    Args:
        table: (rows * columns, C) positions on `table_grid`.
        grids: (N, 2) int64, rows and columns of each item.
        num_features: T.

    Returns:
        (N, T, C); values beyond an item's patches are undefined.
    """
    # Bicubic interpolation is separable: the weight of a table entry is that of its row times that of its column. So
    # grids that differ from item to item need two small tables of weights and one product, instead of a loop.
    patch = torch.arange(num_features, device=table.device)
    down = _cubic_weights(patch // grids[:, 1:], table_grid[0], grids[:, :1])
    across = _cubic_weights(patch % grids[:, 1:], table_grid[1], grids[:, 1:])
    weights = down[..., :, None] * across[..., None, :]  # (N, T, rows, columns)
    return (weights.flatten(2) @ table.float()).to(table.dtype)


def _cubic_weights(position: Tensor, table_size: int, item_size: Tensor) -> Tensor:
    """Weighs each of `table_size` values at a position of a line of `item_size`: (N, T), (N, 1) -> (N, T, table_size).

    Cubic convolution with the constant -0.75 over four neighbours; the outermost values stand for those outside.
    """
    table_position = (position + 0.5) * (table_size / item_size) - 0.5
    left = table_position.floor()
    weights = torch.zeros(*position.shape, table_size, device=position.device)
    for offset in (-1, 0, 1, 2):
        distance = (table_position - left - offset).abs()
        near = (1.25 * distance - 2.25) * distance * distance + 1
        far = ((-0.75 * distance + 3.75) * distance - 6) * distance + 3
        neighbour = (left.long() + offset).clamp(0, table_size - 1)
        weights = weights.scatter_add(2, neighbour[..., None], torch.where(distance <= 1, near, far)[..., None])
    return weights


def sincos_positions(grid: tuple[int, int], size: int, device: torch.device) -> Tensor:
    """Makes sine-cosine positions in reading order, (rows * columns, size): half for the column, half for the row.

    A grid of one row gives all of `size` to the column.
    """
    rows, columns = grid
    column, row = torch.arange(columns, device=device), torch.arange(rows, device=device)
    if rows == 1:
        return _sincos(column, size)
    across = _sincos(column, size // 2).expand(rows, -1, -1)
    down = _sincos(row, size // 2)[:, None].expand(-1, columns, -1)
    return torch.cat([across, down], dim=2).flatten(0, 1)


def _sincos(position: Tensor, size: int) -> Tensor:
    frequency = 10000.0 ** (-torch.arange(size // 2, device=position.device) / (size / 2))
    angle = position[:, None] * frequency
    return torch.cat([angle.sin(), angle.cos()], dim=1)
