"""Resolves open budgets: `auto`, and caps in other units than tokens, to a trained budget for one request at a time.

Knows encoded rows, a router, and what a request costs. Does not know files or batches: what is chosen for a request
depends on nothing but the request, and is settled before it is batched, cached or counted.
"""

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from mllm.budget import Amount, Auto, Budget, TokenCount
from mllm.processing.batch import EncodedSample, check_length
from mllm.processing.processor import ElasticProcessor
from mllm.router.allocation import allocate
from mllm.router.features import MediaSet, features_of, media_set_of
from mllm.router.heads import Heads
from mllm.router.policy import MAX_GROWTHS, Policy
from mllm.router.router import MediaRouter, Router
from mllm.router.table import Array

KeptTokens = Callable[[EncodedSample, Sequence[Sequence[TokenCount]]], Array]
"""Counts the soft tokens of a request (P, P) that need not be read again at the counts of the column behind an answer
at those of the row; zero where these are no smaller."""
RequestCosts = Callable[[EncodedSample, Budget, Sequence[TokenCount]], Mapping[str, float]]
"""Computes what a request takes at a budget, by unit of `mllm.budget.Limit`; raises ValueError where nobody knows."""


@dataclass(frozen=True)
class Choice:
    """Holds what was chosen for one request, and chooses again once there is an answer.

    Args:
        budgets: K that were to choose among, cheapest first.
        tokens: (K) soft tokens of the request at each; infinite where it cannot be answered at one.
        first: the number of the budget to begin with.
        policy: decides after each answer; None where the first budget is the last.
        heads: of the router, for these media.
        features: of the request, by block.
        kept: (K, K) soft tokens of the budget in the column that are not read again behind an answer at that in the
            row.
    """

    budgets: tuple[Budget, ...]
    tokens: Array
    first: int
    kept: Array
    policy: Policy | None = None
    heads: Heads | None = None
    features: Mapping[str, Array] = field(default_factory=dict)

    @property
    def most_growths(self) -> int:
        """How often an answer may be discarded."""
        return 0 if self.policy is None else self.policy.max_growths

    def after(self, number: int, confidence: float) -> int:
        """Choose the budget to go on with, the same where the answer stays.

        Args:
            number: of the budget that was answered at.
            confidence: the smallest token probability of the answer.
        """
        if self.policy is None or self.heads is None:
            return number
        features = {name: block[None] for name, block in self.features.items()}
        expected = self.heads.predict_after(features, number, np.asarray([confidence]))
        added = self.tokens - self.kept[number]
        return int(self.policy.grow(np.asarray([number]), expected, added[None])[0])


