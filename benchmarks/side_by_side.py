"""Holds what the training benchmarks share: a small model, equal gradients, interleaved times and one table.

Not run by itself. Baselines are written on the weights of the same model, so that losses and gradients can be compared.
"""

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from outcomes import append, goal_text, timed
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from transformers import LlamaConfig, PreTrainedConfig
from turns import in_turns, ratio_of, spread, unprepared

from mllm.budget import Budget
from mllm.checkpoints.build import config_of_parts, put_adapters
from mllm.config.model import ModelConfig
from mllm.config.processor import ProcessorConfig
from mllm.data.manifest import Media, Medium, Message, Sample, Text
from mllm.evaluation.flops import llm_flops
from mllm.model.configuration import ElasticConfig
from mllm.model.modeling import ElasticForConditionalGeneration, Features
from mllm.model.trainables import set_trainables
from mllm.packing.attention import enable_packing
from mllm.packing.plan import SegmentPlan
from mllm.processing.batch import Batch
from mllm.processing.processor import PLACEHOLDER_TOKENS, ElasticProcessor, LoadedMedia
from mllm.synthetic.tokenizer import build_tokenizer
from mllm.training.loss import ChunkedTargetLoss
from mllm.training.step import (
    BudgetView,
    TrainingBatch,
    fixed_views,
    forward,
    frozen_features,
    make_training_batch,
    num_targets,
    split_by_budget,
    tokens_of_views,
    total_loss,
)

HEAD_FRACTION_VOCABULARY = 6568
"""Words at which the head of the LLM below is 21 % of the FLOPs of a token, as in Llama-3.2-1B."""
TOKENIZER = build_tokenizer()
CPU = torch.device("cpu")
WORD = "the"


def llm_config(**changes: Any) -> LlamaConfig:
    """Configure a Llama of 4 layers, 512 wide."""
    sizes = {
        "vocab_size": HEAD_FRACTION_VOCABULARY,
        "hidden_size": 512,
        "intermediate_size": 1376,
        "num_hidden_layers": 4,
        "num_attention_heads": 8,
        "num_key_value_heads": 8,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": False,
        "pad_token_id": TOKENIZER.pad_token_id,
        "eos_token_id": TOKENIZER.eos_token_id,
    }
    return LlamaConfig(**{**sizes, **changes})


def build(
    settings: ModelConfig, encoders: Mapping[str, PreTrainedConfig], **text: Any
) -> tuple[ElasticForConditionalGeneration, ElasticProcessor]:
    """Build a model with random weights, its adapter in place, and its processor."""
    torch.manual_seed(0)
    model = ElasticForConditionalGeneration(build_config(settings, encoders, **text))
    put_adapters(model)
    for name, weight in model.named_parameters():
        if ".lora_B" in name:  # zero at first, so that the gradient of lora_A would be too
            weight.data.normal_(std=0.02)
    set_trainables(model)
    enable_packing(model.model.language_model)
    return model.train(), build_processor(settings, encoders)


def build_processor(settings: ModelConfig, encoders: Mapping[str, PreTrainedConfig]) -> ElasticProcessor:
    """Build the processor of such a model, which needs no weights."""
    kept = ProcessorConfig(chat_format="plain", preprocessors={medium: {} for medium in encoders})
    return ElasticProcessor(TOKENIZER, build_config(settings, encoders), kept)


def build_config(settings: ModelConfig, encoders: Mapping[str, PreTrainedConfig], **text: Any) -> ElasticConfig:
    """Build the config of such a model."""
    ids = TOKENIZER.convert_tokens_to_ids
    return config_of_parts(
        settings,
        text_config=llm_config(**text),
        encoder_configs=encoders,
        placeholder_ids={medium: cast(int, ids(PLACEHOLDER_TOKENS[medium])) for medium in encoders},
    )


def words(count: int) -> str:
    """Write a text of so many tokens."""
    return " ".join([WORD] * count)


