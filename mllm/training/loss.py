"""Computes the loss of a training batch: cross-entropy per target token, and distillation from the largest budget.

Knows hidden states at label positions, the head, and the weight of each target. Does not know rows, budgets as words,
or the model.

A view is one row at one budget; the targets of a row are the same, in the same order, in each of its views.
Shapes: B views, P target tokens of all views of a micro-batch, H hidden size, V vocabulary, K budgets that occur in it.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

CHUNK_BYTES = 1 << 30
"""Logits beyond so many bytes in float32 are computed and compared piece by piece."""
Head = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class WeightedTargets:
    """Says what the logits should say, and the weight of each of them.

    Args:
        ids: (P,) the right tokens.
        weights: (P,) float, the weight of the target's view; the weights of the views of a row sum to 1.
        budgets: (P,) int64, which of the K budgets the target's view is at.
        teachers: (P,) int64, the same target in the view that teaches; its own index where none does.
        num_budgets: K.
        students: (P,) bool, which targets have a teacher; when left out those whose teacher is another target here.
    """

    ids: Tensor
    weights: Tensor
    budgets: Tensor
    teachers: Tensor
    num_budgets: int
    students: Tensor | None = None

    @property
    def is_student(self) -> Tensor:
        """(P,) bool."""
        if self.students is not None:
            return self.students
        return self.teachers != torch.arange(len(self.teachers), device=self.teachers.device)

    def _map(self, change: Callable[[Tensor], Tensor]) -> "WeightedTargets":
        values = (self.ids, self.weights, self.budgets, self.teachers)
        return WeightedTargets(*map(change, values), num_budgets=self.num_budgets, students=change(self.is_student))

    def to(self, device: torch.device) -> "WeightedTargets":
        """Return the same on a device."""
        return self._map(lambda value: value.to(device, non_blocking=True))

    def part(self, kept: slice) -> "WeightedTargets":
        """Return some of the targets; teachers are counted as before."""
        return self._map(lambda value: value[kept])


@dataclass(frozen=True)
class Distillation:
    """Says how much of a student's loss comes from its teacher, and how soft both distributions are made."""

    weight: float
    temperature: float = 1.0


