"""The loss is what a plain loop over views and tokens says it is."""

import dataclasses
import math

import pytest
import torch
from torch import Tensor

from mllm.training.loss import ChunkedTargetLoss, Distillation, WeightedTargets, loss_of_logits, sink

VOCABULARY = 7


def views_of(
    targets: list[list[int]], weights: list[list[float]], teachers: list[list[int]] | None = None
) -> tuple[Tensor, WeightedTargets, list[tuple[int, int, int]]]:
    """Rows at several budgets, flat: logits, targets and (row, budget, token) of every target."""
    flat = [
        (row, budget, token)
        for row, row_weights in enumerate(weights)
        for budget in range(len(row_weights))
        for token in range(len(targets[row]))
    ]
    index = {target: position for position, target in enumerate(flat)}
    logits = torch.randn(len(flat), VOCABULARY, generator=torch.Generator().manual_seed(0)).requires_grad_()
    teacher_of = [index[row, teachers[row][budget] if teachers else budget, token] for row, budget, token in flat]
    weighted = WeightedTargets(
        ids=torch.tensor([targets[row][token] for row, _, token in flat]),
        weights=torch.tensor([weights[row][budget] for row, budget, _ in flat]),
        budgets=torch.tensor([budget for _, budget, _ in flat]),
        teachers=torch.tensor(teacher_of),
        num_budgets=max(len(row_weights) for row_weights in weights),
    )
    return logits, weighted, flat


def log_probability(logits: Tensor, token: int, temperature: float = 1.0) -> float:
    scores = [value / temperature for value in logits.tolist()]
    return scores[token] - math.log(sum(math.exp(score) for score in scores))


def test_the_loss_is_the_weighted_mean_over_budgets_of_the_mean_over_tokens() -> None:
    targets, weights = [[1, 2, 3], [4, 5]], [[0.25, 0.75], [0.5, 0.5]]
    logits, weighted, flat = views_of(targets, weights)
    loss = loss_of_logits(logits, weighted, num_targets=5)
    expected = sum(
        -weights[row][budget] * log_probability(logits[position], targets[row][token]) / 5
        for position, (row, budget, token) in enumerate(flat)
    )
    assert loss.total.item() == pytest.approx(expected, rel=1e-5)
    by_budget = [
        sum(-log_probability(logits[p], targets[row][token]) for p, (row, at, token) in enumerate(flat) if at == budget)
        for budget in range(2)
    ]
    assert loss.budget_losses.tolist() == pytest.approx(by_budget, rel=1e-5)
    assert not loss.budget_losses.requires_grad


def test_micro_batches_sum_to_the_whole_batch() -> None:
    targets, weights = [[1, 2, 3], [4, 5]], [[0.5, 0.5], [1.0]]
    logits, weighted, flat = views_of(targets, weights)
    whole = loss_of_logits(logits, weighted, num_targets=torch.tensor(5)).total
    parts = []
    for teacher in range(2):
        kept = [position for position, (row, _, _) in enumerate(flat) if row == teacher]
        part = WeightedTargets(
            weighted.ids[kept], weighted.weights[kept], weighted.budgets[kept], torch.arange(len(kept)), 2
        )
        parts.append(loss_of_logits(logits[kept], part, num_targets=5).total)
    torch.testing.assert_close(sum(parts), whole)


def test_students_learn_from_the_teacher_and_the_teacher_from_the_labels_only() -> None:
    distillation = Distillation(weight=0.3, temperature=2.0)
    targets = [[1, 2]]
    logits, weighted, _ = views_of(targets, [[0.5, 0.5]], teachers=[[0, 0]])
    loss = loss_of_logits(logits, weighted, 2, distillation)
    expected = 0.0
    for token, label in enumerate(targets[0]):
        teacher, student = logits[token], logits[2 + token]
        divergence = sum(
            math.exp(log_probability(teacher, v, 2.0))
            * (log_probability(teacher, v, 2.0) - log_probability(student, v, 2.0))
            for v in range(VOCABULARY)
        )
        expected += 0.5 * -log_probability(teacher, label) / 2
        expected += 0.5 * (0.7 * -log_probability(student, label) + 0.3 * 4.0 * divergence) / 2
    assert loss.total.item() == pytest.approx(expected, rel=1e-5)

    plain = logits.detach().clone().requires_grad_()
    only_teacher = WeightedTargets(weighted.ids[:2], weighted.weights[:2], weighted.budgets[:2], torch.arange(2), 1)
    loss_of_logits(plain[:2], only_teacher, 2).total.backward()
    loss.total.backward()
    assert logits.grad is not None
    assert plain.grad is not None
    torch.testing.assert_close(logits.grad[:2], plain.grad[:2])


