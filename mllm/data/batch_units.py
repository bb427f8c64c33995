"""What is dealt out to processes: samples, or groups of samples that stay together.

Knows costs of samples. Does not know batches, processes or what a cost is made of.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np


@dataclass(frozen=True)
class Units:
    """U units: G groups of samples first, and behind them each of the N samples alone.

    Args:
        flat: (F,) samples of all units in turn. bounds: (U + 1,) where those of each unit begin.
        longest: (U,) tokens of the longest sample of each.
        costs: (K, U) what each costs at the K budgets at which processes should agree.
        kinds: (U,) units of one kind hold as many samples, of the same kinds.
        dealt: the units that hold every sample once: the groups, and who is in none.
    """

    flat: np.ndarray
    bounds: np.ndarray
    longest: np.ndarray
    costs: np.ndarray
    kinds: np.ndarray
    dealt: np.ndarray

    @classmethod
    def of(cls, costs: np.ndarray, kinds: np.ndarray, groups: Sequence[Sequence[int]] = ()) -> "Units":
        """Units of N samples.

        Args:
            costs: (K, N), the largest first. kinds: (N,). groups: of one sample or more; no two share a sample.
        """
        together = [list(group) for group in groups if len(group) > 1]
        alone = np.arange(len(kinds))
        flat = np.array([index for group in together for index in group], np.int64)
        in_none = np.setdiff1d(alone, flat)
        flat = np.concatenate([flat, alone])
        sizes = np.concatenate([np.array([len(group) for group in together], np.int64), np.ones_like(alone)])
        bounds = np.concatenate([[0], sizes.cumsum()])
        if not together:  # a large data set: nothing of it is looked at one by one
            return cls(flat, bounds, costs[0], costs, kinds, alone)
        names: dict[tuple[int, ...], int] = {}
        own = [tuple(sorted(kinds[group].tolist())) for group in together] + [(kind,) for kind in kinds.tolist()]
        return cls(
            flat=flat,
            bounds=bounds,
            longest=np.maximum.reduceat(costs[0, flat], bounds[:-1]),
            costs=np.add.reduceat(costs[:, flat], bounds[:-1], axis=1),
            kinds=np.array([names.setdefault(kind, len(names)) for kind in own]),
            dealt=np.concatenate([np.arange(len(together)), len(together) + in_none]),
        )

    @cached_property
    def rows(self) -> np.ndarray:
        """(U,) samples of each."""
        return np.diff(self.bounds)

    @cached_property
    def padded(self) -> np.ndarray:
        """(U,) tokens of each, all its samples padded to the longest."""
        return self.rows * self.longest

    def samples(self, units: Sequence[int]) -> list[int]:
        """The samples of some units."""
        return [index for unit in units for index in self.flat[self.bounds[unit] : self.bounds[unit + 1]].tolist()]

    def alone(self, units: np.ndarray) -> np.ndarray:
        """The units of one sample that hold what some units hold."""
        num_groups = len(self.rows) - len(np.unique(self.flat))
        return np.array(self.samples(units.tolist()), np.int64) + num_groups
