"""Trains one set of weights at many budgets: transformers' Trainer with a step of its own.

Knows the model, its processor, sampled budgets and batches. Does not know files of samples or metrics of answers.

`training_step` is one micro-batch: rows at the step's budgets -> expanded and packed on the host -> one transfer -> one
forward through the wrapped model, encoders once, logits at label positions only -> one loss -> one backward. With
little memory the views go in groups, one budget of every row each, or several small ones that have no more tokens than
the largest: one forward and one backward per group, all on the same features. Losses and gradients are the same.

Every random number of a step is a function of (seed, step, micro-batch, process), and the batches are a function of
(seed, epoch): there is no generator state to keep, and a resumed run equals the uninterrupted one bit for bit.
"""

import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import DataLoader
from transformers import PrinterCallback, ProgressCallback, Trainer

from mllm.budget import Budget
from mllm.budget.sampler import BudgetSampler
from mllm.checkpoints.load import load_trainables, trainable_state, values_of
from mllm.checkpoints.tensor_files import num_bytes_of
from mllm.config.model import MomeConfig
from mllm.model.modeling import ElasticForConditionalGeneration, Features, TargetLoss
from mllm.model.trainables import held_names, is_sharded, saved_names, trainable_names, trains_in_shards
from mllm.processing.batch import Batch
from mllm.processing.processor import ElasticProcessor
from mllm.training.arguments import ElasticArguments
from mllm.training.checkpoint import TRAINABLES, TrainingState, load_progress, read_tensors, save_checkpoint
from mllm.training.experts import ExpertUsage
from mllm.training.frozen_teacher import TEACHER, FrozenTeacher
from mllm.training.fused_loss import FusedTargetLoss, plain_head
from mllm.training.host_answers import answered_by_host
from mllm.training.interruption import SaveOnTime, StopOnRequest, StopRequest
from mllm.training.llm_shards import averaging_gradients
from mllm.training.logs import RunFlow, RunLog, RunProgress, Tally
from mllm.training.loss import ChunkedTargetLoss, Loss
from mllm.training.optimization import check_gradients, moments_of, named_groups, set_moments
from mllm.training.pipeline.worker_errors import readable_errors
from mllm.training.selection import keep_best
from mllm.training.step import (
    BudgetView,
    Teacher,
    TrainingBatch,
    expand_views,
    fixed_views,
    forward,
    frozen_features,
    make_training_batch,
    num_targets,
    pack_views,
    prepare_packing,
    sampled_views,
    split_by_budget,
    taught_by_rows,
    tokens_of_views,
    total_loss,
)
from mllm.training.throughput import Pace, mean_of
from mllm.utils.activity import note_activity
from mllm.utils.distributed import gather_json
from mllm.utils.fail_points import fail_point
from mllm.utils.files import digest_of_file
from mllm.utils.json_text import json_text

logger = logging.getLogger(__name__)
SLOWEST_BYTES_PER_SECOND = 20 * 2**20
"""Of a save on a disk that many write to; the watchdog leaves a process alone for as long as that takes."""
Metric = Callable[[ElasticForConditionalGeneration, ElasticProcessor], Mapping[str, float]]
"""Metrics of answers by name; called on every process, with the model in eval mode."""


@dataclass(frozen=True)
class Validation:
    """Holds what a run validates on: batches of this process, budgets, and metrics the caller brings.

    Args:
        batches: the same number on every process; where there are fewer, the last ones repeat and are not counted.
        num_counted: how many of them count.
    """

    batches: DataLoader[Any]
    num_counted: int
    budgets: Sequence[Budget]
    metric: Metric | None = None