def rows_of(processor: ElasticProcessor, rows: Sequence[tuple[Sequence[str | LoadedMedia], str]]) -> Batch:
    """Make a training batch of (user parts, answer)."""
    samples, media = [], []
    for number, (parts, answer) in enumerate(rows):
        prompt = tuple(
            Text(part) if isinstance(part, str) else Media(cast(Medium, part.medium), "none") for part in parts
        )
        messages = (Message("user", prompt), Message("assistant", (Text(answer),)))
        samples.append(Sample(f"row{number}", messages, task="benchmark"))
        media.append([part for part in parts if isinstance(part, LoadedMedia)])
    return processor.batch(samples, media, for_training=True)


def packed_step(
    model: ElasticForConditionalGeneration, processor: ElasticProcessor, batch: Batch, budgets: Sequence[Budget]
) -> float:
    """Go forward and backward once over all budgets, from the rows of a batch on; return the loss."""
    return _learn(model, processor, batch, [fixed_views(batch.rows, budgets)])


def low_memory_step(
    model: ElasticForConditionalGeneration, processor: ElasticProcessor, batch: Batch, budgets: Sequence[Budget]
) -> float:
    """Go forward and backward once per group of budgets on the same features; return the loss."""
    views = fixed_views(batch.rows, budgets)
    return _learn(model, processor, batch, split_by_budget(views, tokens_of_views(batch.rows, views, processor.space)))


def _learn(
    model: ElasticForConditionalGeneration,
    processor: ElasticProcessor,
    batch: Batch,
    groups: Sequence[list[BudgetView]],
) -> float:
    features = frozen_features(model, batch, CPU)
    return sum(
        learn(model, make_training_batch(batch, group, processor, packed=True), num_targets(batch.rows), features)
        for group in groups
    )


def learn(
    model: ElasticForConditionalGeneration,
    training_batch: TrainingBatch,
    targets: int,
    features: Mapping[str, Features] | None,
) -> float:
    """Run forward, loss and backward as the trainer does; return the loss."""
    target_loss = ChunkedTargetLoss(
        training_batch.targets, targets, vocabulary_size=model.config.get_text_config().vocab_size
    )
    outputs = forward(model, training_batch, target_loss, device=CPU, features=features)
    loss = total_loss(outputs, training_batch, config=model.config, num_targets=targets).total
    loss.backward()
    return loss.item()


def packed_llm_flops(config: Any, plan: SegmentPlan, *, num_logits: int) -> int:
    """Count by the FLOP model the LLM's forward pass over a packed row."""
    text, adapter = config.text_config, config.adapter
    body = sum(
        llm_flops(text, num_tokens=segment.length, past_tokens=segment.num_visible, adapter=adapter)
        for segment in plan.segments
    )
    return body + llm_flops(text, num_tokens=0, num_logits=num_logits)


def check_equal(
    model: nn.Module, runs: Mapping[str, Callable[[], float]], *, loss_rel: float = 1e-5, gradient_rel: float = 1e-5
) -> float:
    """Measure the largest relative difference of any gradient to that of the first run.

    Raises:
        SystemExit: a loss or a gradient that differs by more.
    """
    losses, gradients = {}, {}
    for name, run in runs.items():
        model.zero_grad(set_to_none=True)
        losses[name] = run()
        every = {key: weight.grad.clone() for key, weight in model.named_parameters() if weight.grad is not None}
        gradients[name] = {key: gradient for key, gradient in every.items() if gradient.any()}
    model.zero_grad(set_to_none=True)
    first, *others = runs
    largest = max(gradient.norm() for gradient in gradients[first].values())
    worst = 0.0
    for name in others:
        if abs(losses[name] - losses[first]) > loss_rel * abs(losses[first]):
            raise SystemExit(f"FAILED: the loss of {name} is {losses[name]}, that of {first} {losses[first]}")
        for key in gradients[first].keys() | gradients[name].keys():
            missing = torch.zeros(())
            gradient, wanted = gradients[name].get(key, missing), gradients[first].get(key, missing)
            if wanted.norm() < 1e-6 * largest and gradient.norm() < 1e-6 * largest:
                continue  # rounding in both
            difference = float((gradient - wanted).norm() / wanted.norm())
            if difference > gradient_rel:
                raise SystemExit(f"FAILED: the gradient of {key} by {name} differs by {difference:.1e}")
            worst = max(worst, difference)
    return worst