@dataclass(frozen=True)
class Loss:
    """Holds the loss to differentiate and, detached for the log, what it is made of.

    Args:
        total: a scalar.
        budget_losses: (K,) the cross-entropy summed per budget.
        auxiliary: (2, K) by name: the sum of an auxiliary loss over the views at each budget, and how many had one.
    """

    total: Tensor
    budget_losses: Tensor
    auxiliary: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class ChunkedTargetLoss:
    """Computes the loss of hidden states, whose logits are never all there at once where they would be large.

    They are then made piece by piece, and again in the backward pass. A `mllm.model.modeling.TargetLoss`.

    Args:
        targets: of the hidden states.
        num_targets: target tokens of the optimizer step, see `loss_of_logits`.
        distillation: None learns from the labels alone.
        teacher_states: (P', H) hidden states that `targets.teachers` counts in; those of the same call when left out.
        chunk_bytes: most bytes of the logits of a piece, in float32.
        vocabulary_size: V.
    """

    targets: WeightedTargets
    num_targets: int | Tensor
    vocabulary_size: int
    distillation: Distillation | None = None
    teacher_states: Tensor | None = None
    chunk_bytes: int = CHUNK_BYTES

    def __call__(self, head: Head, hidden_PH: Tensor) -> tuple[Tensor, Tensor]:
        """Return the loss and the cross-entropy summed per budget (K,); see `TargetLoss`."""
        chunk_size = max(self.chunk_bytes // (4 * self.vocabulary_size), 1)
        fits = chunk_size >= len(hidden_PH)
        if fits and (self.teacher_states is None or self.distillation is None):
            loss = loss_of_logits(head(hidden_PH), self.targets, self.num_targets, self.distillation)
            return loss.total, loss.budget_losses
        teacher_states = hidden_PH.detach() if self.teacher_states is None else self.teacher_states

        def token_losses(chunk_nH: Tensor, targets: WeightedTargets) -> tuple[Tensor, Tensor]:
            teacher_logits = None
            if self.distillation is not None:
                with torch.no_grad():
                    teacher_logits = head(teacher_states[targets.teachers]).float()
            return _token_losses(head(chunk_nH).float(), teacher_logits, targets, self.distillation)

        pieces = []
        for start in range(0, max(len(hidden_PH), 1), chunk_size):
            kept = slice(start, start + chunk_size)
            chunk_nH, targets = hidden_PH[kept], self.targets.part(kept)
            pieces.append(
                token_losses(chunk_nH, targets)
                if fits
                else checkpoint(token_losses, chunk_nH, targets, use_reentrant=False)
            )
        cross_entropy, per_token = (torch.cat(piece) for piece in zip(*pieces, strict=True))
        loss = weighted_loss(cross_entropy, per_token, self.targets, self.num_targets)
        return loss.total, loss.budget_losses


def loss_of_logits(
    logits: Tensor, targets: WeightedTargets, num_targets: int | Tensor, distillation: Distillation | None = None
) -> Loss:
    """Compute the weighted mean over the views of the mean over target tokens.

    `num_targets` counts the targets of the whole optimizer step once, whatever the number of views: over all its
    micro-batches and processes. So the sum of this loss over micro-batches and processes is the loss of one process
    that saw them all.

    With distillation a student's loss is `(1 - weight) * CE + weight * temperature^2 * KL(teacher || student)`, the
    teacher's logits being those of this very step, detached. Sources: Hinton et al. (arXiv 1503.02531); in-place
    distillation of slimmable networks (arXiv 1903.05134).

    Args:
        logits: (P, V) at label positions.
        num_targets: target tokens of the optimizer step.
    """
    logits = logits.float()
    teacher_logits = logits.detach()[targets.teachers] if distillation is not None else None
    cross_entropy, per_token = _token_losses(logits, teacher_logits, targets, distillation)
    return weighted_loss(cross_entropy, per_token, targets, num_targets)


def _token_losses(
    logits: Tensor, teacher_logits: Tensor | None, targets: WeightedTargets, distillation: Distillation | None
) -> tuple[Tensor, Tensor]:
    """Compute the cross-entropy, detached, and what is learned from, both (P,)."""
    per_token = functional.cross_entropy(logits, targets.ids, reduction="none")
    cross_entropy = per_token.detach()
    if distillation is not None and distillation.weight > 0:
        assert teacher_logits is not None
        per_token = _distill(per_token, logits, teacher_logits, targets, distillation)
    return cross_entropy, per_token


def weighted_loss(
    cross_entropy: Tensor, per_token: Tensor, targets: WeightedTargets, num_targets: int | Tensor
) -> Loss:
    """Weigh the losses of targets: their cross-entropy, detached, and what is learned from, both (P,)."""
    budget_losses = cross_entropy.new_zeros(targets.num_budgets).index_add(0, targets.budgets, cross_entropy)
    # Where nothing is to be learned in the whole step the loss is 0, not 0 / 0.
    divisor = torch.as_tensor(num_targets, device=per_token.device).clamp(min=1)
    return Loss((targets.weights * per_token).sum() / divisor, budget_losses)


def with_auxiliary(
    loss: Loss,
    values: Mapping[str, Tensor],
    weights: Mapping[str, float],
    *,
    view_budgets: Tensor,
    view_weights: Tensor,
    num_targets: int | Tensor,
) -> Loss:
    """Add the auxiliary losses of views to a loss.

    Those of a view are weighed as its targets are together, so that the sum over micro-batches and processes is again
    the loss of one process that saw them all.

    Args:
        values: (B,) of each view, by name; 0 where a view has none.
        weights: by name. Sources: MoME (arXiv 2510.04136), whose balance weighs 0.01; see `sink` for another.
        view_budgets: (B,) which of the K budgets each view is at.
        view_weights: (B,) the weights of each view's targets, summed.
        num_targets: target tokens of the optimizer step, as `loss_of_logits` takes them.
    """
    total, logged = loss.total, {}
    for name, value in values.items():
        value = value.float()
        divisor = torch.as_tensor(num_targets, device=value.device).clamp(min=1)
        total = total + weights[name] * (value * view_weights).sum() / divisor
        value_and_count = torch.stack([value.detach(), (value.detach() != 0).float()])
        empty = value_and_count.new_zeros(2, len(loss.budget_losses))
        logged[name] = empty.index_add(1, view_budgets, value_and_count)
    return replace(loss, total=total, auxiliary=loss.auxiliary | logged)


def sink(hidden_states: Sequence[Tensor], attention_mask: Tensor) -> Tensor:
    """Measure how much the tokens of a row look like its first one: squared cosines, the mean over them and the layers.

    Source: Llama-AVSR's `--add-sink-loss` (arXiv 2510.22603), which weighs it 10,000.

    Args:
        hidden_states: (B, S, H) behind each layer, rows padded on the right.
        attention_mask: (B, S).

    Returns:
        (B,).
    """
    others = attention_mask[:, 1:].to(hidden_states[0].dtype)
    per_layer = []
    for hidden in hidden_states:
        cosines = functional.cosine_similarity(hidden[:, 1:].float(), hidden[:, :1].float(), dim=-1)
        per_layer.append((cosines.square() * others).sum(dim=1) / others.sum(dim=1).clamp(min=1))
    return torch.stack(per_layer).mean(dim=0)


def _distill(
    cross_entropy: Tensor, logits: Tensor, teacher_logits: Tensor, targets: WeightedTargets, distillation: Distillation
) -> Tensor:
    student = (logits / distillation.temperature).log_softmax(dim=-1)
    teacher = (teacher_logits / distillation.temperature).log_softmax(dim=-1)
    divergence = functional.kl_div(student, teacher, reduction="none", log_target=True).sum(dim=-1)
    weight = distillation.weight
    # The square makes up for gradients that shrink with it (Hinton et al.).
    mixed = (1 - weight) * cross_entropy + weight * distillation.temperature**2 * divergence
    return torch.where(targets.is_student, mixed, cross_entropy)