class ElasticTrainer(Trainer):
    """Trains one set of weights at many budgets.

    Args:
        model: what trains has `requires_grad`, and nothing else has.
        args: see `build_arguments`.
        processor: expands rows to budgets.
        sampler: samples the budgets of a step.
        batches: micro-batches of this process, each `{"batch": Batch}`, without a length.
        validation: None to leave it out.
        tensorboard: also log there.
    """

    args: ElasticArguments

    def __init__(
        self,
        model: ElasticForConditionalGeneration,
        args: ElasticArguments,
        *,
        processor: ElasticProcessor,
        sampler: BudgetSampler,
        batches: DataLoader[Any],
        validation: Validation | None = None,
        tensorboard: bool = False,
    ) -> None:
        had_cache = "use_cache" in vars(model.config)
        log = RunLog(args.run, tensorboard=tensorboard, num_workers=batches.num_workers)
        self.stop, self.save_on_time = StopOnRequest(StopRequest()), SaveOnTime(args.save_minutes)
        callbacks = [log, self.stop, self.save_on_time, RunFlow(validates=validation is not None)]
        super().__init__(model, args, eval_dataset=cast(Any, validation), callbacks=cast(Any, callbacks))
        if not had_cache:  # Trainer switches the cache off in the config, and generation would find it off
            delattr(model.config, "use_cache")
        answering = {
            "data.host_answer_tokens": args.host_answer_tokens,
            "train.answered_samples": args.answered_samples,
        }
        for key, number in answering.items():
            if number and is_sharded(model):
                raise ValueError(f"{key} does not go with ZeRO-3 or FSDP2, which keep no layer whole; use ZeRO-2")
        if args.memory == "low" and self.is_deepspeed_enabled:
            raise ValueError("train.memory low does not go with DeepSpeed, which counts backward passes; use fast")
        if args.has_frozen_teacher and trains_in_shards(model):
            raise ValueError("sampler.teacher frozen does not go with ZeRO-3, which keeps no layer whole; use ZeRO-2")
        self.remove_callback(PrinterCallback)
        if self.pop_callback(ProgressCallback) is not None:
            self.add_callback(RunProgress)
        self.elastic = model
        self.processor = processor
        self.sampler = sampler
        self.batches = batches
        self.validation = validation
        self.parameter_names: list[list[str]] = []
        self.tally = Tally()
        self.experts = ExpertUsage()
        self.pace = Pace([model.model.encoder(medium) for medium in model.model.compressors])
        self.packs = args.packing and prepare_packing(model, processor)
        self.frozen_teacher: FrozenTeacher | None = None  # made when training starts
        self.fused_head = plain_head(model) if args.loss_kernel == "liger" else None
        self._reported_step = 0
        self._seeded_step, self._micro_batch = -1, 0

    def checkpoint_activations(self) -> None:
        """Compute the LLM's layers again in the backward pass; frozen encoders keep nothing to begin with."""
        llm = self.elastic.model.language_model
        # transformers 5.23 calls it after activations and keeps the older name until version 6
        enable = getattr(llm, "activation_checkpointing_enable", llm.gradient_checkpointing_enable)
        enable({"use_reentrant": False})

    # ---- data ----

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Return the micro-batches of this process; they are split over processes already."""
        return self.batches

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Tensor | int | None]:
        """Get the micro-batches of a step, timing the wait for them."""
        note_activity(f"waiting for the batches of step {self.state.global_step + 1}")
        batches = self.pace.batches(readable_errors(epoch_iterator))
        return super().get_batch_samples(map(self.with_answers, batches), num_batches, device)

    def with_answers(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Let a host answer what has no answer, before targets are counted; what it encodes for that is kept."""
        if self.args.host_answer_tokens is None:
            return inputs
        batch: Batch = inputs["batch"]
        features = frozen_features(self.elastic, batch, self.args.device)
        answered = answered_by_host(
            batch, self.elastic, self.processor, features=features, max_new_tokens=self.args.host_answer_tokens
        )
        return {**inputs, "batch": answered, "features": features}

    def _get_num_items_in_batch(self, batch_samples: list[dict[str, Batch]], device: torch.device) -> Tensor:
        """Count target tokens of the optimizer step: over its micro-batches and all processes, once per token.

        The processes also agree here on what one of them alone knows: a signal, and that it is time to save.
        """
        count = sum(num_targets(sample["batch"].rows) for sample in batch_samples)
        is_due = self.save_on_time.is_due and self.args.process_index == 0
        on_this_process = torch.tensor([[count, self.stop.request.number, int(is_due)]])  # (1, 3)
        if self.args.world_size == 1:
            everywhere = on_this_process
        else:
            everywhere = cast(Tensor, self.accelerator.gather(on_this_process.to(device)))  # (P, 3)
            self.stop.request.agreed_number = int(everywhere[:, 1].max())
            is_due = bool(everywhere[:, 2].max())
        self.save_on_time.is_agreed = is_due
        return everywhere[:, 0].sum().to(device)

    # ---- one micro-batch ----

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """Sample budgets, expand, pack, run forward, compute the loss, run backward: one micro-batch at its budgets.

        Returns:
            The detached loss, scaled so that the mean over processes is that of the whole step.

        Raises:
            FloatingPointError: a loss that is infinite or no number, before anything learns from it.
        """
        assert num_items_in_batch is not None
        batch: Batch = inputs["batch"]
        args, step, device = self.args, self.state.global_step, self.args.device
        self._seed_micro_batch(step)
        note_activity(f"step {step + 1}, micro-batch {self._micro_batch + 1}", [row.sample_id for row in batch.rows])
        fail_point("step.begin")
        model.train()
        with self.pace.watch.measure("step"):
            is_gated = self.processor.expert_names.is_gate
            views = sampled_views(batch.rows, self.sampler, step, args.task_weights, is_gated=is_gated)
            groups = self._groups(batch, views)
            features = inputs.get("features", {})
            if (len(groups) > 1 or self.frozen_teacher is not None) and not features:
                features = frozen_features(self.elastic, batch, device)
            teacher = self._frozen_teacher_states(batch, features)
            if teacher is not None:
                groups = [taught_by_rows(group) for group in groups]
            step_loss = torch.zeros((), device=device)
            for number, group in enumerate(groups, start=1):
                expanded = expand_views(batch, group, self.processor)
                training_batch = pack_views(expanded, group, self.processor, packed=self.packs, teacher=teacher)
                # Processes exchange gradients once per micro-batch, in the last backward.
                with nullcontext() if number == len(groups) else self.accelerator.no_sync(model):
                    outputs = forward(
                        model,
                        training_batch,
                        self.target_loss(training_batch, num_items_in_batch, teacher),
                        device=device,
                        features=features,
                        packed_attention=args.packed_attention,
                        output_hidden_states=args.sink_weight > 0,
                    )
                    loss = total_loss(
                        outputs,
                        training_batch,
                        config=self.elastic.config,
                        num_targets=num_items_in_batch,
                        sink_weight=args.sink_weight,
                    )
                    self._record(batch, training_batch, loss, outputs.expert_usage)
                    # Gradients are averaged over processes; the loss is a sum over them.
                    scaled = loss.total * self.accelerator.num_processes
                    # DeepSpeed would divide by the accumulation once more, though the loss is of the whole step.
                    self.accelerator.backward(scaled, **({"scale_wrt_gas": False} if self.is_deepspeed_enabled else {}))
                teacher = teacher or Teacher(training_batch.starts, cast(Tensor, outputs.target_states))
                step_loss += scaled.detach()
                del outputs  # with a sink loss it holds all hidden states, which the next group needs the memory of
        if self.is_deepspeed_enabled and self.accelerator.sync_gradients:
            from mllm.training.sharding import check_sharded_gradients

            check_sharded_gradients(self.deepspeed, step + 1)
        fail_point("step.end")
        return step_loss

    def _groups(self, batch: Batch, views: Sequence[BudgetView]) -> list[list[BudgetView]]:
        """Split the views of a step into those of one forward pass each."""
        if self.args.memory != "low":
            return [[*views]]
        merged = tokens_of_views(batch.rows, views, self.processor.space) if self.packs else None
        return split_by_budget(views, merged)

    def _frozen_teacher_states(self, batch: Batch, features: Mapping[str, Features]) -> Teacher | None:
        """Compute what all budgets learn from, where a frozen copy of what trains teaches."""
        if self.frozen_teacher is None:
            return None
        with self.accelerator.autocast():
            return self.frozen_teacher.states(
                batch,
                self.processor,
                features=features,
                device=self.args.device,
                packed=self.packs,
                packed_attention=self.args.packed_attention,
            )

    def _seed_micro_batch(self, step: int) -> None:
        """Seed dropout by what the micro-batch is, not by what ran before it."""
        self._micro_batch = self._micro_batch + 1 if self._seeded_step == step else 0
        self._seeded_step = step
        sequence = np.random.SeedSequence([self.args.seed, step, self._micro_batch, self.args.process_index])
        torch.manual_seed(int(sequence.generate_state(1, np.uint64)[0] >> np.uint64(1)))

    def target_loss(
        self, training_batch: TrainingBatch, num_targets: Tensor | int, teacher: Teacher | None = None
    ) -> TargetLoss:
        """Return what computes the loss of a batch's targets: the cross-entropy, distilled as the config says.

        Raises:
            ValueError: distillation, which compares logits, with a fused head.
        """
        targets = training_batch.targets.to(self.args.device)
        distillation = self.args.distillation if self.elastic.training else None
        if self.fused_head is not None:
            if distillation is not None:
                raise ValueError("train.loss_kernel liger makes no logits for distillation to compare; use torch")
            return FusedTargetLoss(targets, num_targets, self.fused_head)
        return ChunkedTargetLoss(
            targets,
            num_targets,
            vocabulary_size=self.elastic.config.get_text_config().vocab_size,
            distillation=distillation,
            teacher_states=None if teacher is None else teacher.states,
        )

    def _record(
        self, batch: Batch, training_batch: TrainingBatch, loss: Loss, expert_usage: Tensor | None = None
    ) -> None:
        """Keep what the log will say.

        Raises:
            FloatingPointError: as `training_step`.
        """
        if not torch.isfinite(loss.total.detach()):
            rows = ", ".join(dict.fromkeys(row.sample_id for row in batch.rows))
            raise FloatingPointError(
                f"the loss of step {self.state.global_step + 1} is {loss.total.item()} for samples {rows}; nothing was "
                "updated"
            )
        self.tally.add(training_batch, loss.budget_losses, loss.auxiliary)
        if expert_usage is not None:
            self.experts.add(training_batch.names, training_batch.view_budgets, expert_usage)

    # ---- wrapping ----

    def _wrap_model(self, model: nn.Module, training: bool = True, dataloader: Any = None) -> nn.Module:
        """Wrap also what accelerate refuses to wrap for DDP: a model whose frozen LLM is in shards."""
        if not training or not is_sharded(self.elastic) or self.is_deepspeed_enabled or model is not self.elastic:
            return super()._wrap_model(model, training, dataloader)
        return averaging_gradients(self.accelerator.prepare_model(model, evaluation_mode=True))  # autocast alone

    # ---- the optimizer ----

    def create_optimizer(self, model: Any = None) -> Optimizer:
        """Make AdamW over what trains, by part and kind."""
        if self.optimizer is None:
            groups = named_groups(
                self.elastic,
                learning_rate=self.args.learning_rate,
                part_learning_rates=self.args.part_learning_rates,
                weight_decay=self.args.weight_decay,
            )
            self.parameter_names = [group.pop("names") for group in groups]
            betas = (self.args.adam_beta1, self.args.adam_beta2)
            self.optimizer = torch.optim.AdamW(groups, betas=betas, eps=self.args.adam_epsilon)
            if not self.is_deepspeed_enabled:  # there the gradients are in shards and never None
                self.optimizer.register_step_pre_hook(self._before_update)
        return self.optimizer

    def _before_update(self, optimizer: Optimizer, *_: Any) -> None:
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        check_gradients(parameters, self.state.global_step + 1)

    # ---- validation and log ----

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Compute the loss per budget over the validation samples of all processes, and the caller's metrics."""
        assert self.validation is not None
        wrapped = cast(nn.Module, self.model_wrapped if self.is_deepspeed_enabled else self.elastic)
        wrapped.eval()
        tally = Tally()
        for index, inputs in enumerate(readable_errors(iter(self.validation.batches))):
            batch: Batch = self.with_answers(inputs)["batch"]
            note_activity("validation", [row.sample_id for row in batch.rows])
            views = fixed_views(batch.rows, self.validation.budgets)
            training_batch = make_training_batch(batch, views, self.processor, packed=self.packs)
            target_loss = self.target_loss(training_batch, num_targets(batch.rows))
            with torch.no_grad(), self.accelerator.autocast():  # not around the loader, which computes features too
                outputs = forward(
                    wrapped,
                    training_batch,
                    target_loss,
                    device=self.args.device,
                    packed_attention=self.args.packed_attention,
                )
            if index < self.validation.num_counted:
                assert outputs.budget_losses is not None
                tally.add(training_batch, outputs.budget_losses)
        losses = tally.losses()
        metrics = {f"{metric_key_prefix}_loss/{name}": value for name, value in losses.items()}
        metrics[f"{metric_key_prefix}_loss"] = sum(losses.values()) / len(losses)
        if self.validation.metric is not None:
            note_activity("the metric of answers", extra_seconds=math.inf)
            extra = self.validation.metric(self.elastic, self.processor)
            metrics |= {f"{metric_key_prefix}_{name}": value for name, value in extra.items()}
        self.log(metrics)
        self._select()
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _select(self) -> None:
        """Keep what is trained where the last validation was the best, and stop where none was for long enough."""
        if (selection := self.args.selection) is None:
            return
        standing = selection.standing(self.state.log_history)
        if standing.is_best:
            trainables = self.trainables()
            note_activity("keeping the best model", extra_seconds=_seconds_to_save(trainables.values()))
            if self.args.should_save:
                keep_best(self.elastic, self.processor, self.args.run, trainables, standing)
            self.accelerator.wait_for_everyone()
        if selection.is_over(standing):
            logger.info("%s: this run ends early", standing)
            self.control.should_save = self.control.should_training_stop = True

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Report; a report of training gets the losses per budget and the costs since the last one."""
        if "loss" in logs:
            steps = self.state.global_step - self._reported_step
            logs |= self.tally.report(steps)
            logs |= mean_of(gather_json(self.pace.take()), steps)
            self.tally, self._reported_step = Tally(), self.state.global_step
            if isinstance(self.elastic.config.adapter, MomeConfig):
                self.experts.report(self.accelerator, self.state.global_step, self.args.run)
        cast(Any, self.state).epoch = None  # to transformers the whole run is one epoch, which would only mislead
        super().log(logs, start_time)

    # ---- checkpoints ----

    def trainables(self) -> dict[str, Tensor]:
        """Gather what trains, whole, on the CPU; a collective under DeepSpeed."""
        if self.is_deepspeed_enabled and self.deepspeed is not None:
            from mllm.training.sharding import gather_trainables

            return gather_trainables(self.deepspeed) | values_of(self.elastic, held_names(self.elastic))
        return trainable_state(self.elastic)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        note_activity(f"gathering the checkpoint of step {self.state.global_step}")
        trainables, moments = self.trainables(), self._moments()
        seconds = _seconds_to_save([*trainables.values(), *moments.values()])
        note_activity(f"saving the checkpoint of step {self.state.global_step}", extra_seconds=seconds)
        if self.args.should_save:
            schedule = cast(LRScheduler, self.lr_scheduler).state_dict()
            plain = {
                "learning_rates": [group["lr"] for group in cast(Optimizer, self.optimizer).param_groups],
                "schedule": {key: value for key, value in schedule.items() if key != "lr_lambdas"},
            }
            if self.frozen_teacher is not None:
                plain["teacher"] = digest_of_file(self.args.run / TEACHER)
            state = TrainingState(
                trainables,
                moments,
                plain,
                json_text(asdict(self.state), indent=1),
                self.elastic.config.to_json_string(),
            )
            facts = {**self.args.facts, "processes": self.args.world_size}
            keep = self.args.save_total_limit or 1
            save_checkpoint(self.args.run, self.state.global_step, state, facts=facts, keep=keep)
        self.accelerator.wait_for_everyone()

    def _moments(self) -> dict[str, Tensor]:
        if self.is_deepspeed_enabled:
            from mllm.training.sharding import gather_moments

            return gather_moments(self.deepspeed)
        return moments_of(_plain(self.optimizer), self.parameter_names)

    def _prepare_for_training(self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: str | None) -> Any:
        """Wrap the model and make the optimizer, then put a checkpoint back into both."""
        prepared = super()._prepare_for_training(max_steps, train_dataloader, None)
        self._reported_step = self.state.global_step
        if resume_from_checkpoint is not None:
            self._restore(Path(resume_from_checkpoint))
        elif self.args.has_frozen_teacher:  # of the wrapped model, which is the same on all processes
            self.frozen_teacher = FrozenTeacher.of(self.elastic)
            if self.args.should_save:
                self.frozen_teacher.write(self.args.run)
        return prepared

    def _restore(self, folder: Path) -> None:
        fail_point("load.checkpoint")
        moments, plain = load_progress(folder)
        if self.args.has_frozen_teacher:
            self.frozen_teacher = FrozenTeacher.read(self.elastic, self.args.run, plain["teacher"])
        if self.is_deepspeed_enabled:
            from mllm.training.sharding import scatter

            held, trained = held_names(self.elastic), trainable_names(self.elastic)
            load_trainables(self.elastic, folder / TRAINABLES, held, beside=trained)
            values = read_tensors(folder / TRAINABLES)
            scatter(self.deepspeed, {name: value for name, value in values.items() if name not in held}, moments)
        else:
            load_trainables(self.elastic, folder / TRAINABLES, saved_names(self.elastic))
            set_moments(_plain(self.optimizer), self.parameter_names, moments)
        groups = cast(Optimizer, self.optimizer).param_groups
        for group, rate in zip(groups, plain["learning_rates"], strict=True):
            group["lr"] = rate
        schedule = cast(LRScheduler, self.lr_scheduler)
        schedule.load_state_dict({**schedule.state_dict(), **plain["schedule"]})

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Do nothing yet: weights are put back together with the optimizer, once the model is wrapped."""

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """Do nothing: there is no generator state, see the file's docstring."""


def _seconds_to_save(tensors: Iterable[Tensor]) -> float:
    """Return how long it may take to write tensors and read them again for their digests; a hang takes longer."""
    return num_bytes_of(tensors) / SLOWEST_BYTES_PER_SECOND


def _plain(optimizer: Any) -> Optimizer:
    """Return torch's optimizer, which accelerate has wrapped."""
    return getattr(optimizer, "optimizer", optimizer)
