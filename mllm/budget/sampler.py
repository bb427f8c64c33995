"""Samples which budgets one optimizer step trains: a pure function of (seed, step), the same on every rank.

Knows a space of budgets. Does not know torch, batches, models or losses.

Modes: `all` trains every combination (M3, Llama-MTSK), `random` samples (MQT-LLaVA, Omni-AVSR), `sandwich` is the
largest as teacher, random ones between, and the smallest (slimmable networks), `points` an explicit list.
"""

import itertools
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

from mllm.budget import NONE, Amount, Budget, MediumSpace, Space

Mode = Literal["all", "random", "sandwich", "points"]


@dataclass(frozen=True)
class SampledBudget:
    """Holds one budget of a step, its weight in the loss, and whether the others learn from its answers."""

    budget: Budget
    weight: float = 1.0
    is_teacher: bool = False


def default_num_budgets(mode: Mode, num_points: int) -> int | None:
    """Return the budgets per step where nobody says how many; `all` has no such number."""
    return {"random": 1, "sandwich": 3, "points": num_points, "all": None}[mode]


@dataclass(frozen=True)
class BudgetSampler:
    """Samples the budgets of a step.

    Args:
        space: what may be sampled.
        mode: see the file's docstring.
        num_budgets: budgets per step; `default_num_budgets` of them when None.
        seed: what is sampled is a function of (seed, step, number of the budget, medium) alone.
        points: budgets of the mode `points`, every one naming only what the space holds.
        is_gated: nothing is learned at the full budget, so random ones are never that.
        max_image_tokens: random budgets of the modes `random` and `sandwich` let the host see images so small, each
            drawing one of these or the host's own default.

    Raises:
        ValueError: an unknown mode, or numbers that contradict it.
    """

    space: Space
    mode: Mode = "random"
    num_budgets: int | None = None
    seed: int = 0
    points: Sequence[Budget] = ()
    is_gated: bool = False
    max_image_tokens: Sequence[int] = ()

    def __post_init__(self) -> None:
        if self.mode not in get_args(Mode):
            raise ValueError(f"sampler.mode is {self.mode!r}; allowed: {', '.join(get_args(Mode))}")
        if (self.mode == "points") != bool(self.points):
            raise ValueError(f"sampler.points go with mode points and only with it; mode is {self.mode!r}")
        if self.mode == "all" and self.num_budgets is not None:
            raise ValueError("sampler.num_budgets contradicts mode all, which trains every budget")
        least = 2 if self.mode == "sandwich" else 1
        if self.num_budgets is not None and self.num_budgets < least:
            raise ValueError(f"sampler.num_budgets is {self.num_budgets}; mode {self.mode} needs at least {least}")
        if self.mode == "points" and (self.num_budgets or 0) > len(self.points):
            raise ValueError(f"sampler.num_budgets is {self.num_budgets}, but there are {len(self.points)} points")
        self._check_points()

    def _check_points(self) -> None:
        """Refuse points, and smaller images, that the space does not hold."""
        if self.max_image_tokens and self.mode not in ("random", "sandwich"):
            raise ValueError(f"sampler.max_image_tokens go with mode random or sandwich; mode is {self.mode!r}")
        if self.max_image_tokens and self.mode == "sandwich" and self.num_budgets == 2:
            raise ValueError(
                "sampler.max_image_tokens are of random budgets, and sampler.num_budgets 2 leaves sandwich none; "
                "allowed: 3 or more"
            )
        for most in self.max_image_tokens:
            try:
                self.space.check(Budget.parse(f"image<={most}"))
            except ValueError as error:
                raise ValueError(f"sampler.max_image_tokens: {error}") from error
        for point in self.points:
            if missing := point.media - set(self.space.media):
                raise ValueError(f"sampler.points names {min(missing)}, which the space does not hold")
            try:
                self.space.check(point)
            except ValueError as error:
                raise ValueError(f"sampler.points: {error}") from error

    def __call__(self, step: int, media: Iterable[str] | None = None) -> list[SampledBudget]:
        """Sample the budgets of a step.

        Args:
            step: optimizer step; all its micro-batches train the same budgets.
            media: media present in the row. Others are left out and budgets that then coincide come once, so that an
                image is not run once per audio rate. What is sampled for a medium does not depend on this, but where
                all that are present would be left out, which leaves nothing to learn from, they get their fewest
                tokens.
        """
        present = [medium for medium in self.space.media if media is None or medium in set(media)]
        return _merge([self._restrict(sampled, present) for sampled in self._sample(step, present)])

    def possible(self, media: Iterable[str]) -> list[Budget]:
        """List every budget that some step may sample for a row of these media."""
        present = [medium for medium in self.space.media if medium in set(media)]
        budgets = [SampledBudget(point) for point in self.points] or self._product(present)
        budgets += [SampledBudget(one) for most in self.max_image_tokens for one in self.seen_at(most, present)]
        return list(dict.fromkeys(self._restrict(sampled, present).budget for sampled in budgets))

    def seen_at(self, max_image_tokens: int, media: Iterable[str]) -> list[Budget]:
        """List every random budget of a row of these media that lets the host see its images so small."""
        present = [medium for medium in self.space.media if medium in set(media)]
        if "image" not in present:
            return []
        allowed = self._random_amounts(self.space.media["image"])
        budgets = [sampled.budget for sampled in self._product(present)]
        kept = [budget for budget in budgets if budget.amounts["image"] in allowed]
        return [replace(budget, max_image_tokens=max_image_tokens) for budget in kept]

    def _product(self, present: Sequence[str]) -> list[SampledBudget]:
        trained = [self.space.media[medium].choices for medium in present]
        frames = (self.space.frame_counts if "video" in present else ()) or (None,)
        return [
            SampledBudget(Budget(dict(zip(present, point, strict=True)), num_frames=count))
            for point, count in itertools.product(itertools.product(*trained), frames)
        ]

    def _sample(self, step: int, present: Sequence[str]) -> list[SampledBudget]:
        if self.mode == "all":
            return self._product(present)
        num_budgets = self.num_budgets or default_num_budgets(self.mode, len(self.points))
        assert num_budgets is not None
        if self.mode == "points":
            order = random.Random(f"{self.seed}:{step}:points").sample(range(len(self.points)), len(self.points))
            kept = sorted(order[:num_budgets])
            return [SampledBudget(self.points[index]) for index in kept]
        if self.mode == "random":
            return [SampledBudget(self._random(step, index)) for index in range(num_budgets)]
        between = [SampledBudget(self._random(step, index)) for index in range(num_budgets - 2)]
        largest, smallest = self.space.largest(), self.space.smallest()
        return [SampledBudget(largest, is_teacher=True), *between, SampledBudget(smallest)]

    def _random(self, step: int, index: int) -> Budget:
        # Every medium has a generator of its own, so that adding a medium changes nothing for the others.
        frames = self.space.frame_counts
        return Budget(
            {
                medium: random.Random(f"{self.seed}:{step}:{index}:{medium}").choice(self._random_amounts(space))
                for medium, space in self.space.media.items()
            },
            num_frames=random.Random(f"{self.seed}:{step}:{index}:frames").choice(frames) if frames else None,
            max_image_tokens=random.Random(f"{self.seed}:{step}:{index}:seen").choice((None, *self.max_image_tokens)),
        )

    def _random_amounts(self, space: MediumSpace) -> tuple[Amount, ...]:
        return space.choices[1:] if self.is_gated and len(space.choices) > 1 else space.choices

    def _restrict(self, sampled: SampledBudget, present: Sequence[str]) -> SampledBudget:
        budget = sampled.budget.only(present)
        if budget.amounts and set(budget.amounts.values()) == {NONE}:
            budget = replace(budget, amounts={medium: self.space.media[medium].trained[-1] for medium in present})
        return replace(sampled, budget=budget)


def _merge(budgets: Sequence[SampledBudget]) -> list[SampledBudget]:
    """Merge equal budgets into one that weighs their sum, so the expected loss stays what the mode says."""
    merged: dict[Budget, SampledBudget] = {}
    for sampled in budgets:
        before = merged.get(sampled.budget)
        if before is not None:
            weight, is_teacher = before.weight + sampled.weight, before.is_teacher or sampled.is_teacher
            sampled = SampledBudget(sampled.budget, weight, is_teacher)
        merged[sampled.budget] = sampled
    return list(merged.values())
