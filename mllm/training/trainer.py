"""The training loop: transformers' Trainer, with many budgets per step.

Knows the model, its processor, draws and batches. Does not know files of samples or metrics of answers.

One micro-batch: rows -> passes (every row at the step's budgets) -> expanded and packed on the host -> one transfer ->
one forward through the wrapped model, encoders once -> logits at label positions only -> one loss -> one backward. With
little memory the passes go in groups, one budget of every row each: one forward and one backward per group, all on the
same features. Losses and gradients are the same.

Every random number of a step is a function of (seed, step, micro-batch, process), and the batches are a function of
(seed, epoch): there is no generator state to keep, and a resumed run equals the uninterrupted one bit for bit.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
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
from mllm.budget.sampler import Sampler
from mllm.checkpoints.load import load_trainables, trainable_state
from mllm.model.modeling import ElasticForConditionalGeneration
from mllm.model.trainables import trainable_names
from mllm.processing.batch import Batch
from mllm.processing.processor import ElasticProcessor
from mllm.training.arguments import ElasticArguments
from mllm.training.budget_rows import Lesson, by_draw, drawn_passes, fixed_passes, make_lesson, num_targets
from mllm.training.checkpoint import TRAINABLES, TrainingState, load_progress, read_tensors, save_checkpoint
from mllm.training.experts import ExpertUsage
from mllm.training.fused_loss import plain_head
from mllm.training.logs import RunFlow, RunLog, RunProgress, Tally, gather_json
from mllm.training.loss import Loss
from mllm.training.optimization import check_gradients, moments_of, named_groups, set_moments
from mllm.training.step import frozen_features, prepare_packing, run_lesson
from mllm.training.throughput import Pace, mean_of

Metric = Callable[[ElasticForConditionalGeneration, ElasticProcessor], Mapping[str, float]]
"""Metrics of answers by name; called on every process, with the model in eval mode."""


@dataclass(frozen=True)
class Validation:
    """What a run validates on: batches of this process, budgets, and metrics the caller brings.

    Args:
        batches: the same number on every process; where there are fewer, the last ones repeat and are not counted.
        own: how many of them count.
    """

    batches: DataLoader[Any]
    own: int
    budgets: Sequence[Budget]
    metric: Metric | None = None


class ElasticTrainer(Trainer):
    """Trains one set of weights at many budgets.

    Args:
        model: what trains has `requires_grad`, and nothing else has.
        args: see `build_arguments`.
        processor: expands rows to budgets.
        sampler: the draws of a step.
        batches: micro-batches of this process, each `{"batch": Batch}`, without a length.
        validation: nothing to leave it out.
        tensorboard: also log there.
    """

    args: ElasticArguments
    loss_is_scaled_for_ga = True

    def __init__(
        self,
        model: ElasticForConditionalGeneration,
        args: ElasticArguments,
        *,
        processor: ElasticProcessor,
        sampler: Sampler,
        batches: DataLoader[Any],
        validation: Validation | None = None,
        tensorboard: bool = False,
    ) -> None:
        had_cache = "use_cache" in vars(model.config)
        log = RunLog(args.run, tensorboard=tensorboard, num_workers=batches.num_workers)
        callbacks = [log, RunFlow(validates=validation is not None)]
        super().__init__(model, args, eval_dataset=cast(Any, validation), callbacks=cast(Any, callbacks))
        if not had_cache:  # Trainer switches the cache off in the config, and generation would find it off
            delattr(model.config, "use_cache")
        if args.memory == "low" and self.is_deepspeed_enabled:
            raise ValueError("train.memory low does not go with DeepSpeed, which counts backward passes; use fast")
        self.remove_callback(PrinterCallback)
        if self.pop_callback(ProgressCallback) is not None:
            self.add_callback(RunProgress)
        self.elastic = model
        self.processor = processor
        self.draws = sampler
        self.batches = batches
        self.validation = validation
        self.names: list[list[str]] = []
        self.tally = Tally()
        self.experts = ExpertUsage()
        self.pace = Pace([model.model.tower(medium) for medium in model.model.compressors])
        self.packs = args.packing and prepare_packing(model, processor)
        self.fused_head = plain_head(model) if args.loss_kernel == "liger" else None
        self._reported_step = 0
        self._micro_batch = (-1, 0)

    def checkpoint_activations(self) -> None:
        """Compute the LLM's layers again in the backward pass; frozen encoders keep nothing to begin with."""
        llm = self.elastic.model.language_model
        # transformers 5.23 calls it after activations and keeps the older name until version 6
        enable = getattr(llm, "activation_checkpointing_enable", llm.gradient_checkpointing_enable)
        enable({"use_reentrant": False})

    # ---- data ----

    def get_train_dataloader(self) -> DataLoader[Any]:
        """The micro-batches of this process; they are split over processes already."""
        return self.batches

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Tensor | int | None]:
        """The micro-batches of a step; the wait for them is taken."""
        return super().get_batch_samples(self.pace.batches(epoch_iterator), num_batches, device)

    def _get_num_items_in_batch(self, batch_samples: list[dict[str, Batch]], device: torch.device) -> Tensor:
        """Target tokens of the optimizer step: over its micro-batches and all processes, once per token."""
        own = sum(num_targets(sample["batch"].rows) for sample in batch_samples)
        counted = self.accelerator.gather(torch.tensor([own], device=device))
        return cast(Tensor, counted).sum()

    # ---- one micro-batch ----

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """One forward and one backward; seeded by what it is."""
        step = self.state.global_step
        micro_batch = self._micro_batch[1] + 1 if self._micro_batch[0] == step else 0
        self._micro_batch = (step, micro_batch)
        seed_of = np.random.SeedSequence([self.args.seed, step, micro_batch, self.args.process_index])
        torch.manual_seed(int(seed_of.generate_state(1, np.uint64)[0] >> np.uint64(1)))
        with self.pace.watch.measure("step"):
            return super().training_step(model, inputs, num_items_in_batch)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The loss of a micro-batch at the step's draws, scaled so that the mean over processes is the whole.

        Raises:
            FloatingPointError: a loss that is infinite or no number, before anything learns from it.
        """
        assert num_items_in_batch is not None
        batch: Batch = inputs["batch"]
        passes = drawn_passes(batch.rows, self.draws, self.state.global_step, self.args.task_weights)
        groups = by_draw(passes) if self.args.memory == "low" else [passes]
        features = frozen_features(self.elastic, batch, self.args.device) if len(groups) > 1 else {}
        first: Lesson | None = None
        teachers: Tensor | None = None
        total = torch.zeros((), device=self.args.device)
        for number, group in enumerate(groups):
            is_last = number + 1 == len(groups)
            lesson = make_lesson(batch, group, self.processor, packed=self.packs, taught_by=first)
            with nullcontext() if is_last else self.accelerator.no_sync(model):
                loss, hidden = self._run(
                    model,
                    lesson,
                    num_items_in_batch,
                    distillation=self.args.distillation,
                    teachers=teachers,
                    features=features,
                )
                self._count(batch, lesson, loss)
                own = loss.total * self.accelerator.num_processes
                if not is_last:
                    self.accelerator.backward(own)
                    own = own.detach()
                total = total + own
            if number == 0:
                first, teachers = lesson, hidden
        return (total, {}) if return_outputs else total

    def _count(self, batch: Batch, lesson: Lesson, loss: Loss) -> None:
        """Keep what the log will say.

        Raises:
            FloatingPointError: as `compute_loss`.
        """
        if not torch.isfinite(loss.total.detach()):
            rows = ", ".join(dict.fromkeys(row.sample_id for row in batch.rows))
            raise FloatingPointError(
                f"the loss of step {self.state.global_step + 1} is {loss.total.item()} for samples {rows}; nothing was "
                "updated"
            )
        self.tally.add(lesson, loss.sums, loss.auxiliary)
        if loss.usage is not None:
            self.experts.add(lesson.names, lesson.pass_budgets, loss.usage)

    def _run(self, model: nn.Module, lesson: Lesson, targets: Tensor | int, **given: Any) -> tuple[Loss, Tensor]:
        return run_lesson(
            model,
            lesson,
            targets,
            config=self.elastic.config,
            device=self.args.device,
            packed_attention=self.args.packed_attention,
            sink_weight=self.args.sink_weight if model.training else 0.0,
            fused_head=self.fused_head,
            **given,
        )

    # ---- the optimizer ----

    def create_optimizer(self, model: Any = None) -> Optimizer:
        """AdamW over what trains, by part and kind."""
        if self.optimizer is None:
            groups = named_groups(
                self.elastic,
                learning_rate=self.args.learning_rate,
                part_learning_rates=self.args.part_learning_rates,
                weight_decay=self.args.weight_decay,
            )
            self.names = [group.pop("names") for group in groups]
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
        """Loss per budget over the validation samples of all processes, and the caller's metrics."""
        assert self.validation is not None
        wrapped = cast(nn.Module, self.model_wrapped if self.is_deepspeed_enabled else self.elastic)
        wrapped.eval()
        tally = Tally()
        for index, inputs in enumerate(self.validation.batches):
            batch: Batch = inputs["batch"]
            passes = fixed_passes(batch.rows, self.validation.budgets)
            lesson = make_lesson(batch, passes, self.processor, packed=self.packs)
            with torch.no_grad(), self.accelerator.autocast():  # not around the loader, which computes features too
                loss, _ = self._run(wrapped, lesson, num_targets(batch.rows))
            if index < self.validation.own:
                tally.add(lesson, loss.sums)
        losses = tally.losses(self.accelerator)
        metrics = {f"{metric_key_prefix}_loss/{name}": value for name, value in losses.items()}
        metrics[f"{metric_key_prefix}_loss"] = sum(losses.values()) / len(losses)
        if self.validation.metric is not None:
            extra = self.validation.metric(self.elastic, self.processor)
            metrics |= {f"{metric_key_prefix}_{name}": value for name, value in extra.items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Report, with the losses per budget and the costs since the last report where it is one of training."""
        if "loss" in logs:
            steps = self.state.global_step - self._reported_step
            logs |= self.tally.report(self.accelerator, steps)
            logs |= mean_of(gather_json(self.accelerator, self.pace.take()), steps)
            self.tally, self._reported_step = Tally(), self.state.global_step
            if (self.elastic.config.adapter or {}).get("kind") == "mome":
                self.experts.report(self.accelerator, self.state.global_step, self.args.run)
        cast(Any, self.state).epoch = None  # to transformers the whole run is one epoch, which would only mislead
        super().log(logs, start_time)

    # ---- checkpoints ----

    def trainables(self) -> dict[str, Tensor]:
        """What trains, whole, on the CPU; a collective under DeepSpeed."""
        if self.is_deepspeed_enabled and self.deepspeed is not None:
            from mllm.training.sharding import gather_trainables

            return gather_trainables(self.deepspeed)
        return trainable_state(self.elastic)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        trainables, moments = self.trainables(), self._moments()
        if self.args.should_save:
            schedule = cast(LRScheduler, self.lr_scheduler).state_dict()
            plain = {
                "learning_rates": [group["lr"] for group in cast(Optimizer, self.optimizer).param_groups],
                "schedule": {key: value for key, value in schedule.items() if key != "lr_lambdas"},
            }
            state = TrainingState(
                trainables,
                moments,
                plain,
                json.dumps(asdict(self.state), indent=1),
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
        return moments_of(_plain(self.optimizer), self.names)

    def _prepare_for_training(self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: str | None) -> Any:
        """Wrap the model and make the optimizer, then put a checkpoint back into both."""
        prepared = super()._prepare_for_training(max_steps, train_dataloader, None)
        self._reported_step = self.state.global_step
        if resume_from_checkpoint is not None:
            self._restore(Path(resume_from_checkpoint))
        return prepared

    def _restore(self, folder: Path) -> None:
        moments, plain = load_progress(folder)
        if self.is_deepspeed_enabled:
            from mllm.training.sharding import scatter

            scatter(self.deepspeed, read_tensors(folder / TRAINABLES), moments)
        else:
            load_trainables(self.elastic, folder / TRAINABLES, trainable_names(self.elastic))
            set_moments(_plain(self.optimizer), self.names, moments)
        groups = cast(Optimizer, self.optimizer).param_groups
        for group, rate in zip(groups, plain["learning_rates"], strict=True):
            group["lr"] = rate
        schedule = cast(LRScheduler, self.lr_scheduler)
        schedule.load_state_dict({**schedule.state_dict(), **plain["schedule"]})

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Nothing yet: weights are put back together with the optimizer, once the model is wrapped."""

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """Nothing: there is no generator state, see the file's docstring."""


def _plain(optimizer: Any) -> Optimizer:
    """torch's optimizer, which accelerate has wrapped."""
    return getattr(optimizer, "optimizer", optimizer)
