"""Reads the shared beginning of prompts once: rows that ask different questions about the same media share it.

Knows ids, positions and key-value caches. Does not know media, budgets or how tokens are chosen.

The last W positions of a batch padded on the left are read by every row for itself, where W is the longest question;
what stands before them is read once per group and copied to its rows, each copy shifted to where its row has it. So the
batch looks as if nothing had been shared, no row has a hole in it, and rows of a shorter question read the end of the
shared beginning again in what would have been padding.

Shapes: B rows, G groups, S positions, P positions of the longest beginning, W positions left to the rows, H the LLM's
hidden size.
"""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from mllm.kv_cache.names import cache_argument


def group_rows(rows: Sequence[Sequence[int]], keys: Sequence[Hashable]) -> tuple[list[int], list[int]]:
    """Groups rows that begin alike.

    Args:
        rows: ids of every row, without padding.
        keys: rows of different keys are never together; a row whose key is None is a group of its own.

    Returns:
        The group of every row, in order of appearance; and how many ids all rows of a group begin with.
    """
    group_of_key: dict[Hashable, int] = {}
    # A row without a key gets its number as one, in a tuple that no real key, which is a pair, can equal.
    index = [
        group_of_key.setdefault((row,) if key is None else (None, key), len(group_of_key))
        for row, key in enumerate(keys)
    ]
    groups: list[list[Sequence[int]]] = [[] for _ in group_of_key]
    for group, row in zip(index, rows, strict=True):
        groups[group].append(row)
    return index, [num_common(group) for group in groups]


def num_common(rows: Sequence[Sequence[int]]) -> int:
    """Counts the ids that all rows begin with."""
    limit = min(map(len, rows))
    beginnings = [tuple(row[:limit]) for row in rows]
    # In lexical order, whatever differs anywhere differs between the first and the last.
    first, last = min(beginnings), max(beginnings)
    return next((position for position in range(limit) if first[position] != last[position]), limit)


@dataclass(frozen=True)
class Prefixes:
    """Tells where the rows of a batch, padded on the left, find their shared beginnings.

    Args:
        index: (B,) group of each row.
        lengths: (G,) tokens that the rows of each group begin with alike.
        attention_mask: (B, S).
    """

    index: Tensor
    lengths: Tensor
    attention_mask: Tensor

    @property
    def first_rows(self) -> Tensor:
        """(G,) the first row of each group."""
        rows = torch.arange(len(self.index), device=self.index.device)
        return torch.full_like(self.lengths, len(rows)).scatter_reduce(0, self.index, rows, "amin")

    @property
    def row_lengths(self) -> Tensor:
        """(B,) tokens of each row."""
        return self.attention_mask.sum(dim=1)

    @property
    def num_unshared(self) -> int:
        """W: positions at the end that every row reads for itself; at least the last, which gives the first logits."""
        return max(int((self.row_lengths - self.lengths[self.index]).max()), 1)

    def on_rows(self, embeds: Tensor, text_embeds: Tensor) -> Tensor:
        """Assembles the embeddings of all rows: beginnings from the first rows of their groups, the rest from the text.

        Args:
            embeds: (G, S, H) of the first rows.
            text_embeds: (B, S, H).

        Returns:
            (B, S, H).
        """
        size = text_embeds.shape[1]
        starts_B = size - self.row_lengths  # where each row begins behind its padding
        token_BS = torch.arange(size, device=starts_B.device) - starts_B[:, None]  # which token of its prompt
        is_shared_BS = (token_BS >= 0) & (token_BS < self.lengths[self.index][:, None])
        # The same token of the group's first row, which may be padded by another amount. Positions that are not shared
        # are clamped only so that the lookup is in range; `where` drops what it finds there.
        source_BS = (token_BS + starts_B[self.first_rows][self.index][:, None]).clamp(0, size - 1)
        return torch.where(is_shared_BS[..., None], embeds[self.index[:, None], source_BS], text_embeds)

    def read(self, model: Any, embeds: Tensor, *, constant: Any = None, **row_inputs: Tensor | None) -> DynamicCache:
        """Lets the LLM read every shared beginning once.

        Args:
            model: takes embeddings, a mask, positions and a cache.
            embeds: (G, S, H) of the first rows.
            constant: text all beginnings begin with, which is not read again; see `mllm.kv_cache.system_prompt`.
            row_inputs: (B,) what else the model takes per row, the same within a group.

        Returns:
            A cache of S - W positions for B rows. Its layers keep everything, also those of a sliding window.
        """
        size, first_rows_G = embeds.shape[1], self.first_rows
        # A row leaves its last W positions to itself, so a group reads as far as its longest row asks it to. That may
        # be a little beyond the shared tokens of a shorter row; `spread_to_rows` then takes a shorter piece for it.
        num_cached_B = self.row_lengths - self.num_unshared
        counts_G = torch.zeros_like(self.lengths).scatter_reduce(0, self.index, num_cached_B, "amax").clamp(min=1)
        width = int(counts_G.max())
        # The beginnings are padded on the left to P positions: which token of the prompt stands at each, and where that
        # token lies in the row it is taken from.
        token_GP = torch.arange(width, device=embeds.device) - (width - counts_G)[:, None]
        source_GP = (token_GP + (size - self.row_lengths[first_rows_G])[:, None]).clamp(min=0)
        mask_GP = (token_GP >= 0).to(self.attention_mask.dtype)
        group_inputs = {key: value if value is None else value[first_rows_G] for key, value in row_inputs.items()}
        cache = DynamicCache() if constant is None else constant.on_rows(model, mask_GP, **group_inputs)
        unread = slice(cache.get_seq_length(), None)
        model(
            inputs_embeds=embeds.gather(1, source_GP[:, unread, None].expand(-1, -1, embeds.shape[2])),
            attention_mask=mask_GP,
            position_ids=token_GP.clamp(min=0)[:, unread],
            use_cache=True,
            logits_to_keep=1,
            **cache_argument(cache),
            **group_inputs,
        )
        return self.spread_to_rows(cache, counts_G)

    def spread_to_rows(self, cache: DynamicCache, counts: Tensor) -> DynamicCache:
        """Turns the cache of G beginnings, padded on the left, into one of S - W positions for B rows, in place.

        Args:
            counts: (G,) tokens of each beginning.
        """
        width = cache.get_seq_length()
        num_cached = self.attention_mask.shape[1] - self.num_unshared
        kept_B = self.row_lengths - self.num_unshared
        # Position p of a row holds token p - padding of its prompt; the same token of its group stands behind the
        # group's padding. Padding of the row points at the edge, and the attention mask hides it.
        token_BS = torch.arange(num_cached, device=counts.device) - (num_cached - kept_B)[:, None]
        source_BS = (token_BS + (width - counts)[self.index][:, None]).clamp(0, width - 1)
        for layer in cache.layers:
            _spread_layer(layer, self.index, source_BS)
        return cache


def _spread_layer(layer: Any, index: Tensor, source: Tensor) -> None:
    """Gives one layer's cache of G beginnings to B rows: position p of row b takes `source[b, p]` of its group."""
    assert type(layer) is DynamicLayer
    assert layer.keys is not None
    assert layer.values is not None
    # (G, heads, P, D) -> (B, S - W, heads, D) -> heads in front again, and contiguous.
    layer.keys, layer.values = (
        states.transpose(1, 2)[index[:, None].to(states.device), source.to(states.device)].transpose(1, 2).contiguous()
        for states in (layer.keys, layer.values)
    )
