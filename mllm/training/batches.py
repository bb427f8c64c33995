"""Which micro-batches a process gets over a whole run.

Knows lengths of samples, epochs, processes and accumulation. Does not know what a sample is.

An optimizer step takes one round of `processes x accumulation` batches, which the token-bucket sampler makes of similar
cost. How the round is split between processes and accumulation does not matter: two processes do in a step what one
does with twice the accumulation, and a position in a run is a number of steps.
"""

from collections.abc import Iterator, Sequence

from torch.utils.data import Sampler

from mllm.data.batching import SampleKey, TokenBucketBatchSampler


class RoundBatches(Sampler[list[SampleKey]]):
    """Batch sampler of one process. It goes on for ever and has no length: the trainer counts steps.

    Args:
        lengths: tokens of each sample.
        max_tokens, max_rows, seed: see `TokenBucketBatchSampler`.
        accumulation: micro-batches of this process per step.
        process_index, num_processes: this process among all.
        groups: of each sample its number; a step then takes samples of one group only.

    Raises:
        ValueError: a sample that no batch can hold.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        *,
        max_tokens: int,
        max_rows: int | None = None,
        seed: int = 0,
        accumulation: int = 1,
        process_index: int = 0,
        num_processes: int = 1,
        groups: Sequence[int] | None = None,
    ) -> None:
        self.lanes = [
            TokenBucketBatchSampler(
                lengths,
                max_tokens=max_tokens,
                max_rows=max_rows,
                seed=seed,
                process_index=lane,
                num_processes=num_processes * accumulation,
                endless=True,
            )
            for lane in range(process_index, num_processes * accumulation, num_processes)
        ]
        for lane in self.lanes if groups is not None else ():
            lane.keep_apart(groups or ())

    def __iter__(self) -> Iterator[list[SampleKey]]:
        for batches in zip(*self.lanes, strict=True):
            yield from batches

    def steps(self, epochs: int) -> int:
        """Optimizer steps of so many epochs."""
        return sum(len(self.lanes[0].batches(epoch)) for epoch in range(epochs))
