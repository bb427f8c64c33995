"""Defines what every compressor shares: its call, and zeros where its inputs and outputs are padded.

Knows features and counts. Does not know media, encoders, how budgets are written, or the LLM.

Shapes: N items, T features of the longest item, D feature size, K soft tokens asked for, H the LLM's hidden size.
"""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional


class Compressor(nn.Module):
    """Turns features into soft tokens as wide as the LLM, at a budget that may differ between the items of a batch.

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
        """Compresses each item at its budget.

        The budgets are those of `count_tokens`, which refuses what cannot be met; nothing is checked again here, since
        looking at the numbers would make the host wait for the device.

        Args:
            features: (N, T, D); what lies beyond an item's length does not matter.
            lengths: (N,) int64, true features of each item.
            tokens: (N,) int64, soft tokens of each item.
            rates: (N,) int64, features per soft token; 0 where a count was asked for.
            max_tokens: K, an upper bound of `tokens` known on the host.
            grids: (N, 2) int64, rows and columns of each item where images keep their shape; only those compressors
                take it that can be built for such (`build_compressor`).

        Returns:
            (N, K, H), zero beyond each item's count.
        """
        raise NotImplementedError

    def prepare(self, features: Tensor, lengths: Tensor) -> Tensor:
        """Does the part of the work that is the same at every budget; by default none.

        Args:
            features: (N, T, D).
            lengths: (N,) int64.

        Returns:
            (N, T, any size), for `compress_prepared`.
        """
        return features

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
        """Does the rest of `forward` with the result of `prepare`."""
        return self(prepared, lengths, tokens=tokens, rates=rates, max_tokens=max_tokens, grids=grids)

    def compress_spans(
        self,
        features: Tensor,
        lengths: Tensor,
        index: Tensor,
        *,
        tokens: Tensor,
        rates: Tensor,
        groups: Sequence[tuple[int, int]],
        grids: Tensor | None = None,
    ) -> Tensor:
        """Compresses spans of which several may be of one item, at different budgets; shared work is done once.

        Args:
            features: (N, T, D) of N items.
            lengths: (N,) int64.
            index: (R,) the item of each span.
            tokens: (R,) soft tokens of each span.
            rates: (R,) features per soft token of each span.
            groups: how many neighbouring spans are computed together, and an upper bound of their tokens.
            grids: (N, 2) of the items, where images keep their shape.

        Returns:
            (R, K, H) with K the largest bound, zero beyond each span's count.
        """
        prepared, parts, routings, start = self.prepare(features, lengths), [], [], 0
        max_tokens = max(bound for _, bound in groups)
        bank: Any = getattr(self, "projectors", None)
        for count, bound in groups:
            group, start = slice(start, start + count), start + count
            items = index[group]
            soft = self.compress_prepared(
                prepared[items],
                lengths[items],
                tokens=tokens[group],
                rates=rates[group],
                max_tokens=bound,
                grids=None if grids is None else grids[items],
            )
            parts.append(functional.pad(soft, (0, 0, 0, max_tokens - bound)))
            # The bank remembers the routing of its last call only, and there is one call per group.
            if bank is not None and (routing := bank.take_routing()) is not None:
                routings.append(functional.pad(routing, (0, 0, 0, max_tokens - routing.shape[1])))
        if bank is not None and routings:
            bank.routing = torch.cat(routings)
        return torch.cat(parts)


def zero_padding_features(features: Tensor, lengths: Tensor) -> Tensor:
    """Puts zeros beyond each item's length, whatever stood there: (N, T, D) -> (N, T, D)."""
    is_feature = torch.arange(features.shape[1], device=features.device) < lengths[:, None]
    return features.masked_fill(~is_feature[..., None], 0.0)


def zero_padding_tokens(soft: Tensor, tokens: Tensor, max_tokens: int) -> Tensor:
    """Puts zeros beyond each item's count, and pads to `max_tokens`: (N, k, H) with k <= K -> (N, K, H)."""
    is_token = torch.arange(max_tokens, device=soft.device) < tokens[:, None]
    if soft.shape[1] < max_tokens:  # torch copies what it pads by none
        soft = functional.pad(soft, (0, 0, 0, max_tokens - soft.shape[1]))
    return soft.masked_fill(~is_token[..., None], 0.0)
