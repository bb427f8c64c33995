"""Fits the heads of a router: what the utility of an answer will be at each budget, by logistic regression.

Knows tables of answers. Does not know models, media or prices.

One head says P(right at b) for every budget b, knowing the features of question and media; and for every budget b one
says P(right at m) for all m, knowing also how confident the answer at b was. One class per question ("the cheapest
right budget") would be less: it cannot say that a question is hopeless, nor serve another price.

Targets may be graded (VQA accuracy against ten annotators, 1 - WER), so the loss is cross-entropy with targets in
[0, 1]. The weight of L2 is chosen by cross-validation over media. Everything is linear: seconds on a CPU.

Shapes: n questions, K budgets, F features after reduction, Z inputs of a head.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize
from scipy.special import expit

from mllm.router.policy import Predictions
from mllm.router.table import AnswerTable, Array

MAX_COMPONENTS = 32
"""Principal components kept of a wider block; with hundreds of questions more of them only fit noise."""
L2_GRID = (0.3, 0.1, 0.03, 0.01, 0.003, 0.001, 0.0003)
"""Weights of L2 that cross-validation chooses among, per question."""
NUM_FOLDS = 5
MIN_MEDIA = 20
"""Fewer pictures or clips make no router: each fold, and each fold of the rest, must hold some."""
MIN_PROBABILITY = 1e-4
"""Confidences are clipped here before their logit is taken; models in half precision round to 0 and 1."""


@dataclass(frozen=True)
class Reduction:
    """Reduces one block of features to a few of unit scale.

    Args:
        mean: (F_block). components: (F_block, r) principal directions, divided by a scale common to all of them: the
            whole block then has variance 1 in all, whatever its width, and L2 treats blocks alike.
    """

    mean: Array
    components: Array

    @classmethod
    def fit(cls, block: Array, max_components: int = MAX_COMPONENTS) -> "Reduction":
        """Find the principal components of a block (n, F_block); none where all rows are alike but for rounding."""
        mean = block.mean(axis=0)
        _, singular, directions = np.linalg.svd(block - mean, full_matrices=False)
        kept = int(min(max_components, (singular > max(1e-6 * singular[0], 1e-9 * np.linalg.norm(block))).sum()))
        scale = np.sqrt((singular[:kept] ** 2).sum() / len(block) / max(kept, 1)) or 1.0
        return cls(mean, directions[:kept].T / scale)

    def __call__(self, block: Array) -> Array:
        return (block - self.mean) @ self.components


@dataclass(frozen=True)
class Heads:
    """Predicts utilities from features and confidences.

    Args:
        reductions: by block, in the order their columns stand in.
        before: (1 + F, K) weights, the bias first.
        after: (K, 2 + F, K) weights of the heads behind an answer at each budget: bias, logit of its confidence, F.
        l2: the weight of L2 that cross-validation chose.
    """

    reductions: Mapping[str, Reduction]
    before: Array
    after: Array
    l2: float

    def predict(self, features: Mapping[str, Array], confidence: Array) -> Predictions:
        """Predict for questions that were answered at all budgets.

        Args:
            features: by block, (n, F_block).
            confidence: (n, K) smallest token probability of the answers.
        """
        after = [self.predict_after(features, number, confidence[:, number]) for number in range(confidence.shape[1])]
        return Predictions(self.predict_before(features), np.stack(after, axis=1))

    def predict_before(self, features: Mapping[str, Array]) -> Array:
        """Predict utilities (n, K) before anything is answered."""
        return expit(_with_bias(self._reduce(features)) @ self.before)

    def predict_after(self, features: Mapping[str, Array], budget: int, confidence: Array) -> Array:
        """Predict utilities (n, K) behind an answer at one budget, with confidences (n)."""
        return expit(_behind_answer(self._reduce(features), confidence) @ self.after[budget])

    def _reduce(self, features: Mapping[str, Array]) -> Array:
        return np.concatenate([reduce(features[name]) for name, reduce in self.reductions.items()], axis=1)


def fit_heads(table: AnswerTable, blocks: Sequence[str] | None = None) -> Heads:
    """Fit heads on a table.

    Args:
        blocks: features to look at; all of the table's when None.

    Raises:
        ValueError: fewer media than folds of the cross-validation.
    """
    names = list(table.features) if blocks is None else list(blocks)
    reductions = {name: Reduction.fit(table.features[name]) for name in names}
    reduced = np.concatenate([reduce(table.features[name]) for name, reduce in reductions.items()], axis=1)
    inputs = _with_bias(reduced)
    l2 = _best_l2(inputs, table.utility, folds_of(table))
    behind = [
        _fit(_behind_answer(reduced, table.confidence[:, number]), table.utility, l2)
        for number in range(len(table.budgets))
    ]
    return Heads(reductions, _fit(inputs, table.utility, l2), np.stack(behind), l2)


def predict_out_of_fold(table: AnswerTable, blocks: Sequence[str] | None = None) -> Predictions:
    """Predict each question by heads that were fitted on the other media, so that prices can be set on one table.

    Raises:
        ValueError: as `fit_heads`.
    """
    folds = folds_of(table)
    num_budgets = len(table.budgets)
    before = np.zeros((len(table), num_budgets))
    after = np.zeros((len(table), num_budgets, num_budgets))
    for fold in range(NUM_FOLDS):
        inside, outside = np.flatnonzero(folds != fold), np.flatnonzero(folds == fold)
        held_out = table.take(outside)
        predictions = fit_heads(table.take(inside), blocks).predict(held_out.features, held_out.confidence)
        before[outside], after[outside] = predictions.before, predictions.after
    return Predictions(before, after)


def folds_of(table: AnswerTable) -> NDArray[np.intp]:
    """Assign each question (n) to a fold; questions about the same media go to the same one.

    Raises:
        ValueError: fewer media than folds.
    """
    units = table.units()
    if len(units) < NUM_FOLDS:
        raise too_few(len(units))
    folds = np.zeros(len(table), np.intp)
    for number, rows in enumerate(units):
        folds[rows] = number % NUM_FOLDS
    return folds


def too_few(num_media: int) -> ValueError:
    """Word the refusal of answers about too few media."""
    return ValueError(
        f"{num_media} pictures or clips are too few to fit a router, which takes at least {MIN_MEDIA}; some hundred "
        "make a good one"
    )


def logit_of(confidence: Array) -> Array:
    """Return the logit of a confidence in [0, 1], clipped to what the models' precisions can tell apart."""
    clipped = np.clip(confidence, MIN_PROBABILITY, 1 - MIN_PROBABILITY)
    return np.log(clipped) - np.log1p(-clipped)


