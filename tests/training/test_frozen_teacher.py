"""A frozen copy of what trains teaches all budgets: it answers as the model did at the start, and never moves."""

import dataclasses
import shutil
from pathlib import Path

import pytest
import tiny
import torch
from harness import log_rows, make_trainer, run_settings
from safetensors.torch import load_file
from torch import Tensor

from mllm.budget import Budget
from mllm.config.model import LoraConfig
from mllm.config.run import RunConfig, SamplerConfig
from mllm.model.modeling import ElasticForConditionalGeneration
from mllm.processing.batch import Batch, EncodedSample
from mllm.training.checkpoint import OPTIMIZER, TRAINABLES
from mllm.training.frozen_teacher import TEACHER, FrozenTeacher
from mllm.training.step import sampled_views
from mllm.training.trainer import ElasticTrainer

MEDIA = ("audio", "video")


def settings_in(output: Path, *, weight: float = 1.0, mode: str = "random", **train) -> RunConfig:
    """Budgets drawn uniformly and a frozen teacher; dropout shows whether the teacher is in eval mode."""
    lora = LoraConfig(rank=4, alpha=8, targets=["q_proj", "v_proj"], dropout=train.pop("dropout", 0.0))
    model = dataclasses.replace(tiny.settings(MEDIA), adapter=lora)
    num_budgets = None if mode == "all" else 2
    sampler = SamplerConfig(mode=mode, num_budgets=num_budgets, teacher="frozen", distill_weight=weight)  # type: ignore[arg-type]
    return run_settings(output, model, sampler=sampler, start_from="the harness starts all runs alike", **train)


def target_logits(
    model: ElasticForConditionalGeneration, trainer: ElasticTrainer, batch: Batch, row: EncodedSample, budget: Budget
) -> Tensor:
    """Logits (P, V) at the targets of one row by one ordinary pass in eval mode."""
    kept = {medium: [span.item for span in row.spans if span.extent.medium == medium] for medium in batch.media}
    values = {key: value[kept[key.split("_")[0]]] for key, value in batch.values.items() if kept[key.split("_")[0]]}
    spans = tuple(dataclasses.replace(span, item=kept[span.extent.medium].index(span.item)) for span in row.spans)
    alone = Batch([dataclasses.replace(row, spans=spans)], values)
    expanded = trainer.processor.expand(alone, [[budget]], left_padding=False)
    model.eval()
    with torch.no_grad():
        return model(**expanded.inputs).logits.flatten(0, 1)[expanded.targets().positions]


def test_the_teacher_is_the_model_at_the_start_at_its_largest_budget_and_touches_nothing(tmp_path: Path) -> None:
    trainer = make_trainer(settings_in(tmp_path, dropout=0.3))
    model, space = trainer.elastic, trainer.processor.space
    batch = next(iter(trainer.batches))["batch"]
    expected = torch.cat([target_logits(model, trainer, batch, row, space.largest()) for row in batch.rows])
    teacher = FrozenTeacher.of(model)
    model.train()
    device = torch.device("cpu")
    states = teacher.states(batch, trainer.processor, features={}, device=device, packed=trainer.packs)
    torch.testing.assert_close(model.head(states.states), expected, rtol=1e-4, atol=1e-4)
    assert model.training
    assert not states.states.requires_grad
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    with torch.no_grad():
        for parameter in parameters:
            parameter.add_(0.1)
    before = [parameter.clone() for parameter in parameters]
    again = teacher.states(batch, trainer.processor, features={}, device=device, packed=trainer.packs)
    assert torch.equal(again.states, states.states)
    after = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert all(one is other for one, other in zip(parameters, after, strict=True))
    assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))


def test_every_budget_learns_the_forward_divergence_from_the_first_model(tmp_path: Path) -> None:
    """The loss of the second step, by ordinary passes: the teacher has the weights of before the first step."""
    weight = 0.75
    one_step = make_trainer(settings_in(tmp_path / "one", weight=weight, max_steps=1))
    one_step.train()
    trainer = make_trainer(settings_in(tmp_path / "two", weight=weight, max_steps=2))
    first = tiny.model(settings_in(tmp_path / "two").model)  # as the harness makes it
    batches = iter(trainer.batches)
    batch = [next(batches)["batch"] for _ in range(2)][1]
    total, largest = 0.0, trainer.processor.space.largest()
    num_targets = sum(label != -100 for row in batch.rows for label in row.labels)
    views = sampled_views(batch.rows, trainer.sampler, step=1)
    for view in views:
        row = batch.rows[view.row]
        taught = target_logits(first, trainer, batch, row, largest).log_softmax(-1)
        learned = target_logits(one_step.elastic, trainer, batch, row, view.budget).log_softmax(-1)
        divergence = (taught.exp() * (taught - learned)).sum().item()
        labels = torch.tensor([label for label in row.labels[1:] if label != -100])
        cross_entropy = -learned[torch.arange(len(labels)), labels].sum().item()
        total += view.weight * (weight * divergence + (1 - weight) * cross_entropy) / num_targets
    trainer.train()
    rows = [row for row in log_rows(tmp_path / "two") if "loss" in row]
    assert rows[1]["loss"] == pytest.approx(total, rel=1e-4)


