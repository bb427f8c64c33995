"""Which rows run at which budgets in one forward pass, and what each of their targets is worth.

Knows rows of encoded conversations and draws. Does not know the model, devices or the optimizer.

Every row is run at the draws of the step, restricted to the media it holds; draws that then coincide are run once and
weigh their sum. So what a row adds to the loss depends on nothing else in its batch, and the sum over processes equals
one process, whichever media each of them holds.

Shapes: B passes, P target tokens of all passes.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mllm.budget import Budget
from mllm.budget.sampler import Draw, Sampler
from mllm.packing.pack import pack, packed_targets
from mllm.packing.plan import SegmentPlan
from mllm.processing.batch import Batch, Expanded, Row, with_items
from mllm.processing.placeholders import IGNORED_LABEL
from mllm.processing.processor import ElasticProcessor
from mllm.training.loss import Supervision

TEXT_ONLY = "text"


@dataclass(frozen=True)
class Pass:
    """One row at one budget. `teacher` is the pass of the same row it learns from, or its own index."""

    row: int
    budget: Budget
    weight: float
    teacher: int

    @property
    def name(self) -> str:
        """The budget in words, as logs call it."""
        return str(self.budget) or TEXT_ONLY


@dataclass(frozen=True)
class Lesson:
    """The inputs of one forward pass on the host, and its supervision.

    Args:
        inputs: arguments of the model.
        plan: how the passes are packed, for the model; nothing where they are padded.
        positions: (P,) flat positions of the logits.
        pass_budgets: (B,) int64, which of the K budgets each pass is run at.
        starts: (B,) how many targets stand before those of each pass.
        shares: (B,) the weights of each pass's targets summed: what a loss of the whole pass is worth.
        names: the K budgets of the supervision, in words.
        counts: target tokens per budget.
        soft_tokens: soft tokens of all passes.
        tokens: tokens of all passes, soft ones included, padding left out, shared ones once per pass.
    """

    inputs: dict[str, Tensor]
    positions: Tensor
    supervision: Supervision
    pass_budgets: Tensor
    starts: Tensor
    shares: Tensor
    names: list[str]
    counts: list[int]
    soft_tokens: int
    tokens: int
    plan: SegmentPlan | None = None


def num_targets(rows: Sequence[Row]) -> int:
    """Target tokens of rows, counted once whatever the number of budgets. The first token of a row is never one."""
    return sum(label != IGNORED_LABEL for row in rows for label in row.labels[1:])


def drawn_passes(
    rows: Sequence[Row], sampler: Sampler, step: int, task_weights: Mapping[str, float] | None = None
) -> list[Pass]:
    """The passes of a training step: every row at the step's draws, worth what its task is worth (1 if not named)."""
    passes = _passes([sampler(step, {run.extent.medium for run in row.runs}) for row in rows])
    worth = task_weights or {}
    return [replace(own, weight=own.weight * worth.get(rows[own.row].task, 1.0)) for own in passes]


def fixed_passes(rows: Sequence[Row], budgets: Sequence[Budget]) -> list[Pass]:
    """The passes of a validation step: every row at the same budgets, each weighing the same."""
    return _passes([[Draw(budget) for budget in budgets] for _ in rows])


def _passes(draws_by_row: Sequence[Sequence[Draw]]) -> list[Pass]:
    passes: list[Pass] = []
    for row, draws in enumerate(draws_by_row):
        total = sum(draw.weight for draw in draws)
        teacher = next((len(passes) + index for index, draw in enumerate(draws) if draw.is_teacher), None)
        for draw in draws:
            own = len(passes)
            passes.append(Pass(row, draw.budget, draw.weight / total, own if teacher is None else teacher))
    return passes


def by_draw(passes: Sequence[Pass]) -> list[list[Pass]]:
    """The passes in as many groups as the row with most of them has: the first of every row, the second, ...

    A teacher stands in the first group, and `teacher` counts in that group; a pass of the first is its own.
    """
    drawn: dict[int, list[Pass]] = {}
    for own in passes:
        drawn.setdefault(own.row, []).append(own)
    groups = [
        [own[number] for own in drawn.values() if number < len(own)] for number in range(max(map(len, drawn.values())))
    ]
    place = {own.row: index for index, own in enumerate(groups[0])}
    return [[replace(own, teacher=place[own.row]) for own in group] for group in groups]


def make_lesson(
    batch: Batch,
    passes: Sequence[Pass],
    processor: ElasticProcessor,
    *,
    packed: bool = False,
    taught_by: Lesson | None = None,
) -> Lesson:
    """Expand a batch to its passes; every medium of it is still encoded once.

    Args:
        packed: lay all passes in one row that holds what they share once, instead of padding them.
        taught_by: the lesson that `teacher` of each pass counts in; this one when left out.

    Raises:
        ValueError: a budget a row cannot meet; the sample is named.
    """
    rows = Batch([batch.rows[own.row] for own in passes], batch.values)
    expanded = processor.expand(rows, [[own.budget for own in passes]], left_padding=False)
    targets = expanded.targets()
    names = list(dict.fromkeys(own.name for own in passes))
    budget_of = torch.tensor([names.index(own.name) for own in passes])
    budgets = budget_of[targets.rows]
    per_pass = torch.bincount(targets.rows, minlength=len(passes))
    starts = per_pass.cumsum(0) - per_pass
    number = torch.arange(len(targets.rows)) - starts[targets.rows]  # of each target in its pass
    teacher = torch.tensor([own.teacher for own in passes])[targets.rows]
    supervision = Supervision(
        ids=targets.ids,
        weights=torch.tensor([own.weight for own in passes])[targets.rows],
        budgets=budgets,
        teachers=(starts if taught_by is None else taught_by.starts)[teacher] + number,
        num_budgets=len(names),
        students=None if taught_by is None else torch.ones_like(number, dtype=torch.bool),
    )
    inputs, plan, positions = expanded.inputs, None, targets.positions
    if packed:
        inputs, plan = pack(inputs, space=processor.space, placeholder_ids=processor.placeholder_ids)
        positions = packed_targets(plan, positions)
    elif taught_by is not None:  # rows may have been left out, so that run i need not show item i
        inputs = with_items(inputs)
    return Lesson(
        inputs=inputs,
        plan=plan,
        positions=positions,
        supervision=supervision,
        pass_budgets=budget_of,
        starts=starts,
        shares=torch.zeros(len(passes)).index_add(0, targets.rows, supervision.weights),
        names=names,
        counts=torch.bincount(budgets, minlength=len(names)).tolist(),
        soft_tokens=sum(cost.tokens for costs in expanded.token_counts for cost in costs),
        tokens=_num_tokens(expanded),
    )


def _num_tokens(expanded: Expanded) -> int:
    return int(expanded.inputs["attention_mask"].sum())