def _with_bias(columns: Array) -> Array:
    return np.concatenate([np.ones((len(columns), 1)), columns], axis=1)


def _behind_answer(reduced: Array, confidence: Array) -> Array:
    return _with_bias(np.concatenate([logit_of(confidence)[:, None], reduced], axis=1))


def _best_l2(inputs: Array, targets: Array, folds: NDArray[np.intp]) -> float:
    """Choose the weight of L2 with the least cross-entropy on media that were left out."""
    losses = np.zeros(len(L2_GRID))
    for fold in range(NUM_FOLDS):
        inside, outside = folds != fold, folds == fold
        weights = None
        for number, l2 in enumerate(L2_GRID):  # from the strongest on, each begins where the last one ended
            weights = _fit(inputs[inside], targets[inside], l2, weights)
            losses[number] += _cross_entropy(inputs[outside] @ weights, targets[outside])
    return L2_GRID[int(np.argmin(losses))]


def _cross_entropy(logits: Array, targets: Array) -> float:
    return float((np.logaddexp(0.0, logits) - targets * logits).sum())


def _fit(inputs: Array, targets: Array, l2: float, start: Array | None = None) -> Array:
    """Fit weights (Z, K) of independent logistic regressions by L-BFGS; the bias, the first input, is not penalised."""
    shape = (inputs.shape[1], targets.shape[1])
    penalty = np.full((shape[0], 1), l2 * len(inputs))
    penalty[0] = 1e-3  # keeps the bias finite where all answers are right

    def loss_and_gradient(flat: Array) -> tuple[float, Array]:
        weights = flat.reshape(shape)
        logits = inputs @ weights
        gradient = inputs.T @ (expit(logits) - targets) + penalty * weights
        return _cross_entropy(logits, targets) + 0.5 * float((penalty * weights**2).sum()), gradient.ravel()

    first = np.zeros(shape) if start is None else start
    fitted = minimize(loss_and_gradient, first.ravel(), jac=True, method="L-BFGS-B", options={"maxiter": 500})
    return fitted.x.reshape(shape)
