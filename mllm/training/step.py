"""Turns a batch into what one forward pass trains: rows at the sampled budgets, expanded, packed, run, and their loss.

Knows rows of encoded conversations, sampled budgets, and the model, wrapped or not. Does not know the optimizer,
processes or logs. `ElasticTrainer.training_step` is where these are called in turn.

Every row is run at the budgets of the step, restricted to the media it holds; budgets that then coincide are run once
and weigh their sum. So what a row adds to the loss depends on nothing else in its batch, and the sum over processes
equals one process, whichever media each of them holds.

Shapes: B views (a view is one row at one budget), P target tokens of all views, H hidden size, K budgets.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from mllm.budget import Budget, Space
from mllm.budget.sampler import BudgetSampler, SampledBudget
from mllm.model.configuration import ElasticConfig
from mllm.model.encoding import encode_media
from mllm.model.expert_losses import auxiliary_weights
from mllm.model.modeling import ElasticForConditionalGeneration, ElasticOutput, Features, TargetLoss
from mllm.packing.attention import PackedAttention, enable_packing, obstacle
from mllm.packing.pack import pack, packed_targets
from mllm.packing.plan import SegmentPlan
from mllm.processing.batch import Batch, EncodedSample, Expanded, num_prompt_tokens
from mllm.processing.placeholders import IGNORED_LABEL
from mllm.processing.processor import ElasticProcessor
from mllm.training.loss import Loss, WeightedTargets, sink, with_auxiliary

TEXT_ONLY = "text"
logger = logging.getLogger(__name__)


# ---- sample budgets: which rows run at which budgets ----


@dataclass(frozen=True)
class BudgetView:
    """Holds one row of a batch at one budget. `teacher` is the number of the view that teaches it, or its own."""

    row: int
    budget: Budget
    weight: float
    teacher: int

    @property
    def name(self) -> str:
        """The budget in words, as logs call it."""
        return str(self.budget) or TEXT_ONLY


def num_targets(rows: Sequence[EncodedSample]) -> int:
    """Count target tokens of rows, once whatever the number of budgets. The first token of a row is never one."""
    return sum(label != IGNORED_LABEL for row in rows for label in row.labels[1:])


def sampled_views(
    rows: Sequence[EncodedSample],
    sampler: BudgetSampler,
    step: int,
    task_weights: Mapping[str, float] | None = None,
    *,
    is_gated: bool = False,
) -> list[BudgetView]:
    """View every row at the step's budgets, weighed by the weight of its task (1 if not named).

    Args:
        is_gated: rows at the full budget have no adapter. Nothing is learned there, so such views weigh 0; they are
            what the others learn from.
    """
    budgets_by_row = [sampler(step, {span.extent.medium for span in row.spans}) for row in rows]
    if is_gated:
        budgets_by_row = [[_without_weight_at_full(one, sampler.space) for one in row] for row in budgets_by_row]
    views = _views(budgets_by_row)
    weights = task_weights or {}
    return [replace(view, weight=view.weight * weights.get(rows[view.row].task, 1.0)) for view in views]


def _without_weight_at_full(sampled: SampledBudget, space: Space) -> SampledBudget:
    """Let a budget that keeps all features of every medium weigh nothing; one that names no medium does."""
    is_full = all(amount == space.media[medium].trained[0] for medium, amount in sampled.budget.amounts.items())
    return replace(sampled, weight=0.0) if is_full else sampled


def fixed_views(rows: Sequence[EncodedSample], budgets: Sequence[Budget]) -> list[BudgetView]:
    """View every row at the same budgets, each weighing the same, as validation does."""
    return _views([[SampledBudget(budget) for budget in budgets] for _ in rows])


def _views(budgets_by_row: Sequence[Sequence[SampledBudget]]) -> list[BudgetView]:
    views: list[BudgetView] = []
    for row, budgets in enumerate(budgets_by_row):
        total = sum(sampled.weight for sampled in budgets)
        teacher = next((len(views) + index for index, sampled in enumerate(budgets) if sampled.is_teacher), None)
        for sampled in budgets:
            number = len(views)
            weight = sampled.weight / total if total else 0.0
            views.append(BudgetView(row, sampled.budget, weight, number if teacher is None else teacher))
    return views


def split_by_budget(views: Sequence[BudgetView], num_tokens: Sequence[int] | None = None) -> list[list[BudgetView]]:
    """Split views into as many groups as the row with most of them has: the first of every row, the second, ...

    A teacher stands in the first group, and `teacher` counts in that group; a view of the first is its own.

    Args:
        num_tokens: of each view, where they are going to be packed. Groups that have no more of them together than the
            largest has alone are then one: a pass holds no more than before, and there are fewer.
    """
    by_row: dict[int, list[int]] = {}
    for number, view in enumerate(views):
        by_row.setdefault(view.row, []).append(number)
    most = max(map(len, by_row.values()))
    groups = [[of_row[number] for of_row in by_row.values() if number < len(of_row)] for number in range(most)]
    number_of_row = {views[number].row: index for index, number in enumerate(groups[0])}
    if num_tokens is not None:
        groups = _merged(groups, num_tokens)
    return [[replace(views[number], teacher=number_of_row[views[number].row]) for number in group] for group in groups]


def _merged(groups: Sequence[list[int]], num_tokens: Sequence[int]) -> list[list[int]]:
    """Put groups of numbers together as long as none gets larger than the largest is; the first stays in front."""
    sizes = [sum(num_tokens[number] for number in group) for group in groups]
    most, merged, filled = max(sizes), [[*groups[0]]], [sizes[0]]
    for index in sorted(range(1, len(groups)), key=lambda index: -sizes[index]):
        fitting = [number for number, size in enumerate(filled) if size + sizes[index] <= most]
        if not fitting:
            merged.append([])
            filled.append(0)
        number = fitting[0] if fitting else -1
        merged[number] += groups[index]
        filled[number] += sizes[index]
    return merged


def tokens_of_views(rows: Sequence[EncodedSample], views: Sequence[BudgetView], space: Space) -> list[int]:
    """Count the tokens of each view by itself, soft ones included."""
    return [num_prompt_tokens(rows[view.row], rows[view.row].token_counts(view.budget, space)) for view in views]


def taught_by_rows(views: Sequence[BudgetView]) -> list[BudgetView]:
    """Let every view learn from another pass, which has one view per row, in order."""
    return [replace(view, teacher=view.row) for view in views]


# ---- expand and pack: the inputs of one forward pass ----


@dataclass(frozen=True)
class Teacher:
    """Holds the views that others learn from, where those run in a forward pass of their own.

    Args:
        starts: (B,) how many targets stand before those of each view.
        states: (P, H) hidden states at their targets, detached.
    """

    starts: Tensor
    states: Tensor


@dataclass(frozen=True)
class TrainingBatch:
    """Holds the inputs of one forward pass on the host, and what it should say.

    Args:
        inputs: arguments of the model.
        targets: what the logits at `positions` should say.
        positions: (P,) flat positions of the logits.
        view_budgets: (B,) int64, which of the K budgets each view is at.
        view_weights: (B,) the weights of each view's targets summed: the weight of a loss of the whole view.
        starts: (B,) how many targets stand before those of each view.
        names: the K budgets, in words.
        target_counts: target tokens per budget.
        num_soft_tokens: soft tokens of all views.
        num_tokens: tokens of all views, soft ones included, padding left out, shared ones once per view.
        plan: how the views are packed; None where they are padded.
    """

    inputs: dict[str, Tensor]
    targets: WeightedTargets
    positions: Tensor
    view_budgets: Tensor
    view_weights: Tensor
    starts: Tensor
    names: list[str]
    target_counts: list[int]
    num_soft_tokens: int
    num_tokens: int
    plan: SegmentPlan | None = None


def expand_views(batch: Batch, views: Sequence[BudgetView], processor: ElasticProcessor) -> Expanded:
    """Expand a batch to its views, padded; every medium of it is still encoded once.

    Raises:
        ValueError: a budget a row cannot meet; the sample is named.
    """
    rows = Batch([batch.rows[view.row] for view in views], batch.values)
    return processor.expand(rows, [[view.budget for view in views]], left_padding=False)


def pack_views(
    expanded: Expanded,
    views: Sequence[BudgetView],
    processor: ElasticProcessor,
    *,
    packed: bool,
    teacher: Teacher | None = None,
) -> TrainingBatch:
    """Lay expanded views out for one forward pass, and say what each of their targets should be.

    Args:
        packed: lay all views in one row that holds what they share once; otherwise they stay padded.
        teacher: the views that `teacher` of each view counts in; these here when left out.
    """
    expanded_targets = expanded.targets()
    view_of_target = expanded_targets.rows
    names = list(dict.fromkeys(view.name for view in views))
    view_budgets = torch.tensor([names.index(view.name) for view in views])
    target_budgets = view_budgets[view_of_target]
    per_view = torch.bincount(view_of_target, minlength=len(views))
    starts = per_view.cumsum(0) - per_view
    # Views of one row have the same targets, so a target's teacher has the same number among those of its own view.
    number_in_view = torch.arange(len(view_of_target)) - starts[view_of_target]
    teacher_view = torch.tensor([view.teacher for view in views])[view_of_target]
    targets = WeightedTargets(
        ids=expanded_targets.ids,
        weights=torch.tensor([view.weight for view in views])[view_of_target],
        budgets=target_budgets,
        teachers=(starts if teacher is None else teacher.starts)[teacher_view] + number_in_view,
        num_budgets=len(names),
        students=None if teacher is None else torch.ones_like(number_in_view, dtype=torch.bool),
    )
    inputs, plan, positions = expanded.inputs, None, expanded_targets.positions
    if packed:
        inputs, plan = pack(inputs, space=processor.space, placeholder_ids=processor.placeholder_ids)
        positions = packed_targets(plan, positions)
    return TrainingBatch(
        inputs=inputs,
        targets=targets,
        positions=positions,
        view_budgets=view_budgets,
        view_weights=torch.zeros(len(views)).index_add(0, view_of_target, targets.weights),
        starts=starts,
        names=names,
        target_counts=torch.bincount(target_budgets, minlength=len(names)).tolist(),
        num_soft_tokens=sum(count.tokens for counts in expanded.token_counts for count in counts),
        num_tokens=int(expanded.inputs["attention_mask"].sum()),
        plan=plan,
    )


def make_training_batch(
    batch: Batch, views: Sequence[BudgetView], processor: ElasticProcessor, *, packed: bool = False
) -> TrainingBatch:
    """Expand and pack views in one call.

    Raises:
        ValueError: see `expand_views`.
    """
    return pack_views(expand_views(batch, views, processor), views, processor, packed=packed)


# ---- forward and loss ----


def prepare_packing(model: ElasticForConditionalGeneration, processor: ElasticProcessor) -> bool:
    """Let a model read packed rows where it can, and say in the log why where it cannot."""
    llm = model.model.language_model
    reason = obstacle(llm)
    if processor.shares_lengths:
        reason = "with model.released_behaviour the padding of clips counts, and packed rows have none"
    if not processor.shares_beginnings:
        reason = "the images of this host see themselves in both directions"
    if reason is not None:
        logger.warning("the views of a step are padded and not packed: %s", reason)
        return False
    if getattr(model.config.adapter, "dropout", 0):
        logger.warning("model.adapter.dropout: what packed views share is dropped alike in all of them")
    enable_packing(llm)
    return True


def frozen_features(model: ElasticForConditionalGeneration, batch: Batch, device: torch.device) -> dict[str, Features]:
    """Encode a batch once with the frozen encoders, by medium; encoders that train are left to the forward pass."""
    return encode_media(model, batch.values, device, frozen_only=True)


def forward(
    model: Callable[..., ElasticOutput],
    training_batch: TrainingBatch,
    target_loss: TargetLoss,
    *,
    device: torch.device,
    features: Mapping[str, Features] | None = None,
    packed_attention: PackedAttention = "sdpa",
    output_hidden_states: bool = False,
) -> ElasticOutput:
    """Send a training batch to the device and run the model, which computes the loss of its targets on the way.

    Args:
        model: wrapped or not.
        target_loss: of the targets of this batch, on the device.
        features: see `frozen_features`.
        output_hidden_states: also return those of every layer.
    """
    inputs: dict[str, Any] = {key: value.to(device, non_blocking=True) for key, value in training_batch.inputs.items()}
    if training_batch.plan is not None:
        inputs |= {"plan": training_batch.plan.to(device), "packed_attention": packed_attention}
    return model(
        **inputs,
        logit_positions=training_batch.positions.to(device, non_blocking=True),
        features=features,
        target_loss=target_loss,
        use_cache=False,
        output_hidden_states=output_hidden_states,
    )


def total_loss(
    outputs: ElasticOutput,
    training_batch: TrainingBatch,
    *,
    config: ElasticConfig,
    num_targets: Tensor | int,
    sink_weight: float = 0.0,
) -> Loss:
    """Add the auxiliary losses of a forward pass to the loss of its targets.

    Args:
        outputs: of `forward`; with a sink loss, all hidden states are among them.
        config: of the model.
        num_targets: target tokens of the optimizer step, see `loss_of_logits`.
        sink_weight: of the sink loss; it is not computed at 0.
    """
    assert outputs.loss is not None
    assert outputs.budget_losses is not None
    device = outputs.loss.device
    auxiliary: dict[str, Tensor] = outputs.auxiliary or {}
    if sink_weight > 0:
        assert outputs.hidden_states is not None
        hidden_states = outputs.hidden_states[1:]
        if training_batch.plan is not None:
            plan = training_batch.plan.to(device)
            hidden_states, mask = [plan.unpack(states) for states in hidden_states], plan.rows >= 0
        else:
            mask = training_batch.inputs["attention_mask"].to(device, non_blocking=True)
        auxiliary = {**auxiliary, "sink": sink(hidden_states, mask)}
    return with_auxiliary(
        Loss(outputs.loss, outputs.budget_losses),
        auxiliary,
        {**auxiliary_weights(config), "sink": sink_weight},
        view_budgets=training_batch.view_budgets.to(device),
        view_weights=training_batch.view_weights.to(device),
        num_targets=num_targets,
    )
