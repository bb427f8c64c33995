"""The loss of a pass over many budgets: cross-entropy per target token, and distillation from the largest budget.

Knows logits at label positions and what each of them is worth. Does not know rows, budgets as words, or the model.

Shapes: P target tokens of all passes of a micro-batch, V vocabulary, K budgets that occur in it.
A pass is one row at one budget; the targets of a row are the same, in the same order, in each of its passes.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

CHUNK_BYTES = 1 << 30
"""Logits beyond so many bytes in float32 are made and read piece by piece."""
Head = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Supervision:
    """What the logits should say, and what each of them is worth.

    Args:
        ids: (P,) the right tokens.
        weights: (P,) float, the weight of the target's pass; the weights of the passes of a row sum to 1.
        budgets: (P,) int64, which of the K budgets the target's pass was run at.
        teachers: (P,) int64, the same target in the pass that teaches; its own index where nothing does.
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

    def _map(self, change: Callable[[Tensor], Tensor]) -> "Supervision":
        values = (self.ids, self.weights, self.budgets, self.teachers)
        return Supervision(*map(change, values), num_budgets=self.num_budgets, students=change(self.is_student))

    def to(self, device: torch.device) -> "Supervision":
        """The same on a device."""
        return self._map(lambda value: value.to(device, non_blocking=True))

    def part(self, kept: slice) -> "Supervision":
        """Some of the targets; teachers are counted as before."""
        return self._map(lambda value: value[kept])


@dataclass(frozen=True)
class Distillation:
    """How much of a student's loss comes from its teacher, and how soft both distributions are made."""

    weight: float
    temperature: float = 1.0


@dataclass(frozen=True)
class Loss:
    """The loss to differentiate; detached, for the log, the cross-entropy summed per budget (K,), and what was added.

    `auxiliary` (2, K) by name: the sum of an auxiliary loss over the passes at each budget, and how many had one.
    `usage` counts the choices of experts (see the model's `expert_usage`); nothing where the adapter has no experts.
    """

    total: Tensor
    sums: Tensor
    auxiliary: dict[str, Tensor] = field(default_factory=dict)
    usage: Tensor | None = None


def objective(
    logits: Tensor, supervision: Supervision, num_targets: int | Tensor, distillation: Distillation | None = None
) -> Loss:
    """Weighted mean over the passes of the mean over target tokens.

    `num_targets` counts the targets of the whole optimizer step once, whatever the number of passes: over all its
    micro-batches and processes. So the sum of this loss over micro-batches and processes is the loss of one process
    that saw them all.

    With distillation a student's loss is `(1 - weight) * CE + weight * temperature^2 * KL(teacher || student)`, the
    teacher's logits being those of this very pass, detached. Sources: Hinton et al. (arXiv 1503.02531); in-place
    distillation of slimmable networks (arXiv 1903.05134).

    Args:
        logits: (P, V) at label positions.
        num_targets: target tokens of the optimizer step.
    """
    logits = logits.float()
    taught = logits.detach()[supervision.teachers] if distillation is not None else None
    cross_entropy, per_token = _token_losses(logits, taught, supervision, distillation)
    return weighted(cross_entropy, per_token, supervision, num_targets)


