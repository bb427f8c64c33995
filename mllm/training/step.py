"""One forward pass over a lesson and its loss, and what several passes over one batch may share.

Knows the model, wrapped or not, and lessons. Does not know draws, the optimizer, processes or logs.
"""

import logging
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from mllm.model.backbone import SIZE_KEYS, VALUE_KEYS, Features
from mllm.model.configuration import ElasticConfig
from mllm.model.modeling import ElasticForConditionalGeneration, auxiliary_weights
from mllm.packing.attention import PackedAttention, enable_packing, obstacle
from mllm.processing.batch import Batch
from mllm.processing.processor import ElasticProcessor
from mllm.training.budget_rows import Lesson
from mllm.training.fused_loss import read_fused
from mllm.training.loss import Distillation, Loss, read_hidden, sink, with_auxiliary

logger = logging.getLogger(__name__)


def prepare_packing(model: ElasticForConditionalGeneration, processor: ElasticProcessor) -> bool:
    """Let a model read packed rows where it can, and say in the log why where it cannot."""
    llm = model.model.language_model
    reason = obstacle(llm)
    if processor.shares_lengths:
        reason = "with model.shares_lengths the padding of clips counts, and packed rows have none"
    if reason is not None:
        logger.warning("the passes of a step are padded and not packed: %s", reason)
        return False
    if (model.config.adapter or {}).get("dropout", 0):
        logger.warning("adapter.dropout: what packed passes share is dropped alike in all of them")
    enable_packing(llm)
    return True


def frozen_features(model: ElasticForConditionalGeneration, batch: Batch, device: torch.device) -> dict[str, Features]:
    """What the frozen encoders make of a batch, by medium; encoders that train are left to the forward pass."""
    features = {}
    for medium, key in VALUE_KEYS.items():
        if (values := batch.values.get(key)) is None:
            continue
        if any(parameter.requires_grad for parameter in model.model.tower(medium).parameters()):
            continue
        sizes = batch.values.get(SIZE_KEYS[medium])
        sizes = None if sizes is None else sizes.to(device, non_blocking=True)
        features[medium] = model.model.encode(medium, values.to(device, non_blocking=True), sizes)
    return features


def run_lesson(
    model: nn.Module,
    lesson: Lesson,
    num_targets: Tensor | int,
    *,
    config: ElasticConfig,
    device: torch.device,
    packed_attention: PackedAttention = "sdpa",
    sink_weight: float = 0.0,
    fused_head: nn.Linear | None = None,
    **given: Any,
) -> tuple[Loss, Tensor]:
    """Send a lesson to the device and run it.

    Args:
        model: wrapped or not. config: its own.
        num_targets: see `objective`.
        sink_weight: of the sink loss; it is not computed at 0.
        fused_head: reads hidden states by Liger's kernel instead of logits; see `plain_head`.
        given: distillation, teachers: see `read_hidden`. features: see `frozen_features`.

    Returns:
        The loss, and the hidden states (P, H) at the targets, detached.

    Raises:
        ValueError: distillation, which compares logits, with a fused head.
    """
    inputs: dict[str, Any] = {key: value.to(device, non_blocking=True) for key, value in lesson.inputs.items()}
    plan = None
    if lesson.plan is not None:
        plan = lesson.plan.to(device)
        inputs |= {"plan": plan, "packed_attention": packed_attention}
    features: Mapping[str, Features] | None = given.get("features")
    distillation: Distillation | None = given.get("distillation")
    targets: dict[str, Any] = {"supervision": lesson.supervision.to(device), "num_targets": num_targets}
    if fused_head is not None:
        if distillation is not None:
            raise ValueError("train.loss_kernel liger makes no logits for distillation to compare; use torch")
        reader = partial(read_fused, linear=fused_head, **targets)
    else:
        reader = partial(
            read_hidden,
            distillation=distillation,
            teachers=given.get("teachers"),
            vocabulary=config.get_text_config().vocab_size,
            **targets,
        )
    outputs = model(
        **inputs,
        logit_positions=lesson.positions.to(device, non_blocking=True),
        features=features,
        reader=reader,
        use_cache=False,
        output_hidden_states=sink_weight > 0,
    )
    auxiliary: dict[str, Tensor] = outputs.auxiliary or {}
    if sink_weight > 0:
        hidden, mask = outputs.hidden_states[1:], inputs.get("attention_mask")
        if plan is not None:
            hidden, mask = [plan.unpack(own) for own in hidden], plan.rows >= 0
        assert mask is not None
        auxiliary = {**auxiliary, "sink": sink(hidden, mask)}
    loss = with_auxiliary(
        Loss(outputs.loss, outputs.read["sums"]),
        auxiliary,
        {**auxiliary_weights(config), "sink": sink_weight},
        budgets=lesson.pass_budgets.to(device),
        shares=lesson.shares.to(device),
        num_targets=num_targets,
    )
    return replace(loss, usage=outputs.expert_usage), outputs.read["hidden"]
