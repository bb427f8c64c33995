"""Which micro-batches a process gets over a whole run.

Knows lengths of samples, epochs, processes and accumulation. Does not know what a sample is.

An optimizer step takes one round of `processes x accumulation` batches, which the token-bucket sampler makes of one
cost. How the round is split between processes and accumulation does not matter: two processes do in a step what one
does with twice the accumulation, and a position in a run is a number of steps.
"""

from collections.abc import Iterator, Sequence
from typing import Any

from torch.utils.data import Sampler

from mllm.data.batching import Lengths, SampleKey, TokenBucketBatchSampler


class RoundBatches(Sampler[list[SampleKey]]):
    """Batch sampler of one process. It goes on for ever and has no length: the trainer counts steps.

    Args:
        lengths: tokens of each sample.
        limits: `max_tokens`, `max_rows` and `seed`, see `TokenBucketBatchSampler`.
        accumulation: micro-batches of this process per step.
        process_index, num_processes: this process among all.

    Raises:
        ValueError: a sample that no batch can hold.
    """

    def __init__(
        self,
        lengths: Sequence[int] | Lengths,
        *,
        accumulation: int = 1,
        process_index: int = 0,
        num_processes: int = 1,
        **limits: Any,
    ) -> None:
        self.process_index, self.num_processes = process_index, num_processes
        self.batches = TokenBucketBatchSampler(
            lengths, num_processes=num_processes * accumulation, endless=True, **limits
        )

    def __iter__(self) -> Iterator[list[SampleKey]]:
        for epoch, lanes in self.batches.global_steps():
            for batch in lanes[self.process_index :: self.num_processes]:
                yield [SampleKey(epoch, index) for index in batch]

    def steps(self, epochs: int) -> int:
        """Optimizer steps of so many epochs."""
        return sum(self.batches.num_steps(epoch) for epoch in range(epochs))