def read_hidden(
    head: Head,
    hidden: Tensor,
    *,
    supervision: Supervision,
    num_targets: int | Tensor,
    distillation: Distillation | None = None,
    teachers: Tensor | None = None,
    vocabulary: int,
    chunk_bytes: int = CHUNK_BYTES,
) -> dict[str, Tensor]:
    """The same loss of hidden states, whose logits are never all there at once where they would be large.

    They are then made piece by piece, and again in the backward pass.

    Args:
        head: hidden states (n, H) -> logits (n, V).
        hidden: (P, H).
        teachers: (P', H) hidden states that `supervision.teachers` counts in; these here when left out.
        vocabulary: V.
        chunk_bytes: most bytes of the logits of a piece, in float32.

    Returns:
        `loss`; `sums` (K,) as `Loss` has them; `hidden` as given, detached.
    """
    size = max(chunk_bytes // (4 * vocabulary), 1)
    if size >= len(hidden) and (teachers is None or distillation is None):
        loss = objective(head(hidden), supervision, num_targets, distillation)
        return {"loss": loss.total, "sums": loss.sums, "hidden": hidden.detach()}
    known = hidden.detach() if teachers is None else teachers

    def read(piece: Tensor, own: Supervision) -> tuple[Tensor, Tensor]:
        taught = None
        if distillation is not None:
            with torch.no_grad():
                taught = head(known[own.teachers]).float()
        return _token_losses(head(piece).float(), taught, own, distillation)

    parts = []
    for start in range(0, max(len(hidden), 1), size):
        piece, own = hidden[start : start + size], supervision.part(slice(start, start + size))
        parts.append(read(piece, own) if size >= len(hidden) else checkpoint(read, piece, own, use_reentrant=False))
    cross_entropy, per_token = (torch.cat(own) for own in zip(*parts, strict=True))
    loss = weighted(cross_entropy, per_token, supervision, num_targets)
    return {"loss": loss.total, "sums": loss.sums, "hidden": hidden.detach()}


def _token_losses(
    logits: Tensor, taught: Tensor | None, supervision: Supervision, distillation: Distillation | None
) -> tuple[Tensor, Tensor]:
    """Cross-entropy, detached, and what is learned from, both (P,)."""
    per_token = functional.cross_entropy(logits, supervision.ids, reduction="none")
    cross_entropy = per_token.detach()
    if distillation is not None and distillation.weight > 0:
        assert taught is not None
        per_token = _distill(per_token, logits, taught, supervision, distillation)
    return cross_entropy, per_token


def weighted(cross_entropy: Tensor, per_token: Tensor, supervision: Supervision, num_targets: int | Tensor) -> Loss:
    """The loss of targets: their cross-entropy, detached, and what is learned from, both (P,)."""
    sums = cross_entropy.new_zeros(supervision.num_budgets).index_add(0, supervision.budgets, cross_entropy)
    # Where nothing is to be learned in the whole step the loss is 0, not 0 / 0.
    divisor = torch.as_tensor(num_targets, device=per_token.device).clamp(min=1)
    return Loss((supervision.weights * per_token).sum() / divisor, sums)


def with_auxiliary(
    loss: Loss,
    values: Mapping[str, Tensor],
    weights: Mapping[str, float],
    *,
    budgets: Tensor,
    shares: Tensor,
    num_targets: int | Tensor,
) -> Loss:
    """The loss with the auxiliary losses of its passes added.

    Those of a pass are worth its share of the targets, so that the sum over micro-batches and processes is again the
    loss of one process that saw them all.

    Args:
        values: (B,) of each pass, by name; 0 where a pass has none.
        weights: by name. Sources: MoME (arXiv 2510.04136), whose balance weighs 0.01; see `sink` for another.
        budgets: (B,) which of the K budgets each pass was run at.
        shares: (B,) the weights of each pass's targets, summed.
        num_targets: target tokens of the optimizer step, as `objective` takes them.
    """
    total, logged = loss.total, {}
    for name, own in values.items():
        own = own.float()
        divisor = torch.as_tensor(num_targets, device=own.device).clamp(min=1)
        total = total + weights[name] * (own * shares).sum() / divisor
        known = torch.stack([own.detach(), (own.detach() != 0).float()])
        logged[name] = known.new_zeros(2, len(loss.sums)).index_add(1, budgets, known)
    return replace(loss, total=total, auxiliary=loss.auxiliary | logged)


def sink(hidden_states: Sequence[Tensor], attention_mask: Tensor) -> Tensor:
    """How much the tokens of a row look like its first one: squared cosines, the mean over them and the layers.

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
    cross_entropy: Tensor, logits: Tensor, taught: Tensor, supervision: Supervision, distillation: Distillation
) -> Tensor:
    students = (logits / distillation.temperature).log_softmax(dim=-1)
    targets = (taught / distillation.temperature).log_softmax(dim=-1)
    divergence = functional.kl_div(students, targets, reduction="none", log_target=True).sum(dim=-1)
    weight = distillation.weight
    mixed = (1 - weight) * cross_entropy + weight * distillation.temperature**2 * divergence
    return torch.where(supervision.is_student, mixed, cross_entropy)
