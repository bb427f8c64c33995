"""A router that is made by hand, so that tests know why it chooses."""

from collections.abc import Mapping, Sequence

import numpy as np

from mllm.budget import Budget
from mllm.router.heads import Heads, Reduction
from mllm.router.router import MediaRouter, OperatingPoint, Router

TWO_WAYS = tuple(OperatingPoint(price, growths, 4.0, 1.0) for price in (0.0, 0.01) for growths in (0, 2))


def image_router(
    width: int,
    budgets: Sequence[Budget],
    *,
    gain_of_question: float = 6.0,
    growth: float = 0.0,
    fingerprint: Mapping[str, str] | None = None,
) -> Router:
    """A router of requests about images, whose choices differ by question: utilities follow one direction of its words.

    Args:
        width: the LLM's.
        budgets: three, cheapest first.
        gain_of_question: how strongly it speaks for the largest budget, or for the smallest.
        growth: how strongly a low confidence speaks for a larger budget.
        fingerprint: of the model.
    """
    question = Reduction(np.zeros(width), np.random.default_rng(0).normal(0, 1, (width, 1)))
    before = np.asarray([[0.0, 0.0, 0.0], [-gain_of_question, 0.0, gain_of_question]])
    after = np.zeros((3, 3, 3))
    after[:, 1] = [growth, 0.0, -growth]  # of the logit of the confidence
    one = MediaRouter(tuple(budgets), Heads({"question": question}, before, after, 0.1), TWO_WAYS, 4, ("a", "b"))
    return Router({("image",): one}, fingerprint or {})
