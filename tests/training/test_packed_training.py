"""The real trainer with views packed, padded, and one budget at a time: the same run."""

import dataclasses
import logging
from pathlib import Path

import pytest
import tiny
import torch
from harness import EVERYTHING, log_rows, make_trainer, run_settings

from mllm.config.model import ModelConfig, MomeConfig
from mllm.config.run import SamplerConfig, TrainConfig

ALL = SamplerConfig(mode="all")
WAYS = {
    "padded": {"packing": False},
    "packed": {},
    "low": {"memory": "low"},
    "padded low": {"packing": False, "memory": "low"},
}
MOME = MomeConfig(num_experts=5, top_k=2, bottleneck=4, balance_weight=0.5)


def nested() -> ModelConfig:
    return tiny.settings(("image",), image={"compressor": {"order": "haar"}, "budgets": [4, 16, 64]})


def mome() -> ModelConfig:
    return dataclasses.replace(tiny.settings(("audio", "video")), adapter=MOME)


CASES = {
    "nested": (nested, [("image",), (), ("image", "image")], ALL, {"gradient_checkpointing": True}),
    "everything": (tiny.settings, EVERYTHING, ALL, {}),
    "mome": (mome, [("audio", "video"), ("video",)], ALL, {"sink_weight": 10.0}),
    "sandwich": (tiny.settings, EVERYTHING, SamplerConfig(mode="sandwich"), {}),
    "encoder": (tiny.settings, [("image",), ("audio",)], ALL, {"parts": ["compressors", "adapter", "image"]}),
}


@pytest.mark.parametrize("name", list(CASES))
def test_packing_and_little_memory_change_nothing(tmp_path: Path, name: str) -> None:
    model, kinds, sampler, options = CASES[name]
    weights, rows = {}, {}
    for way, of_way in WAYS.items():
        settings = run_settings(tmp_path / way, model(), sampler=sampler, max_steps=2, **options, **of_way)
        trainer = make_trainer(settings, kinds=kinds, rows=4)
        if options.get("gradient_checkpointing"):
            trainer.checkpoint_activations()
        trainer.train()
        assert trainer.packs == ("packing" not in of_way)
        weights[way], rows[way] = trainer.trainables(), log_rows(tmp_path / way)
    for way in ("packed", "low", "padded low"):
        for result, expected in zip(rows[way], rows["padded"], strict=True):
            assert result == pytest.approx(expected, rel=2e-4), way
        for parameter, value in weights["padded"].items():
            if parameter.endswith("k_proj.bias"):  # its gradient is 0 but for rounding, and Adam makes steps of that
                continue
            torch.testing.assert_close(weights[way][parameter], value, rtol=1e-3, atol=1e-4)


def test_where_rows_cannot_be_packed_the_log_says_why(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    settings = run_settings(tmp_path, tiny.settings(("audio",)), max_steps=1)
    trainer = make_trainer(settings, kinds=[("audio",)])
    trainer.processor.shares_lengths = True
    from mllm.training.step import prepare_packing

    with caplog.at_level(logging.WARNING):
        assert not prepare_packing(trainer.elastic, trainer.processor)
        trainer.processor.shares_lengths = False
        trainer.elastic.model.language_model.set_attn_implementation("eager")
        assert not prepare_packing(trainer.elastic, trainer.processor)
    assert "the padding of clips counts" in caplog.text
    assert "loaded with attention eager" in caplog.text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"packed_attention": "flex", "use_cpu": True}, "train.packed_attention flex needs train.packing and a GPU"),
        ({"packed_attention": "flex", "packing": False}, "train.packed_attention flex"),
        ({"memory": "low", "deepspeed": "zero.json"}, "train.memory low does not go with train.deepspeed"),
    ],
)
def test_contradictions_are_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrainConfig(out="x", max_steps=1, **options)
