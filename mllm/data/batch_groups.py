"""Holds batch groups: what is assigned to processes as a whole, single samples or samples that stay together.

Knows costs of samples. Does not know batches, processes or what a cost is made of.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np


@dataclass(frozen=True)
class BatchGroups:
    """Holds G batch groups: first those of several samples, behind them each of the N samples alone.

    So a sample of a group of several stands twice: with the others, and alone for when the group has to be parted.

    Args:
        sample_indices: (F,) samples of all groups in turn.
        bounds: (G + 1,) where those of each group begin.
        longest_tokens: (G,) tokens of the longest sample of each.
        costs: (K, G) what each costs at the K budgets at which processes should agree.
        kinds: (G,) groups of one kind hold as many samples, of the same kinds.
        covering: the groups that hold every sample once: those of several, and the samples that are in none of them.
    """

    sample_indices: np.ndarray
    bounds: np.ndarray
    longest_tokens: np.ndarray
    costs: np.ndarray
    kinds: np.ndarray
    covering: np.ndarray

    @classmethod
    def of(cls, costs: np.ndarray, kinds: np.ndarray, together: Sequence[Sequence[int]] = ()) -> "BatchGroups":
        """Make the batch groups of N samples.

        Args:
            costs: (K, N), the largest first.
            kinds: (N,).
            together: samples that stay together, one or more each; no two of these share a sample.
        """
        shared = [list(samples) for samples in together if len(samples) > 1]
        singles = np.arange(len(kinds))
        in_shared = np.array([index for samples in shared for index in samples], np.int64)
        in_none = np.setdiff1d(singles, in_shared)
        sample_indices = np.concatenate([in_shared, singles])
        sizes = np.concatenate([np.array([len(samples) for samples in shared], np.int64), np.ones_like(singles)])
        bounds = np.concatenate([[0], sizes.cumsum()])
        if not shared:  # a large data set: no sample of it is looked at one by one
            return cls(sample_indices, bounds, costs[0], costs, kinds, singles)
        # A group's kind is the sorted kinds of its samples, so groups that share a step agree in all of them.
        numbers: dict[tuple[int, ...], int] = {}
        kinds_of_each = [tuple(sorted(kinds[samples].tolist())) for samples in shared]
        kinds_of_each += [(kind,) for kind in kinds.tolist()]
        return cls(
            sample_indices=sample_indices,
            bounds=bounds,
            # `reduceat` takes the stretch from each bound to the next, and the last one to the end.
            longest_tokens=np.maximum.reduceat(costs[0, sample_indices], bounds[:-1]),
            costs=np.add.reduceat(costs[:, sample_indices], bounds[:-1], axis=1),
            kinds=np.array([numbers.setdefault(kind, len(numbers)) for kind in kinds_of_each]),
            covering=np.concatenate([np.arange(len(shared)), len(shared) + in_none]),
        )

    @cached_property
    def rows(self) -> np.ndarray:
        """Count the samples of each group, (G,)."""
        return np.diff(self.bounds)

    @cached_property
    def padded_tokens(self) -> np.ndarray:
        """Count the tokens of each group, (G,), all its samples padded to the longest."""
        return self.rows * self.longest_tokens

    def samples(self, groups: Sequence[int]) -> list[int]:
        """List the samples of some groups."""
        bounds = self.bounds
        return [i for group in groups for i in self.sample_indices[bounds[group] : bounds[group + 1]].tolist()]

    def singles(self, groups: np.ndarray) -> np.ndarray:
        """Return the groups of one sample each that hold what some groups hold."""
        num_shared = len(self.rows) - len(np.unique(self.sample_indices))
        return np.array(self.samples(groups.tolist()), np.int64) + num_shared