@dataclass(frozen=True)
class BudgetChooser:
    """Chooses budgets for the requests of one model.

    Args:
        model: an `ElasticForConditionalGeneration`; its embeddings of words are features of a router.
        processor: the one that belongs to it.
        router: for `auto`.
        request_costs: for caps in other units than tokens.
        max_growths: how often an answer may be discarded for a larger budget.
        kept_tokens: where a larger budget goes on from what has been read; otherwise everything is read again, and
            paid again.
        is_allowed: tells which budgets may be chosen at all, where a server has a cap.
    """

    model: Any = field(repr=False)
    processor: ElasticProcessor = field(repr=False)
    router: Router | None = None
    request_costs: RequestCosts | None = None
    max_growths: int = MAX_GROWTHS
    kept_tokens: KeptTokens | None = None
    is_allowed: Callable[[Budget], bool] = lambda budget: True

    def candidates(self, budget: Budget, media: Sequence[str]) -> list[Budget]:
        """List the trained budgets that a budget may become for requests with these media; itself where it is settled.

        Raises:
            ValueError: `auto` without a router, or with one that was not fitted for these media.
        """
        held = media_set_of(media)
        if not budget.is_open:
            return [budget]
        if not held:
            return [Budget()]
        listed = self._trained(budget, held) if budget.auto is None else self._routed(budget, held)
        return listed if "image" not in held else [_with_caps(one, budget) for one in listed]

    def choose(self, row: EncodedSample, budget: Budget) -> Choice:
        """Choose the budget that a request is first answered at.

        Args:
            row: the request, without an answer.
            budget: an open one.

        Raises:
            ValueError: no budget keeps to the caps, a goal that the router cannot meet, or as `candidates`; the sample
                is named.
        """
        media = media_set_of([span.extent.medium for span in row.spans])
        try:
            budgets = self.candidates(budget, media)
            tokens, limited = self._tokens(row, budget, budgets)
        except ValueError as error:
            raise ValueError(f"sample {row.sample_id!r}: {error}") from error
        if budget.auto is None or not media or self.router is None:
            # The dearest in the unit of the first cap; of equals the one with more tokens.
            first = max(np.flatnonzero(np.isfinite(tokens)), key=lambda number: (limited[number], tokens[number]))
            return Choice(tuple(budgets), tokens, int(first), np.zeros((len(budgets), len(budgets))))
        if budget.auto.goal == "loss" and np.isinf(tokens).any():
            raise ValueError(
                f"sample {row.sample_id!r}: {budget} cannot be promised where caps or lengths leave out some of the "
                "router's budgets; drop the cap, or name another goal"
            )
        routed = self.router.of(media)
        if (shared := self._shared_out(row, budget, budgets, routed)) is not None:
            return shared
        policy = routed.policy(budget.auto, max_growths=self.max_growths)
        features = features_of(self.model, row, list(self.processor.placeholder_ids.values()))
        before = routed.heads.predict_before({name: block[None] for name, block in features.items()})
        first = int(policy.first(before, tokens[None])[0])
        kept = self._kept(row, budgets, tokens)
        return Choice(tuple(budgets), tokens, first, kept, policy, routed.heads, features)

    def _shared_out(
        self, row: EncodedSample, budget: Budget, budgets: Sequence[Budget], routed: MediaRouter
    ) -> Choice | None:
        """Share a cap out among several items of one medium, each at the budget that suits it.

        What each is expected to bring is what the router expects of a request about this item alone. The sum is made as
        large as the cap allows, exactly; it is answered once, since nobody knows what one more item would gain.

        Returns:
            None where there is no cap, one item, several media, or a goal or a cap that is of whole requests.

        Raises:
            ValueError: the smallest budgets together are above the cap.
        """
        (medium, *others) = media_set_of([span.extent.medium for span in row.spans])
        goal = None if budget.auto is None else budget.auto.goal
        settles_all = bool(budget.limits) or goal == "loss" or any(one.num_frames is not None for one in budgets)
        if budget.total_tokens is None or others or len(row.spans) == 1 or settles_all:
            return None
        price = routed.policy(budget.auto or Auto(), max_growths=0).price
        costs, gains, options = [], [], []
        for span in row.spans:
            item = replace(row, spans=(span,))
            tokens, _ = self._tokens(item, replace(budget, total_tokens=None), budgets)
            possible = np.flatnonzero(np.isfinite(tokens))
            features = features_of(self.model, item, list(self.processor.placeholder_ids.values()))
            expected = routed.heads.predict_before({name: block[None] for name, block in features.items()})[0]
            options.append([budgets[number] for number in possible.tolist()])
            costs.append(tokens[possible].astype(int).tolist())
            gains.append((expected[possible] - price * tokens[possible]).tolist())
        try:
            chosen = allocate(costs, gains, budget.total_tokens)
        except ValueError as error:
            raise ValueError(f"sample {row.sample_id!r}: {error}") from error
        amounts = [item[number].amounts[medium] for item, number in zip(options, chosen, strict=True)]
        resolved = replace(options[0][chosen[0]], amounts={medium: Amount.of_items(amounts)})
        counts = row.token_counts(resolved, self.processor.space)
        check_length(row, counts, self.processor.context_tokens)
        return Choice((resolved,), np.asarray([float(sum(count.tokens for count in counts))]), 0, np.zeros((1, 1)))

    def _kept(self, row: EncodedSample, budgets: Sequence[Budget], tokens: Array) -> Array:
        """Count what is kept (K, K) between budgets that the request can be answered at."""
        kept = np.zeros((len(budgets), len(budgets)))
        if self.kept_tokens is None or self.max_growths == 0:
            return kept
        possible = np.flatnonzero(np.isfinite(tokens)).tolist()
        counts = [row.token_counts(budgets[number], self.processor.space) for number in possible]
        kept[np.ix_(possible, possible)] = self.kept_tokens(row, counts)
        return kept

    def _routed(self, budget: Budget, media: MediaSet) -> list[Budget]:
        if self.router is None:
            raise ValueError(f"budget {str(budget)!r} needs a router; fit one (mllm router fit), or name amounts")
        return list(self.router.of(media).budgets)

    def _trained(self, budget: Budget, media: MediaSet) -> list[Budget]:
        """List every combination of trained amounts of the media that a budget does not name."""
        space = self.processor.space
        space.check(budget)
        amounts = {m: [budget.amounts[m]] if m in budget.amounts else space.media[m].choices[::-1] for m in media}
        frames: Sequence[int | None] = [budget.num_frames]
        if "video" in media and budget.num_frames is None and space.frame_counts:
            frames = space.frame_counts[::-1]
        return [
            Budget(dict(zip(amounts, chosen, strict=True)), num_frames=count)
            for chosen, count in itertools.product(itertools.product(*amounts.values()), frames)
        ]

    def _tokens(self, row: EncodedSample, budget: Budget, budgets: Sequence[Budget]) -> tuple[Array, Array]:
        """Count what a request takes at each budget, in soft tokens and in the unit of the first cap.

        Returns:
            (K) tokens, infinite where it cannot be answered there or where a cap forbids it, and (K) of the unit.

        Raises:
            ValueError: it can be answered at none of them.
        """
        tokens, limited = np.full(len(budgets), np.inf), np.zeros(len(budgets))
        refusals: list[str] = []
        for number, one in enumerate(budgets):
            try:
                if not self.is_allowed(one):
                    raise ValueError(f"{one} is more than is allowed here")
                counts = row.token_counts(one, self.processor.space)
                check_length(row, counts, self.processor.context_tokens)
                limited[number] = self._limited(row, budget, one, counts)
                tokens[number] = sum(count.tokens for count in counts)
            except ValueError as error:
                refusals.append(str(error).removeprefix(f"sample {row.sample_id!r}: "))
        if np.isinf(tokens).all():
            raise ValueError(f"budget {str(budget)!r} cannot be met: {refusals[0]}")
        return tokens, limited

    def _limited(self, row: EncodedSample, budget: Budget, one: Budget, counts: Sequence[TokenCount]) -> float:
        """Compute what a budget takes in the unit of the first cap.

        Raises:
            ValueError: a cap forbids it.
        """
        total = sum(count.tokens for count in counts)
        if budget.total_tokens is not None and total > budget.total_tokens:
            raise ValueError(f"{one} takes {total} soft tokens")
        if not budget.limits:
            return 0.0
        if self.request_costs is None:
            unit = budget.limits[0].unit
            raise ValueError(
                f"what budgets take in {unit} is not known here; in Python give the Answerer "
                "request_costs=mllm.evaluation.request_costs.ModelCosts(model, processor)"
            )
        takes = self.request_costs(row, one, counts)
        for limit in budget.limits:
            if takes[limit.unit] > limit.most:
                raise ValueError(f"{one} takes {takes[limit.unit]:.6g} {limit.unit}")
        return takes[budget.limits[0].unit]


def _with_caps(one: Budget, budget: Budget) -> Budget:
    """Put the caps on what is seen of images, which an open budget may hold, into one that it may become."""
    smaller: dict[str, Any] = {}
    for name in ("max_tiles", "max_image_tokens"):
        values = [value for value in (getattr(one, name), getattr(budget, name)) if value is not None]
        smaller[name] = min(values, default=None)
    return replace(one, **smaller)
