"""Tables of answers whose truth is known: how likely each kind of question is answered right at each budget."""

import itertools

import numpy as np

from mllm.budget import Budget
from mllm.router.table import AnswerTable

BUDGETS = (1, 4, 16, 64)
# P(right) by kind and budget: one kind needs nothing, one needs detail, and one stays a guess at every budget.
CHANCES = {"time": (0.97, 0.97, 0.97, 0.97), "letter": (0.1, 0.3, 0.8, 0.97), "count": (0.75, 0.75, 0.75, 0.75)}


def answers(num_images: int, *, seed: int) -> AnswerTable:
    """Three kinds of questions about each image; the question tells its kind, and confidence a little more."""
    rng = np.random.default_rng(seed)
    kinds = tuple(itertools.chain.from_iterable([list(CHANCES)] * num_images))
    chances = np.array([CHANCES[kind] for kind in kinds])
    utility = (rng.random(chances.shape) < chances).astype(float)
    one_hot = np.array([[kind == one for one in CHANCES] for kind in kinds], float)
    return AnswerTable(
        budgets=tuple(Budget.parse(f"image={count}") for count in BUDGETS),
        sample_keys=tuple(("set", str(number)) for number in range(len(kinds))),
        media_keys=tuple(f"image{number // len(CHANCES)}" for number in range(len(kinds))),
        tasks=("vqa",) * len(kinds),
        kinds=kinds,
        utility=utility,
        tokens=np.tile(np.array(BUDGETS, float), (len(kinds), 1)),
        confidence=np.clip(0.5 * chances + 0.3 * utility + 0.2 * rng.random(chances.shape), 0.01, 0.99),
        flops=np.tile(100.0 + np.array(BUDGETS, float), (len(kinds), 1)),
        features={
            "question": one_hot + 0.1 * rng.normal(size=one_hot.shape),
            "media": rng.normal(size=(len(kinds), 3)),
        },
    )
