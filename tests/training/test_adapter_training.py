"""Adapters that know the rows, in the real trainer: neither accumulation nor checkpointing changes what is learned."""

import dataclasses
from pathlib import Path

import pytest
import tiny
import torch
import worker
from harness import log_rows, make_trainer, run_settings
from launches import CONFIGS, assert_same_run, launch
from row_adapters import ADAPTERS, ALL, SCALES, model_settings

from mllm.adapters.expert_ids import ExpertNames
from mllm.budget import Budget
from mllm.budget.sampler import BudgetSampler
from mllm.config.medium import MoeConfig
from mllm.config.model import ModelConfig
from mllm.data.manifest import Media, Message, Sample
from mllm.training.pipeline.dataset import check_experts
from mllm.training.step import sampled_views


@pytest.mark.parametrize("name", list(ADAPTERS))
def test_accumulation_and_checkpointing_change_nothing(tmp_path: Path, name: str) -> None:
    runs = {
        "plain": ({}, [[0, 1, 2, 3], [4, 5, 6, 7]]),
        "accumulated": ({"accumulation": 2}, [[0, 1], [2, 3], [4, 5], [6, 7]]),
        "checkpointed": ({"gradient_checkpointing": True}, [[0, 1, 2, 3], [4, 5, 6, 7]]),
    }
    weights, losses = {}, {}
    for key, (options, batches) in runs.items():
        settings = run_settings(tmp_path / key, model_settings(name), sampler=ALL, max_steps=3, **options)
        trainer = make_trainer(settings, batches=batches)
        before = {parameter: value.clone() for parameter, value in trainer.trainables().items()}
        trainer.train()
        weights[key] = trainer.trainables()
        losses[key] = [row["loss"] for row in log_rows(tmp_path / key) if "loss" in row]
        unmoved = [parameter for parameter, value in weights[key].items() if torch.equal(value, before[parameter])]
        assert not unmoved
    for key in ("accumulated", "checkpointed"):
        assert losses[key] == pytest.approx(losses["plain"], rel=1e-5)
        for parameter, value in weights["plain"].items():
            torch.testing.assert_close(weights[key][parameter], value, rtol=1e-3, atol=1e-4)


def test_the_loss_holds_the_balance_of_every_pass_by_its_share_of_the_targets(tmp_path: Path) -> None:
    settings = run_settings(tmp_path, model_settings("mome"), sampler=ALL, max_steps=1)
    trainer = make_trainer(settings, batches=[[0, 1, 2, 3]])
    batch = next(iter(trainer.batches))["batch"]
    targets = sum(label != -100 for row in batch.rows for label in row.labels)
    expected, balances = 0.0, {}
    for view in sampled_views(batch.rows, trainer.sampler, 0):
        rows = dataclasses.replace(batch, rows=[batch.rows[view.row]])
        expanded = trainer.processor.expand(rows, [[view.budget]], left_padding=False)
        with torch.no_grad():
            out = trainer.model(**expanded.inputs, labels=expanded.labels, adapter_report=True)
        count = sum(label != -100 for label in batch.rows[view.row].labels)
        expected += view.weight * count / targets * (out.loss.item() + 0.5 * out.auxiliary["balance"].item())
        balances.setdefault(view.name, []).append(out.auxiliary["balance"].item())
    trainer.train()
    row = log_rows(tmp_path)[0]
    assert row["loss"] == pytest.approx(expected, rel=1e-5)
    logged = {key.removeprefix("balance/"): value for key, value in row.items() if key.startswith("balance/")}
    assert logged == pytest.approx({name: sum(losses) / len(losses) for name, losses in balances.items()}, rel=1e-4)


