"""Tries a run before it is started: builds it, runs one micro-batch at each budget, and says what it takes.

Knows a run config, its trainer, clocks and bytes. Nothing is written that stays.
"""

import resource
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mllm.budget import Budget
from mllm.checkpoints.auto_classes import register
from mllm.config.run import RunConfig
from mllm.processing.batch import Batch
from mllm.training.initialization.start_from import start_from
from mllm.training.memory import ModelMemory, memory_of
from mllm.training.pipeline.dataset import load_dataset
from mllm.training.run import build_model, build_trainer, launch, read_config, try_captions
from mllm.training.step import fixed_views, forward, make_training_batch, num_targets, total_loss
from mllm.training.trainer import ElasticTrainer
from mllm.utils.distributed import world_size

MAX_BUDGETS = 8
"""Where a run samples more budgets, so many of them are tried, evenly spread from the largest to the smallest."""
NUM_BATCHES_SEEN = 200
"""The fullest of so many first micro-batches is tried."""


@dataclass(frozen=True)
class BudgetCost:
    """Says what one micro-batch at one budget takes.

    Args:
        num_soft_tokens, num_tokens: of all its rows; soft ones are among the tokens.
        activation_bytes: what the forward pass keeps for the backward pass, each tensor once, parameters left out.
        seconds: of forward and backward.
    """

    budget: str
    num_soft_tokens: int
    num_tokens: int
    activation_bytes: int
    seconds: float
    loss: float


@dataclass(frozen=True)
class DryRun:
    """Holds what a dry run found.

    Args:
        costs: by budget, the largest first.
        step_seconds: one optimizer step with its sampled budgets, without loading data and without the update.
        num_steps: of the whole run.
        peak_bytes: most memory that was in use: of the GPU, or of the whole process on a CPU.
        num_rows: of the micro-batch.
    """

    memory: ModelMemory
    costs: Sequence[BudgetCost]
    step_seconds: float
    num_steps: int
    peak_bytes: int
    num_rows: int


def dry_run(config: RunConfig | Mapping[str, Any] | str | Path) -> DryRun:
    """Build a run and try one micro-batch, the fullest of the first ones, forward and backward at each budget.

    Features are not kept, so encoders are in every figure. Of captions, words learn one step, and nothing is fitted.

    Raises:
        ValueError: whatever would stop the run before its first step, or a launcher of several processes.
        OSError: a part, a word decoder or a run to start from that cannot be read.
        FloatingPointError: the loss is no number.
    """
    register()
    if world_size() > 1:
        raise ValueError(f"a dry run is of one process, and the launcher started {world_size()}")
    config = read_config(config)
    with tempfile.TemporaryDirectory() as folder:
        train = replace(config.train, out=folder, tensorboard=False, report_to=[], progress=False)
        data = replace(config.data, num_workers=0, features=None)
        config = replace(config, train=train, data=data)
        arguments = launch(config)
        dataset = load_dataset(config)
        model, processor = build_model(config)
        if config.train.start_from is not None:
            start_from(model, config.train.start_from)
        if config.data.captions:
            try_captions(config, arguments, model, processor, dataset)
            del dataset.samples["captions"]
        trainer = build_trainer(config, model, processor, dataset, arguments=arguments)
        inputs = _fullest_batch(trainer)
        batch: Batch = inputs["batch"]
        costs = [_cost_of(trainer, batch, budget) for budget in _budgets(trainer, batch)]
        started = time.perf_counter()
        trainer.training_step(model, inputs, torch.tensor(num_targets(batch.rows), device=arguments.device))
        seconds = (time.perf_counter() - started) * arguments.gradient_accumulation_steps
        model.zero_grad()
        return DryRun(memory_of(model), costs, seconds, arguments.max_steps, _peak_bytes(), len(batch.rows))


def _fullest_batch(trainer: ElasticTrainer) -> dict[str, Any]:
    """Load the first micro-batch of the run with the most tokens at the largest budget."""
    loader: Any = trainer.batches
    most, items = -1, []
    for keys in islice(loader.batch_sampler, min(NUM_BATCHES_SEEN, trainer.args.max_steps)):
        if (num_tokens := loader.batch_sampler.num_tokens(keys)) > most:
            # At once: a stream may delete what a batch is loaded from when the next one is chosen.
            most, items = num_tokens, loader.dataset.__getitems__(keys)
    return trainer.with_answers(loader.collate_fn(items))


def _budgets(trainer: ElasticTrainer, batch: Batch) -> list[Budget]:
    """List the budgets that the run samples for the media of a batch, the largest first."""
    media = {span.extent.medium for row in batch.rows for span in row.spans}
    budgets = trainer.sampler.possible(media)
    if len(budgets) <= MAX_BUDGETS:
        return budgets
    return [budgets[round(number * (len(budgets) - 1) / (MAX_BUDGETS - 1))] for number in range(MAX_BUDGETS)]


def _cost_of(trainer: ElasticTrainer, batch: Batch, budget: Budget) -> BudgetCost:
    """Run a batch forward and backward at one budget, as a step of that budget alone would."""
    args, model = trainer.args, trainer.elastic
    model.train()
    started = time.perf_counter()
    training_batch = make_training_batch(
        batch, fixed_views(batch.rows, [budget]), trainer.processor, packed=trainer.packs
    )
    count = num_targets(batch.rows)
    kept = _KeptBytes(model)
    with torch.autograd.graph.saved_tensors_hooks(kept.note, lambda tensor: tensor), trainer.accelerator.autocast():
        outputs = forward(
            model,
            training_batch,
            trainer.target_loss(training_batch, count),
            device=args.device,
            packed_attention=args.packed_attention,
            output_hidden_states=args.sink_weight > 0,
        )
        loss = total_loss(
            outputs, training_batch, config=model.config, num_targets=count, sink_weight=args.sink_weight
        ).total
    loss.backward()
    value = loss.item()
    seconds = time.perf_counter() - started
    model.zero_grad()
    if not torch.isfinite(torch.tensor(value)):
        raise FloatingPointError(f"the loss at {budget} is {value}")
    return BudgetCost(
        str(budget), training_batch.num_soft_tokens, training_batch.num_tokens, kept.num_bytes, seconds, value
    )


class _KeptBytes:
    """Adds up the bytes of the tensors that autograd keeps, each storage once; those of a model are not counted."""

    def __init__(self, model: nn.Module) -> None:
        own = (*model.parameters(), *model.buffers())
        self._seen = {tensor.untyped_storage().data_ptr() for tensor in own}
        self._kept: list[Tensor] = []  # a storage that is freed may be given out again
        self.num_bytes = 0

    def note(self, tensor: Tensor) -> Tensor:
        """Count a tensor that is being kept."""
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._seen:
            self._seen.add(storage.data_ptr())
            self._kept.append(tensor)
            self.num_bytes += storage.nbytes()
        return tensor


def _peak_bytes() -> int:
    if torch.cuda.is_available() and torch.cuda.max_memory_allocated() > 0:
        return torch.cuda.max_memory_allocated()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
