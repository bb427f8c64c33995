"""Batches filled by tokens, not by count: which samples go together, on which process, in which order.

Knows lengths, a seed and how many processes share the work. Does not know samples, media, budgets or models: a length
is whatever the caller reckons a sample costs, in tokens.

A batch is a list of `SampleKey`s. The epoch travels in the key, since data loader workers that live longer than an
epoch never hear of a `set_epoch` on a data set.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from torch.utils.data import Sampler

from mllm.transforms import random_generator

POOL_BATCHES = 50
"""Samples are sorted by length within shuffled pools of about this many batches: little padding, yet well mixed."""


class SampleKey(NamedTuple):
    """Which sample, and in which epoch it is drawn (what augmentation depends on)."""

    epoch: int
    index: int


class TokenBucketBatchSampler(Sampler[list[SampleKey]]):
    """Batches of similar length whose padded size, rows x longest, stays within `max_tokens`.

    The batches of an epoch are a function of seed and epoch. Every process gets the same number of them, of similar
    cost within a step, and every sample is in exactly one batch of one process. Where the count does not come out even,
    the largest batches are halved. Only when all of them hold one row is that impossible; then the last step repeats
    earlier batches on some processes, and `num_repeated` says how many of this process's last batches are such.

    Iterating changes nothing: a sampler starts where `set_epoch` or `seek` put it. The number of batches may differ a
    little from epoch to epoch.

    Args:
        lengths: cost of each sample in tokens, at least 1.
        max_tokens: most tokens of a batch, padding included.
        max_rows: most samples of a batch.
        seed: of the order.
        process_index: which share of each step is ours.
        num_processes: how many processes share each step.
        shuffle: False keeps the order of the samples (and pads more).
        endless: go on with the next epoch; the sampler then has no length.

    Raises:
        ValueError: no samples, a sample that no batch can hold (with its index), or settings that make no sense.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        *,
        max_tokens: int,
        max_rows: int | None = None,
        seed: int = 0,
        process_index: int = 0,
        num_processes: int = 1,
        shuffle: bool = True,
        endless: bool = False,
    ) -> None:
        self.lengths = np.asarray(lengths, dtype=np.int64)
        self.max_tokens = max_tokens
        self.max_rows = max_rows
        self.seed = seed
        self.process_index = process_index
        self.num_processes = num_processes
        self.shuffle = shuffle
        self.endless = endless
        self._start = (0, 0)
        self._planned: tuple[int, list[list[int]], int] | None = None
        self._check()
        self._groups = [np.arange(len(self.lengths))]

    def keep_apart(self, groups: Sequence[int]) -> None:
        """Let every step, on all processes, take samples of one group only, but for the last steps of an epoch.

        Args:
            groups: of each sample its number.
        """
        numbers = np.asarray(groups)
        assert len(numbers) == len(self.lengths)
        self._groups = [np.flatnonzero(numbers == number) for number in np.unique(numbers)]
        self._planned = None

    def _check(self) -> None:
        if not len(self.lengths):
            raise ValueError("there are no samples to make batches of")
        if self.max_rows is not None and self.max_rows < 1:
            raise ValueError(f"max_rows must be at least 1, got {self.max_rows}")
        if not 0 <= self.process_index < self.num_processes:
            raise ValueError(f"process_index must be 0 to {self.num_processes - 1}, got {self.process_index}")
        for index in (int(self.lengths.argmax()), int(self.lengths.argmin())):
            if not 1 <= self.lengths[index] <= self.max_tokens:
                raise ValueError(
                    f"sample {index} costs {self.lengths[index]} tokens, allowed are 1 to {self.max_tokens}"
                )

    def set_epoch(self, epoch: int, position: int = 0) -> None:
        """Start the next iteration in this epoch, leaving out its first `position` batches of this process."""
        if epoch < 0 or not 0 <= position <= len(self.batches(epoch)):
            raise ValueError(f"there is no batch {position} in epoch {epoch}")
        self._start = (epoch, position)

    def seek(self, num_batches: int) -> None:
        """Start the next iteration after so many batches of this process, counted from the start of epoch 0.

        This is how a run resumes: what a data loader has fetched ahead and not yet trained on does not count.
        """
        if num_batches < 0:
            raise ValueError(f"num_batches must be at least 0, got {num_batches}")
        epoch = 0
        while num_batches >= (count := len(self.batches(epoch))):
            num_batches -= count
            epoch += 1
        self.set_epoch(epoch, num_batches)

    def __iter__(self) -> Iterator[list[SampleKey]]:
        epoch, position = self._start
        while True:
            for batch in self.batches(epoch)[position:]:
                yield [SampleKey(epoch, index) for index in batch]
            if not self.endless:
                return
            epoch, position = epoch + 1, 0

    def __len__(self) -> int:
        """Batches of this process that the next iteration gives; TypeError when it is endless."""
        if self.endless:
            raise TypeError("an endless sampler has no length")
        epoch, position = self._start
        return len(self.batches(epoch)) - position

    @property
    def num_repeated(self) -> int:
        """How many of this process's last batches (0 or 1) repeat another's, in the epoch that comes next."""
        self.batches(self._start[0])
        assert self._planned is not None
        first_repeated = self.num_processes - self._planned[2]
        return int(self.process_index >= first_repeated)

    def batches(self, epoch: int) -> list[list[int]]:
        """Indices of the samples in each batch of this process in an epoch."""
        if self._planned is None or self._planned[0] != epoch:
            rounds, num_repeated = self._rounds(epoch)
            self._planned = (epoch, [batches[self.process_index] for batches in rounds], num_repeated)
        return self._planned[1]

    def _rounds(self, epoch: int) -> tuple[list[list[list[int]]], int]:
        """One batch for every process per round, and how many batches of the last round are repeated ones."""
        chance = random_generator(self.seed, epoch, "", "batches")
        batches: list[list[int]] = []
        rest: list[list[int]] = []
        for group in self._groups:
            own = _split_to_multiple(self._filled(group, chance), self.num_processes)
            if self.shuffle:
                own.sort(key=lambda batch: (self._cost(batch), batch[0]))
            whole = len(own) - len(own) % self.num_processes
            batches += own[:whole]
            rest += own[whole:]
        batches += rest
        num_repeated = -len(batches) % self.num_processes
        batches += [batches[number % len(batches)] for number in range(num_repeated)]
        rounds = [batches[i : i + self.num_processes] for i in range(0, len(batches), self.num_processes)]
        if self.shuffle:
            last = [rounds.pop()] if num_repeated else []
            rounds = [rounds[number] for number in chance.permutation(len(rounds))] + last
        return rounds, num_repeated

    def _filled(self, group: np.ndarray, chance: np.random.Generator) -> list[list[int]]:
        if not self.shuffle:
            return self._fill(group)
        order = group[chance.permutation(len(group))]
        rows = max(1, int(self.max_tokens / self.lengths[group].mean()))
        pool = POOL_BATCHES * min(rows, self.max_rows or rows)
        pools = [order[start : start + pool] for start in range(0, len(order), pool)]
        by_length = [part[np.argsort(self.lengths[part], kind="stable")] for part in pools]
        return [batch for part in by_length for batch in self._fill(part)]

    def _fill(self, order: np.ndarray) -> list[list[int]]:
        """Cut an order of samples into batches, each as long as the limits allow."""
        batches: list[list[int]] = []
        longest = 0
        for index, length in zip(order.tolist(), self.lengths[order].tolist(), strict=True):
            longest = max(longest, length)
            if batches and (len(batches[-1]) + 1) * longest <= self.max_tokens and len(batches[-1]) != self.max_rows:
                batches[-1].append(index)
            else:
                batches.append([index])
                longest = length
        return batches

    def _cost(self, batch: list[int]) -> int:
        return len(batch) * int(self.lengths[batch].max())


def _split_to_multiple(batches: list[list[int]], num_processes: int) -> list[list[int]]:
    """Halve the batches of most rows, in place, until their number divides evenly or all hold one row."""
    batches = list(batches)
    while len(batches) % num_processes:
        number = max(range(len(batches)), key=lambda i: len(batches[i]))
        batch = batches[number]
        if len(batch) == 1:
            break
        batches[number : number + 1] = [batch[: len(batch) // 2], batch[len(batch) // 2 :]]
    return batches
