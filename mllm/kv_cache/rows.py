"""Keeps what the LLM has read of each row apart, so that rows join a batch and leave it and nothing is read again.

Knows key-value caches and padding. Does not know ids, media or who the rows belong to.

Shapes: B rows, S positions of a batch, L tokens of one row, G key-value heads, D size of a head.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers import DynamicCache

from mllm.kv_cache.beam import spread


@dataclass(frozen=True)
class RowCache:
    """Keys and values of one row: of every layer a pair, each (G, L, D), without padding.

    They may be views of a batch, which stays in memory as long as they do.
    """

    layers: tuple[tuple[Tensor, Tensor], ...]

    @property
    def num_tokens(self) -> int:
        """L: tokens of the row that have been read."""
        return self.layers[0][0].shape[1] if self.layers else 0


def row_of(cache: DynamicCache, number: int, *, num_padding: int, num_tokens: int) -> RowCache:
    """Takes one row out of a batch's cache.

    Args:
        num_padding: positions before its first token.
        num_tokens: L; what stands behind them is left out.
    """
    positions = slice(num_padding, num_padding + num_tokens)
    return RowCache(
        tuple((keys[number, :, positions], values[number, :, positions]) for keys, values in _states(cache))
    )


def stack_rows(rows: Sequence[RowCache]) -> DynamicCache:
    """Puts rows together as a batch (B, G, S, D) padded on the left, S being the longest of them.

    Its layers have room for new tokens, which are then written in place (see `mllm.kv_cache.beam`).
    """
    longest = max(row.num_tokens for row in rows)
    template = max(rows, key=lambda row: row.num_tokens).layers  # a row of which nothing was read has no layers
    cache = DynamicCache()
    for number, (keys, values) in enumerate(template):
        # Padding is zero and not merely reserved: attention multiplies it by a weight of 0, which a NaN would survive.
        stacked = [states.new_zeros(len(rows), states.shape[0], longest, states.shape[2]) for states in (keys, values)]
        for index, row in enumerate(rows):
            for batch, states in zip(stacked, row.layers[number] if row.layers else (), strict=bool(row.layers)):
                batch[index, :, longest - row.num_tokens :] = states
        cache.update(stacked[0], stacked[1], number)
    return spread(cache, 1)


def _states(cache: DynamicCache) -> list[tuple[Tensor, Tensor]]:
    """The keys and values (B, G, S, D) of every layer."""
    layers: Any = cache.layers
    return [(layer.keys, layer.values) for layer in layers]


def split_by_length(lengths: Sequence[int], *, call_tokens: int) -> list[list[int]]:
    """Splits rows into groups of like lengths, so that they take the least time to read when each group is padded.

    Args:
        lengths: tokens of every row.
        call_tokens: how many tokens may be read in the time that one more call of the LLM takes.

    Returns:
        The numbers of the rows of every group, shorter rows first.
    """
    order = sorted(range(len(lengths)), key=lambda number: lengths[number])
    # cheapest[n]: tokens that the n shortest rows take at best, and where the last of their groups begins.
    cheapest = [(0, 0)]
    for end in range(1, len(order) + 1):
        longest = lengths[order[end - 1]]
        cheapest.append(
            min((cheapest[start][0] + call_tokens + (end - start) * longest, start) for start in range(end))
        )
    groups: list[list[int]] = []
    end = len(order)
    while end:
        start = cheapest[end][1]
        groups.insert(0, order[start:end])
        end = start
    return groups