def test_a_batch_without_targets_has_loss_zero_and_a_gradient() -> None:
    logits = torch.zeros(0, VOCABULARY, requires_grad=True)
    no_targets = torch.zeros(0, dtype=torch.int64)
    loss = loss_of_logits(
        logits, WeightedTargets(no_targets, torch.zeros(0), no_targets, no_targets, 1), 0, Distillation(0.5)
    )
    loss.total.backward()
    assert loss.total.item() == 0.0
    assert loss.budget_losses.tolist() == [0.0]


def test_half_precision_logits_are_compared_in_single() -> None:
    logits, weighted, _ = views_of([[1, 2, 3]], [[1.0]])
    half = loss_of_logits(logits.to(torch.bfloat16), weighted, 3).total
    assert half.dtype == torch.float32
    assert half.item() == pytest.approx(loss_of_logits(logits.bfloat16().float(), weighted, 3).total.item(), rel=1e-6)


def test_the_sink_loss_is_the_mean_squared_cosine_to_the_first_token() -> None:
    rng = torch.Generator().manual_seed(0)
    hidden = [torch.randn(2, 4, 5, generator=rng) for _ in range(3)]
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    expected = []
    for row, length in enumerate((4, 2)):
        cosines = [
            (layer[row, position] @ layer[row, 0] / layer[row, position].norm() / layer[row, 0].norm()) ** 2
            for layer in hidden
            for position in range(1, length)
        ]
        expected.append(sum(cosines) / len(cosines))
    torch.testing.assert_close(sink(hidden, mask), torch.stack(expected))


@pytest.mark.parametrize("distillation", [None, Distillation(0.5, temperature=2.0)])
def test_the_loss_of_hidden_states_read_in_pieces_is_that_of_all_logits(distillation: Distillation | None) -> None:
    logits, weighted, _ = views_of([[1, 2, 3], [4, 5]], [[0.25, 0.75], [0.5, 0.5]], [[0, 0], [0, 0]])
    weight = torch.randn(VOCABULARY, 3, generator=torch.Generator().manual_seed(1)).requires_grad_()
    hidden = torch.randn(len(logits), 3, generator=torch.Generator().manual_seed(2)).requires_grad_()
    whole = loss_of_logits(hidden @ weight.T, weighted, 5, distillation)
    expected = torch.autograd.grad(whole.total, (weight, hidden))
    sizes: list[int] = []

    def head(states: Tensor) -> Tensor:
        sizes.append(len(states))
        return states @ weight.T

    for chunk_bytes, largest in ((1 << 30, 10), (3 * 4 * VOCABULARY, 3), (1, 1)):
        sizes.clear()
        target_loss = ChunkedTargetLoss(
            weighted, 5, vocabulary_size=VOCABULARY, distillation=distillation, chunk_bytes=chunk_bytes
        )
        loss, budget_losses = target_loss(head, hidden)
        assert loss.item() == pytest.approx(whole.total.item(), rel=1e-5)
        torch.testing.assert_close(budget_losses, whole.budget_losses)
        for result, wanted in zip(torch.autograd.grad(loss, (weight, hidden)), expected, strict=True):
            torch.testing.assert_close(result, wanted)
        assert max(sizes) == largest
    apart, _ = dataclasses.replace(target_loss, teacher_states=hidden)(head, hidden)
    assert apart.item() == pytest.approx(whole.total.item(), rel=1e-5)


def test_nothing_to_learn_is_a_loss_of_nothing() -> None:
    no_targets = torch.zeros(0, dtype=torch.int64)
    weighted = WeightedTargets(no_targets, torch.zeros(0), no_targets, no_targets, 1)
    hidden = torch.zeros(0, 3, requires_grad=True)
    for chunk_bytes in (1 << 30, 1):
        target_loss = ChunkedTargetLoss(weighted, 0, vocabulary_size=VOCABULARY, chunk_bytes=chunk_bytes)
        loss, _ = target_loss(lambda states: states @ torch.ones(3, VOCABULARY), hidden)
        loss.backward()
        assert loss.item() == 0