def alternate(model: nn.Module, runs: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, list[float]]:
    """Measure the CPU seconds of every run, in turns, each on a model without gradients."""
    return in_turns(unprepared(runs), repeats, CPU, prepare=lambda: model.zero_grad(set_to_none=True))


def saved_megabytes(run: Callable[[], object], left_out: set[int]) -> float:
    """Measure the most megabytes that autograd keeps for backward passes at one time, every storage counted once.

    Args:
        left_out: addresses of storages that are not counted.
    """
    alive: dict[int, int] = {}
    counts: dict[int, int] = {}
    most = 0

    class Saved:
        def __init__(self, tensor: Tensor) -> None:
            nonlocal most
            self.tensor = tensor
            self.address = tensor.untyped_storage().data_ptr()
            counts[self.address] = counts.get(self.address, 0) + 1
            alive[self.address] = 0 if self.address in left_out else tensor.untyped_storage().nbytes()
            most = max(most, sum(alive.values()))

        def __del__(self) -> None:
            counts[self.address] -= 1
            if not counts[self.address]:
                del counts[self.address], alive[self.address]

    with torch.autograd.graph.saved_tensors_hooks(Saved, lambda saved: saved.tensor):
        run()
    return most / 1e6


def report(title: str, seconds: Mapping[str, list[float]], predicted: Mapping[str, float], goals: Mapping[str, float]):
    """Print times, the ratio of the first run to each, and what the FLOP model says it should be."""
    table = Table(title=title, title_justify="left")
    for name in ("step", "CPU s, median (middle half)", "ratio", "spread of the ratio", "FLOP model", "goal"):
        table.add_column(name, justify="left" if name == "step" else "right")
    first = next(iter(seconds))
    for name, times in seconds.items():
        ratios = [before / after for before, after in zip(seconds[first], times, strict=True)]
        ratio, flops = ratio_of(seconds[first], times), predicted[first] / predicted[name]
        goal = goal_text(goals.get(name))
        table.add_row(name, spread(times, digits=2), f"{ratio:.2f}x", spread(ratios, digits=2), f"{flops:.2f}x", goal)
    Console(width=140).print(table)


@dataclass(frozen=True)
class Compared:
    """One way of a step beside another, by their names in the runs: a row of the table of goals."""

    what: str
    way: str
    against: str
    baseline: str
    goal: float | None = None


def compare_steps(
    model: nn.Module,
    runs: Mapping[str, Callable[[], float]],
    arguments: argparse.Namespace,
    *,
    title: str,
    flops: Mapping[str, float],
    pairs: Sequence[Compared],
) -> None:
    """Check that steps are equal, time them in turns, show both, and hand outcomes on.

    Args:
        arguments: the options of a benchmark. flops: what the FLOP model says, by run.

    Raises:
        SystemExit: a loss or a gradient differs.
    """
    worst = check_equal(model, runs)
    seconds = alternate(model, runs, arguments.repeats)
    goals = {pair.way: pair.goal for pair in pairs if pair.goal is not None}
    report(f"{title}, {arguments.threads} threads; losses equal, gradients within {worst:.1e}", seconds, flops, goals)
    outcomes = [
        timed(
            pair.what,
            pair.against,
            seconds[pair.baseline],
            seconds[pair.way],
            check=f"losses equal, gradients within {worst:.0e}",
            predicted=flops[pair.baseline] / flops[pair.way],
            goal=pair.goal,
        )
        for pair in pairs
    ]
    append(outcomes, arguments.results)
