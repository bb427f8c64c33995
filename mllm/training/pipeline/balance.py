"""Simulates how evenly a run's batches load its processes, by going through them without a model.

Knows samples by what their headers say, a run's config and its sampled budgets. Does not know weights or time: a cost
is a number of tokens, all soft and text tokens of all sampled budgets of a step.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from mllm.budget import Budget
from mllm.budget.sampler import BudgetSampler
from mllm.config.run import RunConfig
from mllm.data.manifest import Sample
from mllm.processing.processor import ElasticProcessor
from mllm.training.pipeline.batches import RankSlots
from mllm.training.pipeline.loaders import rank_batches
from mllm.training.pipeline.token_scan import SampleTokens, measure_samples, scan_of

AS_SAMPLED = "as sampled"


@dataclass
class RankLoad:
    """Counts tokens of every rank in every step, as they are and with rows padded to the longest of a micro-batch."""

    tokens: list[list[int]] = field(default_factory=list)
    padded: list[list[int]] = field(default_factory=list)

    def add(self, costs: np.ndarray, batches: Sequence[Sequence[int]], num_ranks: int) -> None:
        """Add one step: the cost of each sample, the samples of each micro-batch; batch i is of rank i mod ranks."""
        batch_costs = [costs[list(batch)] for batch in batches]
        for sums, values in (
            (self.tokens, [int(costs.sum()) for costs in batch_costs]),
            (self.padded, [len(costs) * int(costs.max()) for costs in batch_costs]),
        ):
            sums.append([sum(values[rank::num_ranks]) for rank in range(num_ranks)])

    def facts(self) -> dict[str, object]:
        """Summarise the load: `imbalance` is the time a step takes (its fullest rank) over what it would take if
        all ranks had the same, over the epoch; `worst` that of the worst step; `padded_*` the same with padding."""
        out: dict[str, object] = {"tokens_per_rank": np.sum(self.tokens, axis=0).tolist()}
        for prefix, values in (("", np.array(self.tokens)), ("padded_", np.array(self.padded))):
            means = values.mean(axis=1)
            out[f"{prefix}imbalance"] = round(float(values.max(axis=1).sum() / means.sum()), 4)
            out[f"{prefix}worst"] = round(float((values.max(axis=1) / means).max()), 4)
        out["mean_tokens"] = round(float(np.mean(self.tokens)), 1)
        out["padding"] = round(1 - float(np.sum(self.tokens) / np.sum(self.padded)), 4)
        return out


def simulate(
    samples: Sequence[Sample],
    processor: ElasticProcessor,
    sampler: BudgetSampler,
    *,
    config: RunConfig,
    num_ranks: int,
    epochs: int,
    budgets: Sequence[Budget],
) -> Mapping[str, RankLoad]:
    """Go through the steps of some epochs.

    Returns:
        By name: `as sampled`, every step at its own budgets, which are the same on all ranks, and each budget alone.

    Raises:
        ValueError: samples that a run would refuse, see `TokenScan.check`.
    """
    space, data = processor.space, config.data
    measured = measure_samples(samples, processor, data.max_sample_tokens, data.host_answer_tokens or 0)
    scan = scan_of(samples, measured, space)
    scan.check(
        samples,
        tokens_per_batch=data.tokens_per_batch,
        max_unsupervised_fraction=data.max_unsupervised_fraction,
    )
    slots = RankSlots(num_ranks=num_ranks, accumulation=config.train.accumulation)
    batches = rank_batches(samples, scan, config=data, seed=config.train.seed, slots=slots)
    fixed = {str(budget): np.array([one.tokens(budget, space) for one in measured]) for budget in budgets}
    loads = {AS_SAMPLED: RankLoad(), **{name: RankLoad() for name in fixed}}
    for step, (epoch, in_step) in enumerate(batches.batches.global_steps()):
        if epoch >= epochs:
            break
        sampled = np.zeros(len(samples), np.int64)
        for index in (index for batch in in_step for index in batch):
            sampled[index] = sampled_tokens(measured[index], sampler, step)
        loads[AS_SAMPLED].add(sampled, in_step, num_ranks)
        for name, costs in fixed.items():
            loads[name].add(costs, in_step, num_ranks)
    return loads


def sampled_tokens(one: SampleTokens, sampler: BudgetSampler, step: int) -> int:
    """Count tokens, soft and text, of all views of a sample in a step."""
    media = {extent.medium for extent in one.extents}
    return sum(one.tokens(sampled.budget, sampler.space) for sampled in sampler(step, media))
