"""Adapters that know the rows, in the real trainer: neither accumulation nor checkpointing changes what is learned."""

import dataclasses
from pathlib import Path

import pytest
import tiny
import torch
import worker
from harness import log_rows, make_trainer, run_settings
from test_distributed import CONFIGS, assert_same_run, launch

from mllm.settings import AdapterSettings, ModelSettings
from mllm.training.passes import drawn_passes
from mllm.training.settings import SamplerSettings

SCALES = ["audio=/4", "audio=/8", "video=/2", "video=/5", *(f"audio=/{a},video=/{v}" for a in (4, 8) for v in (2, 5))]
ADAPTERS = {
    "mss": AdapterSettings(kind="lora_bank", variant="mss", rank=4, alpha=8, scales=SCALES),
    "st": AdapterSettings(kind="lora_bank", variant="st", rank=4, alpha=8),
    "mome": AdapterSettings(kind="mome", num_experts=5, top_k=2, bottleneck=4, balance_weight=0.5),
}
ALL = SamplerSettings(mode="all")


def model_settings(name: str) -> ModelSettings:
    return dataclasses.replace(tiny.settings(("audio", "video")), adapter=ADAPTERS[name])


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
        before = {own: value.clone() for own, value in trainer.trainables().items()}
        trainer.train()
        weights[key] = trainer.trainables()
        losses[key] = [row["loss"] for row in log_rows(tmp_path / key) if "loss" in row]
        unmoved = [own for own, value in weights[key].items() if torch.equal(value, before[own])]
        assert not unmoved
    for key in ("accumulated", "checkpointed"):
        assert losses[key] == pytest.approx(losses["plain"], rel=1e-5)
        for own, value in weights["plain"].items():
            torch.testing.assert_close(weights[key][own], value, rtol=1e-3, atol=1e-4)


def test_the_loss_holds_the_balance_of_every_pass_by_its_share_of_the_targets(tmp_path: Path) -> None:
    settings = run_settings(tmp_path, model_settings("mome"), sampler=ALL, max_steps=1)
    trainer = make_trainer(settings, batches=[[0, 1, 2, 3]])
    batch = next(iter(trainer.batches))["batch"]
    targets = sum(label != -100 for row in batch.rows for label in row.labels)
    expected, balances = 0.0, {}
    for own in drawn_passes(batch.rows, trainer.draws, 0):
        rows = dataclasses.replace(batch, rows=[batch.rows[own.row]])
        expanded = trainer.processor.expand(rows, [[own.budget]], left_padding=False)
        with torch.no_grad():
            out = trainer.model(**expanded.inputs, labels=expanded.labels, adapter_report=True)
        count = sum(label != -100 for label in batch.rows[own.row].labels)
        expected += own.weight * count / targets * (out.loss.item() + 0.5 * out.balance.item())
        balances.setdefault(own.name, []).append(out.balance.item())
    trainer.train()
    row = log_rows(tmp_path)[0]
    assert row["loss"] == pytest.approx(expected, rel=1e-5)
    logged = {key.removeprefix("balance/"): value for key, value in row.items() if key.startswith("balance/")}
    assert logged == pytest.approx({name: sum(own) / len(own) for name, own in balances.items()}, rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(
    "options", [[], ["--deepspeed", CONFIGS / "zero2.json"], ["--deepspeed", CONFIGS / "zero3.json"]]
)
def test_two_processes_with_rows_of_different_members_are_one_training(tmp_path: Path, options: list) -> None:
    for name in worker.ADAPTER_SCENARIOS:
        worker.run_scenario(name, worker.scenario_settings(name, tmp_path / "one", 1))
    launch(tmp_path / "two", *worker.ADAPTER_SCENARIOS, *options, timeout=600)
    # Adam divides a gradient of 3e-9, the median being 1e-5, by its own size: what it moves is rounding made visible.
    for name in worker.ADAPTER_SCENARIOS:
        assert_same_run(tmp_path / "one" / name, tmp_path / "two" / name, weights_atol=1e-4)
