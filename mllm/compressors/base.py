"""What every compressor shares: the call, and what holds for the padding on both of its sides.

Knows features and counts. Does not know media, encoders, budgets as words, or the LLM.

Shapes: N items, T features of the longest item, D feature size, K soft tokens asked for, H the LLM's hidden size.
"""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional


class Compressor(nn.Module):
    """Features to soft tokens as wide as the LLM, at a budget that may differ between the items of a batch.

    `nested` says how the tokens of a smaller budget relate to those of a larger one: `prefix` (they are its first
    ones), `pooled` (they are means over the same features) or `none`.
    """

    nested: Literal["prefix", "pooled", "none"]

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
        """Compress each item at its own budget.

        The budgets are those of `count_tokens`, which refuses what cannot be met; nothing is checked again here, since
        looking at the numbers would make the host wait for the device.

        Args:
            features: (N, T, D); what follows an item's own length does not matter.
            lengths: (N,) int64, true features of each item.
            tokens: (N,) int64, soft tokens of each item.
            rates: (N,) int64, features per soft token; 0 where a count was asked for.
            max_tokens: K, an upper bound of `tokens` known on the host.
            grids: (N, 2) int64, rows and columns of each item where images keep their shape; only those compressors
                take it that can be built for such (`build_compressor`).

        Returns:
            (N, K, H), zero beyond each item's own count.
        """
        raise NotImplementedError

    def read_items(self, features: Tensor, lengths: Tensor) -> Tensor:
        """What is made of features (N, T, D) whatever the budget is; `serve` takes it. Nothing by default."""
        return features

    def serve(
        self, read: Tensor, lengths: Tensor, *, tokens: Tensor, rates: Tensor, max_tokens: int, **given: Any
    ) -> Tensor:
        """The rest of `forward`, given what `read_items` made."""
        return self(read, lengths, tokens=tokens, rates=rates, max_tokens=max_tokens, **given)

    def compress_runs(
        self,
        features: Tensor,
        lengths: Tensor,
        index: Tensor,
        *,
        tokens: Tensor,
        rates: Tensor,
        groups: Sequence[tuple[int, int]],
        **given: Tensor,
    ) -> Tensor:
        """Compress runs of which several may be of one item, at different budgets; what they share is done once.

        Args:
            features, lengths: of N items.
            index: (R,) the item of each run.
            tokens, rates: (R,).
            groups: how many runs follow each other that are computed together, and an upper bound of their tokens.
            given: `grids` of the items, where images keep their shape.

        Returns:
            (R, K, H) with K the largest bound, zero beyond each run's own count.
        """
        read, parts, routings, start = self.read_items(features, lengths), [], [], 0
        longest = max(most for _, most in groups)
        bank: Any = getattr(self, "projectors", None)
        for count, most in groups:
            own, start = slice(start, start + count), start + count
            items = index[own]
            shapes = {name: value[items] for name, value in given.items()}
            soft = self.serve(
                read[items], lengths[items], tokens=tokens[own], rates=rates[own], max_tokens=most, **shapes
            )
            parts.append(functional.pad(soft, (0, 0, 0, longest - most)))
            if bank is not None and (routing := bank.take_routing()) is not None:
                routings.append(functional.pad(routing, (0, 0, 0, longest - routing.shape[1])))
        if bank is not None and routings:
            bank.routing = torch.cat(routings)
        return torch.cat(parts)


def without_padding(features: Tensor, lengths: Tensor) -> Tensor:
    """(N, T, D) with zeros beyond each item's own length, whatever stood there."""
    is_feature = torch.arange(features.shape[1], device=features.device) < lengths[:, None]
    return features.masked_fill(~is_feature[..., None], 0.0)


def own_tokens(soft: Tensor, tokens: Tensor, max_tokens: int) -> Tensor:
    """(N, k, H) with k <= K -> (N, K, H), zero beyond each item's own count."""
    is_token = torch.arange(max_tokens, device=soft.device) < tokens[:, None]
    soft = functional.pad(soft, (0, 0, 0, max_tokens - soft.shape[1]))
    return soft.masked_fill(~is_token[..., None], 0.0)
