"""How evenly a run's batches load its processes, found by going through them without a model.

Knows samples by what their headers say, a run's settings and its draws. Does not know weights or time: a cost is a
number of tokens, all soft and text tokens of all draws of a step.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from mllm.budget import Budget
from mllm.budget.sampler import Sampler
from mllm.config.run import RunConfig
from mllm.data.manifest import Sample
from mllm.processing.processor import ElasticProcessor
from mllm.training.pipeline.loaders import round_batches
from mllm.training.pipeline.token_scan import Looked, look_all, survey_of


@dataclass
class Load:
    """Tokens of every rank in every step, as they are and with rows padded to the longest of their micro-batch."""

    tokens: list[list[int]] = field(default_factory=list)
    padded: list[list[int]] = field(default_factory=list)

    def add(self, costs: np.ndarray, lanes: Sequence[Sequence[int]], num_ranks: int) -> None:
        """One step: the cost of each sample, and the samples of each lane; lane i is of rank i mod ranks."""
        own = [costs[list(batch)] for batch in lanes]
        for sums, values in (
            (self.tokens, [int(batch.sum()) for batch in own]),
            (self.padded, [len(batch) * int(batch.max()) for batch in own]),
        ):
            sums.append([sum(values[rank::num_ranks]) for rank in range(num_ranks)])

    def facts(self) -> dict[str, object]:
        """What is said of a load: `imbalance` is the time a step takes (its fullest rank) over what it would take if
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
    draws: Sampler,
    *,
    settings: RunConfig,
    num_ranks: int,
    epochs: int,
    budgets: Sequence[Budget],
) -> Mapping[str, Load]:
    """Go through the steps of some epochs.

    Returns:
        By name: `as drawn`, every step at its own draws, which are the same on all ranks, and each budget alone.

    Raises:
        ValueError: samples that a run would refuse, see `Survey.check`.
    """
    looked, space, data = look_all(samples, processor, settings.data.max_sample_tokens), processor.space, settings.data
    surveyed = survey_of(samples, looked, space)
    surveyed.check(samples, max_tokens=data.tokens_per_batch, max_unsupervised_fraction=data.max_unsupervised_fraction)
    lanes = {"num_processes": num_ranks, "accumulation": settings.train.accumulation}
    batches = round_batches(samples, surveyed, settings=settings.data, seed=settings.train.seed, lanes=lanes)
    fixed = {str(budget): np.array([one.tokens(budget, space) for one in looked]) for budget in budgets}
    loads = {"as drawn": Load(), **{name: Load() for name in fixed}}
    for step, (epoch, dealt) in enumerate(batches.batches.global_steps()):
        if epoch >= epochs:
            break
        drawn = np.zeros(len(samples), np.int64)
        for index in (index for batch in dealt for index in batch):
            drawn[index] = drawn_tokens(looked[index], draws, step)
        loads["as drawn"].add(drawn, dealt, num_ranks)
        for name, costs in fixed.items():
            loads[name].add(costs, dealt, num_ranks)
    return loads


def drawn_tokens(one: Looked, draws: Sampler, step: int) -> int:
    """Tokens, soft and text, of all passes of a sample in a step."""
    media = {extent.medium for extent in one.extents}
    return sum(one.tokens(draw.budget, draws.space) for draw in draws(step, media))
