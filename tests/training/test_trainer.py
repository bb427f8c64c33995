"""One process: what learns, what stays, what the loss and the log say, and that accumulation changes nothing."""

import dataclasses
import math
from pathlib import Path

import pytest
import tiny
import torch
from blocks import space
from harness import EVERYTHING, log_rows, make_trainer, run_settings

from mllm.budget import Budget
from mllm.config.run import SamplerConfig
from mllm.training.optimization import check_gradients
from mllm.training.step import sampled_views
from mllm.training.trainer import ElasticTrainer

ALL = SamplerConfig(mode="all")


def snapshot(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def plain_loss(trainer: ElasticTrainer, batch, step: int) -> tuple[float, dict[str, float]]:
    """The loss of a step by one ordinary forward pass per row and budget, and per budget."""
    total, by_budget, counts = 0.0, {}, {}
    targets = sum(label != -100 for row in batch.rows for label in row.labels)
    for view in sampled_views(batch.rows, trainer.sampler, step):
        row = batch.rows[view.row]
        kept = {medium: [span.item for span in row.spans if span.extent.medium == medium] for medium in batch.media}
        values = {
            key: value[kept[key.split("_")[0].replace("pixel", "image")]]
            for key, value in batch.values.items()
            if kept[key.split("_")[0].replace("pixel", "image")]
        }
        runs = tuple(dataclasses.replace(span, item=kept[span.extent.medium].index(span.item)) for span in row.spans)
        alone = dataclasses.replace(batch, rows=[dataclasses.replace(row, spans=runs)], values=values)
        expanded = trainer.processor.expand(alone, [[view.budget]], left_padding=False)
        with torch.no_grad():
            mean = trainer.model(**expanded.inputs, labels=expanded.labels).loss.item()
        count = sum(label != -100 for label in row.labels)
        total += view.weight * mean * count / targets
        by_budget[view.name] = by_budget.get(view.name, 0.0) + mean * count
        counts[view.name] = counts.get(view.name, 0) + count
    return total, {name: value / counts[name] for name, value in by_budget.items()}


def test_exactly_the_trainables_move_and_frozen_encoders_do_not(tmp_path: Path) -> None:
    trainer = make_trainer(run_settings(tmp_path, tiny.settings(), sampler=ALL, max_steps=2), kinds=EVERYTHING, rows=4)
    before = snapshot(trainer.model)
    trainer.train()
    moved = {name for name, value in trainer.model.state_dict().items() if not torch.equal(value, before[name])}
    lora = [
        f"model.language_model.layers.{layer}.self_attn.{target}.lora_{side}.default.weight"
        for layer in (0, 1)
        for target in ("q_proj", "v_proj")
        for side in "AB"
    ]
    projectors = [
        f"model.compressors.{medium}.projectors.{budget}.{layer}.{kind}"
        for medium, budgets in (("image", 1), ("audio", 1), ("video", 2))
        for budget in range(budgets)
        for layer in (0, 2)
        for kind in ("weight", "bias")
    ]
    assert moved == {*lora, *projectors}
    assert any("running_mean" in name for name in before)
    assert trainer.model.training
    assert not any(module.training for module in trainer.model.model.video_tower.modules())
    assert "use_cache" not in trainer.model.config.to_dict()


@pytest.mark.parametrize("mode", ["all", "random"])
def test_the_logged_losses_are_those_of_one_pass_per_row_and_budget(tmp_path: Path, mode: str) -> None:
    sampler = SamplerConfig(mode=mode, num_budgets=None if mode == "all" else 3)  # type: ignore[arg-type]
    settings = run_settings(tmp_path, tiny.settings(), sampler=sampler, max_steps=1)
    trainer = make_trainer(settings, kinds=EVERYTHING, rows=6, batches=[[0, 1, 2, 3, 4, 5]])
    batch = next(iter(trainer.batches))["batch"]
    expected, by_budget = plain_loss(trainer, batch, step=0)
    trainer.train()
    row = log_rows(tmp_path)[0]
    assert row["loss"] == pytest.approx(expected, rel=1e-5)
    logged = {key.removeprefix("loss/"): value for key, value in row.items() if key.startswith("loss/")}
    assert logged == pytest.approx(by_budget, rel=1e-5)
    assert "text" in logged
    assert set(row) - {f"loss/{name}" for name in logged} == {
        *("step", "loss", "grad_norm", "learning_rate", "soft_tokens_per_step")
    }
    assert row["soft_tokens_per_step"] > 0
    assert log_rows(tmp_path, timed=True)[0]["tokens_per_second"] > 0


def test_accumulation_changes_nothing(tmp_path: Path) -> None:
    """Two micro-batches of two rows and one of four: the same rows in a step, the same losses and weights."""
    weights, losses = [], []
    for accumulation, batches in ((2, [[0, 1], [2, 3], [4, 5], [6, 7]]), (1, [[0, 1, 2, 3], [4, 5, 6, 7]])):
        output = tmp_path / str(accumulation)
        settings = run_settings(output, tiny.settings(("audio", "video")), accumulation=accumulation)
        trainer = make_trainer(settings, batches=batches)
        trainer.train()
        weights.append(trainer.trainables())
        losses.append([row["loss"] for row in log_rows(output) if "loss" in row])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    for name, value in weights[0].items():
        torch.testing.assert_close(value, weights[1][name], rtol=1e-4, atol=1e-5)


def test_a_medium_that_no_budget_named_keeps_its_momentum_as_on_many_processes(tmp_path: Path) -> None:
    """A parameter without input has gradient 0, not none: averaging over processes gives it 0 too."""
    settings = run_settings(tmp_path, tiny.settings(("image", "audio")), max_steps=2)
    trainer = make_trainer(settings, kinds=[("image",), ("audio",)], rows=2, batches=[[0], [1]])
    trainer.train()
    steps = {
        name: int(trainer.optimizer.state[parameter]["step"])
        for name, parameter in trainer.model.named_parameters()
        if parameter.requires_grad
    }
    assert set(steps.values()) == {2}


def test_sandwich_teaches_the_smaller_budgets_in_place(tmp_path: Path) -> None:
    """Distillation alone leaves the largest budget's loss to the labels and pulls the smallest towards the largest."""
    gaps = []
    for weight in (0.0, 1.0):
        sampler = SamplerConfig(mode="sandwich", num_budgets=2, distill_weight=weight)
        settings = run_settings(
            tmp_path / str(weight),
            tiny.settings(("audio",), audio={"budgets": ["/4", "/20"]}),
            sampler=sampler,
            max_steps=10,
        )
        trainer = make_trainer(settings, kinds=[("audio",)], rows=4, rows_per_batch=4)
        trainer.train()
        rows = [row for row in log_rows(tmp_path / str(weight)) if "loss" in row]
        assert rows[-1]["loss/audio=/4"] < rows[0]["loss/audio=/4"]
        gaps.append(rows[0]["loss"] - rows[0]["loss/audio=/4"] / 2)
    teacher, student = (rows[0][f"loss/audio={rate}"] for rate in ("/4", "/20"))
    assert gaps[0] == pytest.approx(student / 2, rel=1e-4)
    assert 0 < gaps[1] < student / 2
    assert teacher != student


def test_gradient_checkpointing_changes_nothing(tmp_path: Path) -> None:
    weights = []
    for index in range(2):
        settings = run_settings(tmp_path / str(index), tiny.settings(("audio",)), max_steps=2)
        trainer = make_trainer(settings, kinds=[("audio",)], rows=2)
        if index:
            trainer.checkpoint_activations()
        calls = []
        attention = trainer.model.model.language_model.layers[0].self_attn
        attention.register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        trainer.train()
        weights.append(trainer.trainables())
        assert len(calls) == 2 * (1 + index)
    for name, value in weights[0].items():
        torch.testing.assert_close(value, weights[1][name], rtol=0, atol=0)


def test_parts_have_their_own_learning_rate_and_only_matrices_decay(tmp_path: Path) -> None:
    settings = run_settings(
        tmp_path, tiny.settings(("audio",)), part_learning_rates={"adapter": 0.5}, learning_rate=0.25, weight_decay=0.1
    )
    trainer = make_trainer(settings)
    groups = trainer.create_optimizer().param_groups
    named = {
        (group["lr"], group["weight_decay"]): names
        for group, names in zip(groups, trainer.parameter_names, strict=True)
    }
    assert set(named) == {(0.5, 0.1), (0.25, 0.1), (0.25, 0.0)}
    assert all(".lora_" in name for name in named[0.5, 0.1])
    assert all(name.endswith(".bias") for name in named[0.25, 0.0])
    assert sum(len(names) for names in named.values()) == len(trainer.trainables())


def test_what_is_not_finite_is_refused_before_anything_is_updated(tmp_path: Path) -> None:
    settings = run_settings(tmp_path, tiny.settings(("audio",)), max_steps=2)
    trainer = make_trainer(settings, kinds=[("audio",)], rows=2, batches=[[0], [1]])
    weight = trainer.model.model.compressors["audio"].projectors[0][2].bias
    weight.data[0] = math.nan
    before = snapshot(trainer.model)
    with pytest.raises(FloatingPointError, match="loss of step 1 is nan for samples sample0"):
        trainer.train()
    after = trainer.model.state_dict()
    assert all(torch.equal(value.nan_to_num(), after[name].nan_to_num()) for name, value in before.items())


def test_gradients_that_are_not_finite_are_refused_and_missing_ones_are_zero() -> None:
    parameters = [torch.nn.Parameter(torch.ones(2)) for _ in range(2)]
    parameters[0].grad = torch.tensor([1.0, 2.0])
    check_gradients(parameters, step=7)
    assert parameters[1].grad is not None
    assert parameters[1].grad.tolist() == [0.0, 0.0]
    parameters[0].grad[1] = math.inf
    with pytest.raises(FloatingPointError, match="the gradient of step 7 is not finite; nothing was updated"):
        check_gradients(parameters, step=7)


def test_validation_gives_the_loss_per_budget_and_what_the_caller_measures(tmp_path: Path) -> None:
    settings = run_settings(
        tmp_path,
        tiny.settings(("audio", "video")),
        validation=True,
        validate_every=2,
        max_steps=3,
    )
    trainer = make_trainer(settings, validated_at=["audio=/4,video=/2", "audio=/8,video=/5"])
    assert trainer.validation is not None

    def metric(model, processor) -> dict[str, float]:
        assert not model.training
        return {"wer/audio=/4": 0.25}

    trainer.validation = dataclasses.replace(trainer.validation, metric=metric)
    trainer.train()
    rows = [row for row in log_rows(tmp_path) if "eval_loss" in row]
    assert [row["step"] for row in rows] == [2, 3]
    assert rows[-1]["eval_wer/audio=/4"] == 0.25
    trainer.model.eval()
    sums, count, seen = {}, 0, []
    for inputs in trainer.validation.batches:
        if len(seen) == trainer.validation.num_counted:
            break
        seen.append(inputs)
        for budget in trainer.validation.budgets:
            one = [[budget] * len(inputs["batch"].rows)]
            expanded = trainer.processor.expand(inputs["batch"], one, left_padding=False)
            num_targets = int((expanded.labels[:, 1:] != -100).sum())
            with torch.no_grad():
                loss = trainer.model(**expanded.inputs, labels=expanded.labels).loss.item()
            sums[str(budget)] = sums.get(str(budget), 0.0) + loss * num_targets
        count += num_targets
    for budget, value in sums.items():
        assert rows[-1][f"eval_loss/{budget}"] == pytest.approx(value / count, rel=1e-5)
    assert rows[-1]["eval_loss"] == pytest.approx(sum(sums.values()) / count / 2, rel=1e-5)


def test_a_row_is_run_once_per_budget_that_differs_for_it() -> None:
    from mllm.budget import Extent
    from mllm.budget.sampler import BudgetSampler
    from mllm.processing.batch import EncodedSample, MediaSpan

    both = space(image={"budgets": [1, 4]}, audio={"budgets": ["/4", "/8"]})
    image = EncodedSample("image", [1], [1], (MediaSpan(Extent("image", grid=(8, 8)), 0),))
    audio = EncodedSample("sound", [1], [1], (MediaSpan(Extent("audio", num_frames=20), 0),))
    views = sampled_views([image, audio, EncodedSample("text", [1], [1])], BudgetSampler(both, "all"), step=0)
    assert [(view.row, view.name, view.weight) for view in views] == [
        (0, "image=4", 0.5),
        (0, "image=1", 0.5),
        (1, "audio=/4", 0.5),
        (1, "audio=/8", 0.5),
        (2, "text", 1.0),
    ]
    spoken = dataclasses.replace(audio, task="vsr")
    weighted = sampled_views([image, spoken], BudgetSampler(both, "all"), 0, {"vsr": 1.5})
    assert [one.weight for one in weighted] == [0.5, 0.5, 0.75, 0.75]
    sandwich = sampled_views([audio], BudgetSampler(both, "sandwich"), step=3)
    assert sum(one.weight for one in sandwich) == pytest.approx(1)
    assert {one.teacher for one in sandwich} == {0}
    assert sandwich[0].budget == Budget.parse("audio=/4")