def test_budgets_come_closer_to_the_teacher_and_the_largest_begins_there(tmp_path: Path) -> None:
    model = tiny.settings(("audio",), audio={"budgets": ["/4", "/20"]})
    settings = dataclasses.replace(settings_in(tmp_path, mode="all", max_steps=12, learning_rate=0.003), model=model)
    trainer = make_trainer(settings, kinds=[("audio",)], rows=4, rows_per_batch=4, batches=[[0, 1, 2, 3]])
    trainer.train()
    losses = [row["loss"] for row in log_rows(tmp_path) if "loss" in row]
    assert losses[-1] < 0.5 * losses[0]
    alone = dataclasses.replace(settings, sampler=SamplerConfig(mode="random", teacher="frozen", distill_weight=1.0))
    largest = make_trainer(alone, kinds=[("audio",)], rows=4, rows_per_batch=4, batches=[[0, 1, 2, 3]])
    step = next(step for step in range(50) if largest.sampler(step, ["audio"])[0].budget == Budget.parse("audio=/4"))
    largest.frozen_teacher = FrozenTeacher.of(largest.elastic)
    largest.state.global_step = step
    loss = largest.training_step(largest.elastic, next(iter(largest.batches)), torch.tensor(10))
    assert loss.item() == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize("changes", [{"packing": False}, {"memory": "low"}])
def test_padded_passes_and_one_budget_at_a_time_are_the_same_run(tmp_path: Path, changes: dict) -> None:
    weights = []
    for name, train in (("plain", {}), ("changed", changes)):
        trainer = make_trainer(settings_in(tmp_path / name, weight=0.5, max_steps=3, **train))
        trainer.train()
        weights.append(trainer.trainables())
    for name, value in weights[0].items():
        torch.testing.assert_close(
            value, weights[1][name], rtol=1e-4, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}"
        )


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of four steps, with checkpoints at 2 and 4."""
    output = tmp_path_factory.mktemp("whole")
    make_trainer(settings_in(output, dropout=0.2, save_every=2)).train()
    return output


def test_a_resumed_run_has_the_same_teacher_and_equals_the_uninterrupted_one(tmp_path: Path, whole_run: Path) -> None:
    shutil.copytree(whole_run, tmp_path, dirs_exist_ok=True)
    shutil.rmtree(tmp_path / "checkpoint-00000004")
    make_trainer(settings_in(tmp_path, dropout=0.2, save_every=2)).train(str(tmp_path / "checkpoint-00000002"))
    for name in (TRAINABLES, OPTIMIZER):
        before, after = (load_file(run / "checkpoint-00000004" / name) for run in (whole_run, tmp_path))
        assert before.keys() == after.keys()
        assert all(torch.equal(value, after[key]) for key, value in before.items())
    trained = load_file(whole_run / "checkpoint-00000004" / TRAINABLES)
    assert load_file(whole_run / TEACHER).keys() == trained.keys()  # what trains, and no second LLM


def test_a_teacher_that_is_gone_or_another_one_is_refused(tmp_path: Path, whole_run: Path) -> None:
    shutil.copytree(whole_run, tmp_path, dirs_exist_ok=True)
    shutil.rmtree(tmp_path / "checkpoint-00000004")
    shutil.copy(tmp_path / "checkpoint-00000002" / TRAINABLES, tmp_path / TEACHER)
    trainer = make_trainer(settings_in(tmp_path, dropout=0.2, save_every=2))
    with pytest.raises(ValueError, match=rf"{TEACHER} has SHA-256 .*, and the run learned from one with"):
        trainer.train(str(tmp_path / "checkpoint-00000002"))
    (tmp_path / TEACHER).unlink()
    with pytest.raises(ValueError, match=rf"{TEACHER} is missing; the run learns from it"):
        trainer.train(str(tmp_path / "checkpoint-00000002"))
