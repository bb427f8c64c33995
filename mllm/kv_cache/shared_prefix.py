"""Prompts that begin alike are read once: rows that ask different questions about the same media share their beginning.

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
    """Which rows begin alike.

    Args:
        rows: ids of every row, without padding.
        keys: rows of different keys are never together; None is together with nobody.

    Returns:
        The group of every row, in order of appearance; and how many ids all rows of a group begin with.
    """
    places: dict[Hashable, int] = {}
    index = [places.setdefault((row,) if key is None else (None, key), len(places)) for row, key in enumerate(keys)]
    groups: list[list[Sequence[int]]] = [[] for _ in places]
    for place, row in zip(index, rows, strict=True):
        groups[place].append(row)
    return index, [num_common(group) for group in groups]


def num_common(rows: Sequence[Sequence[int]]) -> int:
    """How many ids all rows begin with."""
    limit = min(map(len, rows))
    own = [tuple(row[:limit]) for row in rows]
    first, last = min(own), max(own)  # whatever differs anywhere differs between these two
    return next((place for place in range(limit) if first[place] != last[place]), limit)


@dataclass(frozen=True)
class Prefixes:
    """Where the rows of a batch, padded on the left, find their shared beginnings.

    Args:
        index: (B,) group of each row. lengths: (G,) tokens its rows begin with alike.
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
    def num_own(self) -> int:
        """W: positions at the end that every row reads for itself; at least the last, which gives the first logits."""
        return max(int((self.row_lengths - self.lengths[self.index]).max()), 1)

    def on_rows(self, embeds: Tensor, text_embeds: Tensor) -> Tensor:
        """Embeddings of all rows: beginnings from the first rows of their groups, the rest from the text.

        Args:
            embeds: (G, S, H) of the first rows. text_embeds: (B, S, H).
        """
        size = text_embeds.shape[1]
        starts = size - self.row_lengths
        places = torch.arange(size, device=starts.device) - starts[:, None]  # of every token in its prompt
        is_shared = (places >= 0) & (places < self.lengths[self.index][:, None])
        source = (places + starts[self.first_rows][self.index][:, None]).clamp(0, size - 1)
        return torch.where(is_shared[..., None], embeds[self.index[:, None], source], text_embeds)

    def read(self, model: Any, embeds: Tensor, *, constant: Any = None, **row_inputs: Tensor | None) -> DynamicCache:
        """Read every beginning once.

        Args:
            model: takes embeddings, a mask, positions and a cache.
            embeds: (G, S, H) of the first rows.
            constant: text all beginnings begin with, which is not read again; see `mllm.kv_cache.system_prompt`.
            row_inputs: (B,) what else the model takes per row, the same within a group.

        Returns:
            A cache of S - W positions for B rows. Its layers keep everything, also those of a sliding window.
        """
        size, first = embeds.shape[1], self.first_rows
        kept = self.row_lengths - self.num_own
        counts = torch.zeros_like(self.lengths).scatter_reduce(0, self.index, kept, "amax").clamp(min=1)
        width = int(counts.max())
        # Beginnings padded on the left: (G, P) places in the prompts, and in the rows they are taken from.
        places = torch.arange(width, device=embeds.device) - (width - counts)[:, None]
        source = (places + (size - self.row_lengths[first])[:, None]).clamp(min=0)
        mask = (places >= 0).to(self.attention_mask.dtype)
        own_inputs = {key: value if value is None else value[first] for key, value in row_inputs.items()}
        cache = DynamicCache() if constant is None else constant.on_rows(model, mask, **own_inputs)
        left = slice(cache.get_seq_length(), None)
        model(
            inputs_embeds=embeds.gather(1, source[:, left, None].expand(-1, -1, embeds.shape[2])),
            attention_mask=mask,
            position_ids=places.clamp(min=0)[:, left],
            use_cache=True,
            logits_to_keep=1,
            **cache_argument(cache),
            **own_inputs,
        )
        return self.hand_out(cache, counts)

    def hand_out(self, cache: DynamicCache, counts: Tensor) -> DynamicCache:
        """The cache of G beginnings, padded on the left, as one of S - W positions for B rows, in place.

        Args:
            counts: (G,) tokens of each beginning.
        """
        width = cache.get_seq_length()
        num_cached = self.attention_mask.shape[1] - self.num_own
        kept = self.row_lengths - self.num_own
        shift = torch.arange(num_cached, device=counts.device) - (num_cached - kept)[:, None]
        places = (shift + (width - counts)[self.index][:, None]).clamp(0, width - 1)
        for layer in cache.layers:
            _hand_out(layer, self.index, places)
        return cache


def _hand_out(layer: Any, index: Tensor, places: Tensor) -> None:
    """One layer's cache of G beginnings, given to B rows: position p of row b is position `places[b, p]` of its own."""
    assert type(layer) is DynamicLayer
    assert layer.keys is not None
    assert layer.values is not None
    # (G, heads, P, D) -> (B, S - W, heads, D) -> heads in front again, and contiguous.
    layer.keys, layer.values = (
        states.transpose(1, 2)[index[:, None].to(states.device), places.to(states.device)].transpose(1, 2).contiguous()
        for states in (layer.keys, layer.values)
    )
