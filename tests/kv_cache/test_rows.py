"""Rows are taken out of a batch and put together again unchanged, and are grouped so that little is padded."""

import itertools
import random

import torch
from transformers import DynamicCache

from mllm.kv_cache.rows import row_of, split_by_length, stack_rows

NUM_LAYERS, NUM_HEADS, HEAD_SIZE = 2, 3, 4


def cache_of(num_rows: int, num_tokens: int, seed: int) -> DynamicCache:
    """Make a cache of random keys and values."""
    generator = torch.Generator().manual_seed(seed)
    cache = DynamicCache()
    for layer in range(NUM_LAYERS):
        shape = (num_rows, NUM_HEADS, num_tokens, HEAD_SIZE)
        cache.update(torch.randn(shape, generator=generator), torch.randn(shape, generator=generator), layer)
    return cache


def test_rows_of_two_batches_are_one_batch() -> None:
    first, second = cache_of(2, 5, seed=1), cache_of(1, 8, seed=2)
    rows = [
        row_of(first, 1, num_padding=2, num_tokens=3),
        row_of(second, 0, num_padding=0, num_tokens=7),
        row_of(first, 0, num_padding=0, num_tokens=4),
    ]
    assert [row.num_tokens for row in rows] == [3, 7, 4]
    stacked = stack_rows(rows)
    assert stacked.get_seq_length() == 7
    for layer, of_first, of_second in zip(stacked.layers, first.layers, second.layers, strict=True):
        assert layer.keys.shape == (3, NUM_HEADS, 7, HEAD_SIZE)
        assert torch.equal(layer.keys[0, :, 4:], of_first.keys[1, :, 2:])
        assert torch.equal(layer.values[1], of_second.values[0, :, :7])
        assert torch.equal(layer.values[2, :, 3:], of_first.values[0, :, :4])
        assert not layer.keys[0, :, :4].any()


def test_a_row_of_one_token_has_nothing_before_it() -> None:
    unread = row_of(DynamicCache(), 0, num_padding=0, num_tokens=0)
    stacked = stack_rows([unread, row_of(cache_of(1, 3, seed=4), 0, num_padding=0, num_tokens=3)])
    assert unread.num_tokens == 0
    assert not stacked.layers[0].keys[0].any()
    assert stack_rows([unread, unread]).get_seq_length() == 0


def test_what_is_written_behind_a_batch_is_part_of_its_rows() -> None:
    stacked = stack_rows([row_of(cache_of(1, size, seed=size), 0, num_padding=0, num_tokens=size) for size in (2, 5)])
    new = torch.ones(2, NUM_HEADS, 1, HEAD_SIZE)
    for layer in range(NUM_LAYERS):
        stacked.update(new, 2 * new, layer)
    row = row_of(stacked, 0, num_padding=3, num_tokens=3)
    for keys, values in row.layers:
        assert torch.equal(keys[:, -1:], new[0])
        assert torch.equal(values[:, -1:], 2 * new[0])


def test_groups_of_like_lengths_take_the_fewest_tokens() -> None:
    def tokens_of(lengths: list[int], groups: list[list[int]], call_tokens: int) -> int:
        return sum(call_tokens + len(group) * max(lengths[number] for number in group) for group in groups)

    rng = random.Random(0)
    for _ in range(30):
        lengths = [rng.choice([5, 6, 7, 40, 41, 90]) + rng.randrange(3) for _ in range(rng.randrange(1, 7))]
        call_tokens = rng.choice([1, 20, 200])
        groups = split_by_length(lengths, call_tokens=call_tokens)
        assert sorted(number for group in groups for number in group) == list(range(len(lengths)))
        best = (
            min(
                tokens_of(
                    lengths,
                    [[n for n, label in enumerate(labels) if label == group] for group in set(labels)],
                    call_tokens,
                )
                for labels in itertools.product(range(len(lengths)), repeat=len(lengths))
            )
            if len(lengths) < 6
            else None
        )
        assert best is None or tokens_of(lengths, groups, call_tokens) == best
    assert split_by_length([], call_tokens=9) == []
