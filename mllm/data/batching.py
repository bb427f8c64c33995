"""Fills batches by tokens, not by count: says which samples go together, on which process, in which order.

Knows lengths, a seed and how many processes share the work. Does not know samples, media, budgets or models: a length
is whatever the caller reckons a sample costs, in tokens.

A batch is a list of `SampleKey`s. The epoch travels in the key, since data loader workers that live longer than an
epoch never hear of a `set_epoch` on a data set.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from torch.utils.data import Sampler

from mllm.data.balanced_batches import assign, fill_global_steps
from mllm.data.batch_groups import BatchGroups
from mllm.utils.random_generator import random_generator


class SampleKey(NamedTuple):
    """Names a sample and the epoch it is loaded in, which augmentation depends on."""

    epoch: int
    index: int


class Lengths(NamedTuple):
    """Holds the cost of each sample in tokens, which may be more than one number.

    Args:
        largest: what fills batches.
        smallest: at the smallest budget; processes then agree there too.
        kinds: a number per sample; samples of different numbers do not share a step.
        groups: samples that stay together in one batch, each group within its limits; only groups of as many samples
            share a step. Fewer groups than processes may be left over at the end and are then parted.
    """

    largest: Sequence[int]
    smallest: Sequence[int]
    kinds: Sequence[int] | None = None
    groups: Sequence[Sequence[int]] = ()


class TokenBucketBatchSampler(Sampler[list[SampleKey]]):
    """Makes batches of similar length whose padded size, rows x longest, stays within `max_tokens`.

    The batches of an epoch are a function of seed and epoch. Every process gets the same number of them, of about the
    same cost within a step (see `balanced_batches.py`), and every sample is in exactly one batch of one process. Where
    the count does not come out even, batches of some steps hold one row more or fewer. Only when all of them hold one
    row (or one group) is that impossible; then the last step repeats earlier batches on some processes, and
    `num_repeated` says how many of this process's last batches are such.

    Iterating changes nothing: a sampler starts where `set_epoch` or `seek` put it. The number of batches may differ a
    little from epoch to epoch.

    Args:
        lengths: cost of each sample in tokens, at least 1.
        max_tokens: most tokens of a batch, padding included.
        max_rows: most samples of a batch.
        seed: of the order.
        process_index: which share of each step is ours.
        num_processes: how many processes share each step.
        shuffle: False keeps the order of the samples (and pads more, and halves batches where the count is uneven).
        endless: go on with the next epoch; the sampler then has no length.

    Raises:
        ValueError: no samples, a sample that no batch can hold (with its index), or arguments that make no sense.
    """

    def __init__(
        self,
        lengths: Sequence[int] | Lengths,
        *,
        max_tokens: int,
        max_rows: int | None = None,
        seed: int = 0,
        process_index: int = 0,
        num_processes: int = 1,
        shuffle: bool = True,
        endless: bool = False,
    ) -> None:
        of_samples = lengths if isinstance(lengths, Lengths) else Lengths(lengths, lengths)
        self.lengths = np.asarray(of_samples.largest, dtype=np.int64)
        costs = np.stack([self.lengths, np.asarray(of_samples.smallest, np.int64)])
        kinds = (
            np.zeros(len(self.lengths), np.int64)
            if of_samples.kinds is None
            else np.asarray(of_samples.kinds, np.int64)
        )
        self.groups = BatchGroups.of(costs, kinds, of_samples.groups)
        self.max_tokens = max_tokens
        self.max_rows = max_rows
        self.seed = seed
        self.process_index = process_index
        self.num_processes = num_processes
        self.shuffle = shuffle
        self.endless = endless
        self._start = (0, 0)
        self._planned: tuple[int, list[np.ndarray] | list[list[list[int]]], int] | None = None
        self._check()

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
        assert self.groups.padded_tokens.max() <= self.max_tokens, "groups fit a batch"
        assert self.groups.rows.max() <= (self.max_rows or self.groups.rows.max())
        assert self.shuffle or not len(self.groups.covering) < len(self.lengths), (
            "groups are assigned in shuffled order"
        )

    def set_epoch(self, epoch: int, position: int = 0) -> None:
        """Start the next iteration in this epoch, leaving out its first `position` batches of this process."""
        if epoch < 0 or not 0 <= position <= self.num_steps(epoch):
            raise ValueError(f"there is no batch {position} in epoch {epoch}")
        self._start = (epoch, position)

    def seek(self, num_batches: int) -> None:
        """Start the next iteration after so many batches of this process, counted from the start of epoch 0.

        This is how a run resumes: what a data loader has fetched ahead and not yet trained on does not count.
        """
        if num_batches < 0:
            raise ValueError(f"num_batches must be at least 0, got {num_batches}")
        epoch = 0
        while num_batches >= (count := self.num_steps(epoch)):
            num_batches -= count
            epoch += 1
        self.set_epoch(epoch, num_batches)

    def __iter__(self) -> Iterator[list[SampleKey]]:
        for epoch, batches in self.global_steps():
            yield [SampleKey(epoch, index) for index in batches[self.process_index]]

    def global_steps(self) -> Iterator[tuple[int, list[list[int]]]]:
        """Yield, from where the next iteration starts, the epoch and the batch of every process in a global step."""
        epoch, position = self._start
        while True:
            planned, num_repeated = self._plan(epoch)
            for number in range(position, len(planned)):
                yield epoch, self._assigned(planned[number], num_repeated if number + 1 == len(planned) else 0)
            if not self.endless:
                return
            epoch, position = epoch + 1, 0

    def __len__(self) -> int:
        """Count the batches of this process that the next iteration gives; TypeError when it is endless."""
        if self.endless:
            raise TypeError("an endless sampler has no length")
        epoch, position = self._start
        return self.num_steps(epoch) - position

    def num_steps(self, epoch: int) -> int:
        """Count the global steps of an epoch, in each of which every process has one batch."""
        return len(self._plan(epoch)[0])

    @property
    def num_repeated(self) -> int:
        """Count the last batches of this process (0 or 1) that repeat another's, in the epoch that comes next."""
        return int(self.process_index >= self.num_processes - self._plan(self._start[0])[1])

    def _plan(self, epoch: int) -> tuple[list[np.ndarray] | list[list[list[int]]], int]:
        """Plan the steps of an epoch, and how many batches of the last one are repeated ones."""
        if self._planned is None or self._planned[0] != epoch:
            steps, num_repeated = self._shuffled(epoch) if self.shuffle else self._in_order()
            self._planned = (epoch, steps, num_repeated)
        return self._planned[1], self._planned[2]

    def _shuffled(self, epoch: int) -> tuple[list[np.ndarray], int]:
        """Plan groups by step; which process gets which is decided when a step's turn comes."""
        rng = random_generator(self.seed, epoch, "", "batches")
        limits = {"max_tokens": self.max_tokens, "max_rows": self.max_rows}
        order = self.groups.covering[rng.permutation(len(self.groups.covering))]
        steps, rest = fill_global_steps(self.groups, order, num_slots=self.num_processes, **limits)
        steps = [steps[number] for number in rng.permutation(len(steps))]
        if not len(rest):
            return steps, 0
        repeated = np.resize(np.concatenate([*steps, rest]), self.num_processes - len(rest))
        return [*steps, np.concatenate([rest, repeated])], len(repeated)

    def _assigned(self, planned: np.ndarray | list[list[int]], num_repeated: int) -> list[list[int]]:
        """Return the samples of every process in a planned step."""
        if isinstance(planned, list):  # batches in the order of the samples are planned whole
            return planned
        if num_repeated:
            slots = [[group] for group in planned.tolist()]  # in order: the repeated ones last
        else:
            slots = assign(planned, self.groups.costs, self.num_processes)
        return [self.groups.samples(slot) for slot in slots]

    def _in_order(self) -> tuple[list[list[list[int]]], int]:
        """Plan steps that keep the order of the samples; the last one repeats the first batches where it is short."""
        batches = _split_to_multiple(self._fill(), self.num_processes)
        num_repeated = -len(batches) % self.num_processes
        batches += [batches[number % len(batches)] for number in range(num_repeated)]
        return [batches[i : i + self.num_processes] for i in range(0, len(batches), self.num_processes)], num_repeated

    def _fill(self) -> list[list[int]]:
        """Cut the samples into batches, each as long as the limits allow."""
        batches: list[list[int]] = []
        longest = 0
        for index, length in enumerate(self.lengths.tolist()):
            longest = max(longest, length)
            if batches and (len(batches[-1]) + 1) * longest <= self.max_tokens and len(batches[-1]) != self.max_rows:
                batches[-1].append(index)
            else:
                batches.append([index])
                longest = length
        return batches


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
