"""Batches by tokens: within the limit, every sample once, the same on every process, resumable anywhere."""

import itertools
from collections import Counter

import numpy as np
import pytest
from torch.utils.data import DataLoader

from mllm.data.batching import Lengths, SampleKey, TokenBucketBatchSampler

LENGTHS = np.random.default_rng(0).integers(1, 200, 500).tolist()


def epoch_of(epoch: int, **settings) -> list[list[list[int]]]:
    """Return the batches of each process in an epoch."""
    processes = settings.get("num_processes", 1)
    samplers = [TokenBucketBatchSampler(**(settings | {"process_index": index})) for index in range(processes)]
    for sampler in samplers:
        sampler.set_epoch(epoch)
    return [[[key.index for key in batch] for batch in sampler] for sampler in samplers]


@pytest.mark.parametrize("num_processes", [1, 2, 3, 8])
@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("max_rows", [None, 4])
def test_every_sample_is_in_one_batch_of_one_process(num_processes: int, shuffle: bool, max_rows: int | None) -> None:
    batches = epoch_of(
        3, lengths=LENGTHS, max_tokens=800, max_rows=max_rows, num_processes=num_processes, shuffle=shuffle
    )
    assert len({len(of_process) for of_process in batches}) == 1
    flat = [batch for of_process in batches for batch in of_process]
    assert sorted(itertools.chain(*flat)) == list(range(500))
    assert all(len(batch) * max(LENGTHS[index] for index in batch) <= 800 for batch in flat)
    assert all(len(batch) <= (max_rows or 800) for batch in flat)


def test_shuffled_batches_pad_little_and_are_full() -> None:
    (batches,) = epoch_of(0, lengths=LENGTHS, max_tokens=2_000)
    padded = sum(len(batch) * max(LENGTHS[index] for index in batch) for batch in batches)
    assert padded < 1.1 * sum(LENGTHS)
    assert padded > 0.8 * 2_000 * len(batches)
    (in_order,) = epoch_of(0, lengths=LENGTHS, max_tokens=2_000, shuffle=False)
    assert list(itertools.chain(*in_order)) == list(range(500))
    assert len(in_order) > len(batches)


