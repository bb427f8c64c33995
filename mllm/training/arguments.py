"""Makes transformers' TrainingArguments of a run config, with what the elastic trainer needs beside them.

Knows both vocabularies. Does not know models or data; it must come before any model is made, since ZeRO-3 shards
weights while they are loaded.
"""

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from transformers import TrainingArguments

from mllm.config.run import RunConfig, SamplerConfig, TrainConfig
from mllm.training.fused_loss import check_liger
from mllm.training.loss import Distillation
from mllm.training.selection import Selection
from mllm.utils.distributed import world_size

_AT_THE_END = 2**31
"""As an interval of steps: never before the last one."""


@dataclass
class ElasticArguments(TrainingArguments):
    """Adds to TrainingArguments what only this trainer reads."""

    part_learning_rates: dict[str, float] = field(default_factory=dict)
    task_weights: dict[str, float] = field(default_factory=dict)
    sink_weight: float = 0.0
    distillation: Distillation | None = None
    has_frozen_teacher: bool = False
    packing: bool = True
    packed_attention: Literal["sdpa", "flex"] = "sdpa"
    memory: Literal["fast", "low"] = "fast"
    loss_kernel: Literal["torch", "liger"] = "torch"
    host_answer_tokens: int | None = None
    answered_samples: int = 0
    selection: Selection | None = None
    save_minutes: float | None = None
    watchdog_minutes: float | None = None
    shards_llm: bool = False
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def run(self) -> Path:
        """The run folder."""
        assert self.output_dir is not None
        return Path(self.output_dir)


def build_arguments(config: RunConfig, *, on_cpu: bool, shards_llm: bool = False) -> ElasticArguments:
    """Build the arguments of a run. Where it lasts for epochs, `max_steps` and the warm-up are put in once the data is
    known.

    Args:
        shards_llm: the launcher asks for FSDP2.

    Raises:
        ValueError: a loss kernel that cannot run here, a report to what is not installed, or what does not go with
            FSDP2.
    """
    train = config.train
    if shards_llm:
        check_fsdp2(config)
    check_reports(train.report_to)
    if train.loss_kernel == "liger":
        check_liger(on_cpu=on_cpu)
    return ElasticArguments(
        output_dir=train.out,
        max_steps=train.max_steps or 1,
        per_device_train_batch_size=1,  # batches are filled by tokens; DeepSpeed wants a number
        gradient_accumulation_steps=train.accumulation,
        learning_rate=train.learning_rate,
        weight_decay=train.weight_decay,
        adam_beta1=train.adam_betas[0],
        adam_beta2=train.adam_betas[1],
        max_grad_norm=train.max_grad_norm,
        lr_scheduler_type="cosine",
        warmup_steps=train.count_warmup_steps(train.max_steps or 1),
        logging_strategy="steps",
        logging_steps=train.log_every,
        logging_nan_inf_filter=False,  # what is not finite is refused, never averaged away
        eval_strategy="steps" if config.data.validation else "no",
        eval_steps=train.validate_every or _AT_THE_END,
        save_strategy="steps",
        save_steps=train.save_every or _AT_THE_END,
        save_total_limit=train.keep_checkpoints,
        bf16=train.precision == "bfloat16",
        use_cpu=on_cpu,
        seed=train.seed,
        remove_unused_columns=False,
        report_to=list(train.report_to),
        run_name=Path(train.out).name,
        disable_tqdm=not train.progress,
        ddp_find_unused_parameters=False,  # the model touches every branch on every process
        deepspeed=train.deepspeed,
        part_learning_rates={str(part): rate for part, rate in train.part_learning_rates.items()},
        task_weights=train.task_weights,
        sink_weight=train.sink_weight,
        distillation=distillation_of(config.sampler),
        has_frozen_teacher=config.sampler.has_frozen_teacher,
        packing=train.packing,
        packed_attention=train.packed_attention,
        memory=train.memory,
        loss_kernel=train.loss_kernel,
        host_answer_tokens=config.data.host_answer_tokens,
        answered_samples=train.answered_samples,
        selection=selection_of(train),
        save_minutes=train.save_minutes,
        watchdog_minutes=train.watchdog_minutes,
        shards_llm=shards_llm,
    )


def check_fsdp2(config: RunConfig) -> None:
    """Refuse what does not go with an LLM in shards, before anything is loaded.

    Raises:
        ValueError: by key, or that there is one process.
    """
    if world_size() == 1:
        raise ValueError("the launcher asks for FSDP2, which shards the LLM over processes, but started only one")
    if config.train.deepspeed is not None:
        raise ValueError("train.deepspeed does not go with FSDP2; use one of the two")
    if "llm" in config.parts:
        raise ValueError("train.parts with llm does not go with FSDP2, which shards what is frozen; use ZeRO-3")
    if config.train.memory == "low":
        raise ValueError("train.memory low does not go with FSDP2, where all processes run the same passes; use fast")
    if config.model.quantization is not None:
        raise ValueError("model.quantization does not go with FSDP2, which shards weights as they are; use DDP")


def selection_of(train: TrainConfig) -> Selection | None:
    """Say what a run keeps as its best, and when it ends early; None where it does neither.

    Raises:
        ValueError: a figure of which nobody said whether high or low is good.
    """
    if train.best_metric is None:
        return None
    return Selection.of(train.best_metric, best_is=train.best_is, patience=train.early_stopping)


def check_reports(names: Sequence[str]) -> None:
    """Refuse to report where what reports is not installed, before anything is loaded.

    Raises:
        ValueError: one that is not; says how to get it.
    """
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise ValueError(f"train.report_to names {name}, which is not installed: pip install {name}")


def distillation_of(sampler: SamplerConfig) -> Distillation | None:
    """Say how much budgets learn from their teacher, where there is one."""
    if not sampler.distills:
        return None
    return Distillation(weight=sampler.distill_weight or 0.0)
