"""Chooses which micro-batches a process gets over a whole run.

Knows lengths of samples, epochs, processes and accumulation. Does not know what a sample is.

An optimizer step takes `processes x accumulation` batches, which the token-bucket sampler makes of one cost. How they
are split between processes and accumulation does not matter: two processes do in a step what one does with twice the
accumulation, and a position in a run is a number of steps.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import cycle, islice

from torch.utils.data import Sampler

from mllm.data.batching import Lengths, SampleKey, TokenBucketBatchSampler


@dataclass(frozen=True)
class RankSlots:
    """Says which of all processes this one is, and how many micro-batches each takes per optimizer step."""

    rank: int = 0
    num_ranks: int = 1
    accumulation: int = 1


class RankBatches(Sampler[list[SampleKey]]):
    """Batch sampler of one process. It goes on for ever and has no length: the trainer counts steps.

    Args:
        lengths: tokens of each sample.
        slots: this process among all.
        max_tokens, max_rows, seed: see `TokenBucketBatchSampler`.
        num_repeated: the first so many batches of this process come again and again, augmented alike; all of the data
            when None.

    Raises:
        ValueError: a sample that no batch can hold.
    """

    def __init__(
        self,
        lengths: Sequence[int] | Lengths,
        *,
        max_tokens: int,
        max_rows: int | None = None,
        seed: int = 0,
        slots: RankSlots | None = None,
        num_repeated: int | None = None,
    ) -> None:
        self.slots = slots or RankSlots()
        self.num_repeated = num_repeated
        self.batches = TokenBucketBatchSampler(
            lengths,
            num_processes=self.slots.num_ranks * self.slots.accumulation,
            endless=True,
            max_tokens=max_tokens,
            max_rows=max_rows,
            seed=seed,
        )

    def __iter__(self) -> Iterator[list[SampleKey]]:
        if self.num_repeated is None:
            return self._all()
        return cycle(list(islice(self._all(), self.num_repeated)))

    def _all(self) -> Iterator[list[SampleKey]]:
        for epoch, batches in self.batches.global_steps():
            for batch in batches[self.slots.rank :: self.slots.num_ranks]:
                yield [SampleKey(epoch, index) for index in batch]

    def num_tokens(self, batch: Sequence[SampleKey]) -> int:
        """Count the tokens of a batch at the largest budgets, padding left out."""
        return int(sum(self.batches.lengths[key.index] for key in batch))

    def steps(self, epochs: int) -> int:
        """Count optimizer steps of so many epochs."""
        return sum(self.batches.num_steps(epoch) for epoch in range(epochs))