def clips(count: int, rng: np.random.Generator) -> list[np.ndarray]:
    """Return the tokens of audio-visual clips of 0.5 to 6 seconds in three tasks, at the four pairs of rates of the
    papers.
    """
    seconds, kind = np.clip(rng.lognormal(0.75, 0.6, count), 0.5, 6), rng.integers(0, 3, count)
    text = 12 + np.maximum(1, 3.2 * seconds + rng.normal(0, 1, count)).astype(int)
    audio_frames = np.where(kind != 1, seconds * 50, 0).astype(int)
    video_frames = np.where(kind != 0, seconds * 25, 0).astype(int)
    rates = ((4, 2), (4, 5), (16, 2), (16, 5))
    return [text + audio_frames // audio + video_frames // video for audio, video in rates]


def conversations(count: int, rng: np.random.Generator) -> tuple[list[np.ndarray], np.ndarray]:
    """Return the tokens of image conversations with a long tail, and longer ones without an image, at 576 to 1
    tokens.
    """
    text, images = np.clip(rng.lognormal(5, 0.8, count), 20, 1_400).astype(int), rng.random(count) > 0.06
    text = np.where(images, text, np.clip(3 * text, 50, 1_900))
    return [text + np.where(images, most, 0) for most in (576, 144, 36, 9, 1)], images.astype(int)


def imbalance(batches: list[list[list[int]]], costs: np.ndarray) -> float:
    """Return the time of an epoch in which every step takes as long as its fullest process, over that of even
    processes.
    """
    sums = np.array([[costs[batch].sum() for batch in of_process] for of_process in batches])
    return sums.max(axis=0).sum() / sums.mean(axis=0).sum()


@pytest.mark.parametrize("num_processes", [2, 8])
def test_processes_cost_the_same_at_every_budget(num_processes: int) -> None:
    settings = {"max_tokens": 4_096, "max_rows": 64, "num_processes": num_processes}
    costs = clips(8_000, np.random.default_rng(0))
    batches = epoch_of(0, lengths=Lengths(costs[0], costs[-1]), **settings)
    assert max(imbalance(batches, at_budget) for at_budget in costs) < 1.05
    costs, kinds = conversations(8_000, np.random.default_rng(0))
    batches = epoch_of(0, lengths=Lengths(costs[0], costs[-1], kinds), **settings)
    assert max(imbalance(batches, at_budget) for at_budget in costs) < 1.05
    assert sorted(itertools.chain(*itertools.chain(*batches))) == list(range(8_000))
    mixed = [step for step in zip(*batches, strict=True) if len({kinds[i] for batch in step for i in batch}) > 1]
    assert len(mixed) <= 1


@pytest.mark.parametrize("case", range(60))
def test_any_lengths_are_assigned_once_and_within_the_limits(case: int) -> None:
    rng = np.random.default_rng(case)
    count, num_processes = int(rng.integers(1, 120)), int(rng.integers(1, 9))
    lengths = np.clip(rng.lognormal(3, 1.2, count), 1, 400).astype(int)
    limits = {"max_tokens": int(lengths.max() * rng.uniform(1, 6)), "max_rows": [None, 1, 2, 7][case % 4]}
    kinds = rng.integers(0, 1 + case % 3, count)
    samples = Lengths(lengths, np.minimum(lengths, 20), kinds)
    batches = epoch_of(case % 5, lengths=samples, num_processes=num_processes, **limits)
    assert len({len(of_process) for of_process in batches}) == 1
    seen = []
    for index, of_process in enumerate(batches):
        sampler = TokenBucketBatchSampler(samples, process_index=index, num_processes=num_processes, **limits)
        sampler.set_epoch(case % 5)
        seen += of_process[: len(of_process) - sampler.num_repeated]
    assert sorted(itertools.chain(*seen)) == list(range(count))
    flat = list(itertools.chain(*batches))
    assert all(1 <= len(batch) <= (limits["max_rows"] or count) for batch in flat)
    assert all(len(batch) * lengths[batch].max() <= limits["max_tokens"] for batch in flat)
    if seen != flat:  # repeated only where no batch could give one of its rows away
        assert all(len(batch) == 1 for batch in flat)


def test_order_is_a_function_of_seed_and_epoch() -> None:
    settings = {"lengths": LENGTHS, "max_tokens": 800}
    assert epoch_of(2, **settings) == epoch_of(2, **settings)
    assert epoch_of(2, **settings) != epoch_of(3, **settings)
    assert epoch_of(2, **settings) != epoch_of(2, seed=1, **settings)
    together = [{tuple(sorted(batch)) for batch in epoch_of(epoch, **settings)[0]} for epoch in (0, 1)]
    assert len(together[0] & together[1]) < 0.1 * len(together[0])


def test_a_step_costs_every_process_about_the_same() -> None:
    first, second = epoch_of(0, lengths=LENGTHS, max_tokens=800, max_rows=6, num_processes=2)
    costs = [[len(batch) * max(LENGTHS[i] for i in batch) for batch in batches] for batches in (first, second)]
    uneven = sum(abs(a - b) for a, b in zip(*costs, strict=True)) / sum(map(sum, costs))
    assert uneven < 0.02
    assert costs[0] != sorted(costs[0])


@pytest.mark.parametrize("done", [0, 1, 17, 60, 61, 200])
def test_resuming_anywhere_gives_the_rest(done: int) -> None:
    settings = {"lengths": LENGTHS, "max_tokens": 800, "num_processes": 2, "process_index": 1, "endless": True}
    straight = list(itertools.islice(TokenBucketBatchSampler(**settings), 260))
    resumed = TokenBucketBatchSampler(**settings)
    resumed.seek(done)
    assert list(itertools.islice(resumed, 260 - done)) == straight[done:]
    assert {key.epoch for batch in straight for key in batch} >= {0, 1, 2}


def test_length_counts_what_is_left_and_endless_has_none() -> None:
    sampler = TokenBucketBatchSampler(LENGTHS, max_tokens=800)
    whole = len(sampler)
    assert whole == len(list(sampler)) == len(list(sampler))
    sampler.set_epoch(0, position=10)
    assert len(sampler) == len(list(sampler)) == whole - 10
    with pytest.raises(TypeError, match="endless"):
        len(TokenBucketBatchSampler(LENGTHS, max_tokens=800, endless=True))


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize(("num_samples", "num_processes"), [(5, 2), (7, 4), (1, 3), (9, 8)])
def test_single_rows_that_do_not_divide_are_repeated_last_and_counted(
    num_samples: int, num_processes: int, shuffle: bool
) -> None:
    settings = {"lengths": [10] * num_samples, "max_tokens": 15, "num_processes": num_processes, "shuffle": shuffle}
    batches = epoch_of(1, **settings)
    assert len({len(of_process) for of_process in batches}) == 1
    seen = []
    for index, of_process in enumerate(batches):
        sampler = TokenBucketBatchSampler(**settings, process_index=index)
        sampler.set_epoch(1)
        seen += of_process[: len(of_process) - sampler.num_repeated]
    assert sorted(itertools.chain(*seen)) == list(range(num_samples))


def test_uneven_batches_are_halved_rather_than_repeated() -> None:
    batches = epoch_of(0, lengths=[10] * 9, max_tokens=30, num_processes=2)
    assert sorted(len(batch) for of_process in batches for batch in of_process) == [1, 2, 3, 3]
    assert TokenBucketBatchSampler([10] * 9, max_tokens=30, num_processes=2).num_repeated == 0


@pytest.mark.parametrize("num_workers", [0, 2])
def test_the_epoch_travels_with_the_sample_through_a_loader(num_workers: int) -> None:
    sampler = TokenBucketBatchSampler([1] * 6, max_tokens=2, endless=True)
    loader = DataLoader(Keys(), batch_sampler=sampler, collate_fn=list, num_workers=num_workers)
    seen = Counter(key for batch in itertools.islice(loader, 6) for key in batch)
    assert seen == Counter(SampleKey(epoch, index) for epoch in (0, 1) for index in range(6))


class Keys:
    """Gives back the key it is asked for."""

    def __len__(self) -> int:
        return 6

    def __getitem__(self, key: SampleKey) -> SampleKey:
        return key


def test_settings_that_make_no_sense() -> None:
    with pytest.raises(ValueError, match="sample 1 costs 31 tokens, allowed are 1 to 30"):
        TokenBucketBatchSampler([5, 31], max_tokens=30)
    with pytest.raises(ValueError, match="sample 2 costs 0 tokens"):
        TokenBucketBatchSampler([5, 5, 0], max_tokens=30)
    with pytest.raises(ValueError, match="no samples"):
        TokenBucketBatchSampler([], max_tokens=30)
    with pytest.raises(ValueError, match="max_rows must be at least 1, got 0"):
        TokenBucketBatchSampler([1], max_tokens=30, max_rows=0)
    with pytest.raises(ValueError, match="process_index must be 0 to 1, got 2"):
        TokenBucketBatchSampler([1], max_tokens=30, process_index=2, num_processes=2)
    with pytest.raises(ValueError, match="no batch 9 in epoch 0"):
        TokenBucketBatchSampler([1], max_tokens=30).set_epoch(0, 9)
    with pytest.raises(ValueError, match="num_batches must be at least 0"):
        TokenBucketBatchSampler([1], max_tokens=30).seek(-1)


@pytest.mark.parametrize("num_processes", [1, 4])
def test_groups_that_are_kept_apart_share_no_step_but_the_last_ones(num_processes: int) -> None:
    groups = [index % 5 == 0 for index in range(len(LENGTHS))]
    settings = {"lengths": Lengths(LENGTHS, LENGTHS, groups), "max_tokens": 800, "max_rows": 6}
    batches = epoch_of(0, num_processes=num_processes, **settings)
    mixed = [len({groups[index] for batch in step for index in batch}) > 1 for step in zip(*batches, strict=True)]
    assert sum(mixed) <= 2
    assert sorted(itertools.chain(*itertools.chain(*batches))) == list(range(len(LENGTHS)))
    assert batches != epoch_of(1, num_processes=num_processes, **settings)