def test_a_sampled_budget_without_an_expert_stops_the_run_before_its_first_step() -> None:
    processor = tiny.processor(model_settings("mss"))
    samples = [Sample("both", (Message("user", (Media("audio", "a"), Media("video", "b"))),), task="avsr")]
    sampler = BudgetSampler(processor.space, "random")
    check_experts(samples, sampler, ExpertNames(scales=tuple(SCALES)))
    check_experts(samples, sampler, ExpertNames())
    with pytest.raises(ValueError, match=r"audio=/8,video=/5 for samples such as 'both', and adapter.scales"):
        check_experts(samples, sampler, ExpertNames(scales=tuple(SCALES[:-1])))
    points = BudgetSampler(processor.space, "points", points=(Budget.parse("audio=/4,video=/2"),))
    check_experts(samples, points, ExpertNames(scales=("audio=/4,video=/2",)))


def mixture_settings() -> ModelConfig:
    """A mixture of projectors for audio and one projector for lips."""
    config = tiny.settings(("audio", "video"))
    assert config.audio is not None
    audio = dataclasses.replace(config.audio, projector=MoeConfig(num_experts=3, balance_weight=0.5, z_weight=0.25))
    return dataclasses.replace(config, audio=audio)


def test_losses_of_projectors_and_the_sink_are_added_by_their_weights_and_logged(tmp_path: Path) -> None:
    rows = {}
    for name, sink_weight in (("without", 0.0), ("with", 100.0)):
        settings = run_settings(tmp_path / name, mixture_settings(), sampler=ALL, max_steps=1, sink_weight=sink_weight)
        make_trainer(settings, batches=[[0]]).train()
        rows[name] = log_rows(tmp_path / name)[0]
    plain = rows["without"]
    budgets = [key.removeprefix("loss/") for key in plain if key.startswith("loss/")]
    weight = 1 / len(budgets)
    expected = sum(
        weight * (plain[f"loss/{name}"] + 0.5 * plain[f"audio_balance/{name}"] + 0.25 * plain[f"audio_z/{name}"])
        for name in budgets
    )
    assert plain["loss"] == pytest.approx(expected, rel=1e-4)
    sinks = sum(weight * rows["with"][f"sink/{name}"] for name in budgets)
    assert 0 < sinks < 1
    assert rows["with"]["loss"] == pytest.approx(plain["loss"] + 100 * sinks, rel=1e-4)
    assert not [key for key in plain if key.startswith(("sink/", "video_"))]


def test_accumulation_does_not_change_what_a_mixture_of_projectors_learns(tmp_path: Path) -> None:
    weights = {}
    for name, batches, accumulation in (("one", [[0, 1, 2, 3]], 1), ("two", [[0, 1], [2, 3]], 2)):
        options = {"max_steps": 2, "accumulation": accumulation, "sink_weight": 10.0}
        trainer = make_trainer(run_settings(tmp_path / name, mixture_settings(), **options), batches=batches)
        before = {key: value.clone() for key, value in trainer.trainables().items()}
        trainer.train()
        weights[name] = trainer.trainables()
        assert not [key for key, value in weights[name].items() if torch.equal(value, before[key])]
    assert any("gate" in name for name in weights["one"])
    for name, value in weights["one"].items():
        torch.testing.assert_close(weights["two"][name], value, rtol=1e-3, atol=1e-4)


@pytest.fixture(scope="module")
def one_process(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one process learns of the same rows."""
    folder = tmp_path_factory.mktemp("one")
    for name in worker.ADAPTER_SCENARIOS:
        worker.run_scenario(name, worker.scenario_settings(name, folder, 1))
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(
    "options", [[], ["--deepspeed", CONFIGS / "zero2.json"], ["--deepspeed", CONFIGS / "zero3.json"]]
)
def test_two_processes_with_rows_of_different_experts_are_one_training(
    one_process: Path, tmp_path: Path, options: list
) -> None:
    launch(tmp_path, *worker.ADAPTER_SCENARIOS, *options, timeout=600)
    # Adam divides a gradient of 3e-9, the median being 1e-5, by its own size: what it moves is rounding made visible.
    for name in worker.ADAPTER_SCENARIOS:
        assert_same_run(one_process / name, tmp_path / name, weights_atol=1e-4)
