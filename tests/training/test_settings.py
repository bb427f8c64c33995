"""A contradiction in a run config is refused with its key, before anything is loaded."""

import dataclasses
import subprocess
import sys
from typing import Any, get_args

import pytest
import yaml
from blocks import medium

from mllm.config.model import LoraConfig, ModelConfig
from mllm.config.run import (
    DataConfig,
    Part,
    RunConfig,
    SamplerConfig,
    TrainConfig,
    config_yaml,
    differences,
    read_run_config,
)
from mllm.model.trainables import PARTS

AUDIO = medium("audio", {"encoder": "e", "budgets": ["/4", "/16"]})
MODEL = ModelConfig(llm="l", audio=AUDIO, adapter=LoraConfig())


def run(model: ModelConfig = MODEL, **blocks: dict[str, Any]) -> RunConfig:
    """A run of small changes to a good one, by block."""
    return RunConfig(
        model=model,
        data=DataConfig(**{"train": ["a.jsonl"], **blocks.get("data", {})}),
        sampler=SamplerConfig(**blocks.get("sampler", {})),
        train=TrainConfig(**{"out": "o", "max_steps": 10, **blocks.get("train", {})}),
    )


@pytest.mark.parametrize(
    ("blocks", "message"),
    [
        ({"data": {"train": []}}, "data.train is empty"),
        ({"data": {"max_rows": 0}}, "data.max_rows is 0; it must be at least 1"),
        ({"data": {"max_bad_fraction": 1.0}}, r"data.max_bad_fraction is 1.0"),
        ({"data": {"audio_mask_samples": [6400]}}, r"data.audio_mask_samples is \[window, stride\], both above 0"),
        ({"data": {"video_mask_frames": [10, 0]}}, r"data.video_mask_frames is .* got \[10, 0\]"),
        ({"data": {"flip_probability": 2}}, r"data.flip_probability is 2; it must be in 0..1"),
        ({"data": {"max_mismatch_seconds": -1}}, "data.max_mismatch_seconds is -1; it must be at least 0"),
        ({"data": {"snr_db": [0]}}, "data.noise and data.snr_db go together"),
        ({"sampler": {"mode": "points"}}, "sampler.points go with sampler.mode points"),
        ({"sampler": {"points": ["audio=/4"]}}, "sampler.points go with sampler.mode points"),
        ({"sampler": {"distill_weight": 0.5}}, "goes with sampler.mode sandwich or sampler.teacher frozen only"),
        (
            {"sampler": {"teacher": "step"}},
            "sampler.teacher step goes with sampler.mode sandwich only; mode is 'random'",
        ),
        (
            {"sampler": {"teacher": "frozen", "mode": "sandwich"}},
            "sampler.teacher frozen goes with sampler.mode random or all; mode is 'sandwich'",
        ),
        ({"sampler": {"teacher": "frozen"}}, "an untrained model has nothing to teach: name in train.start_from"),
        (
            {"sampler": {"teacher": "frozen", "distill_weight": 0.0}, "train": {"start_from": "run"}},
            "sampler.distill_weight is 0, so sampler.teacher frozen would teach nobody",
        ),
        (
            {"sampler": {"teacher": "frozen"}, "train": {"start_from": "run", "parts": ["adapter", "llm"]}},
            "train.parts holds llm, of which the teacher would be a second copy",
        ),
        (
            {"sampler": {"teacher": "frozen"}, "train": {"start_from": "run", "loss_kernel": "liger"}},
            "train.loss_kernel is liger, .* sampler.distill_weight",
        ),
        ({"sampler": {"mode": "sandwich", "distill_weight": 1.5}}, "distill_weight is 1.5; it must be in 0..1"),
        ({"sampler": {"mode": "points", "points": ["video=/2"]}}, r"sampler.points holds 'video=/2', but model.video"),
        ({"train": {"epochs": 1}}, "either train.max_steps or train.epochs"),
        ({"train": {"max_steps": None}}, "either train.max_steps or train.epochs"),
        ({"train": {"max_steps": 0}}, "train.max_steps is 0; it must be at least 1"),
        ({"train": {"warmup_steps": 11}}, "train.warmup_steps is 11, more than train.max_steps 10"),
        ({"train": {"learning_rate": 0}}, "train.learning_rate is 0"),
        ({"train": {"part_learning_rates": {"adapter": -1}}}, "train.part_learning_rates.adapter is -1"),
        ({"train": {"warmup_fraction": 1.5}}, r"train.warmup_fraction is 1.5; it must be in 0..1"),
        ({"train": {"warmup_fraction": 0.1, "warmup_steps": 3}}, "in 0..1, without train.warmup_steps"),
        (
            {"train": {"start_from": "run"}, "data": {"captions": ["c.jsonl"]}},
            "train.start_from and data.captions both say where projectors start",
        ),
        ({"data": {"max_sample_tokens": 0}}, "data.max_sample_tokens is 0; it must be at least 1"),
        ({"data": {"max_unsupervised_fraction": 1.0}}, "data.max_unsupervised_fraction is 1.0; it must be in 0..1"),
        ({"train": {"part_learning_rates": {"llm": 1}}}, "names llm, which is not among train.parts"),
        ({"train": {"adam_betas": [0.9]}}, "train.adam_betas is"),
        ({"train": {"parts": []}}, "train.parts is empty"),
        ({"train": {"parts": ["compressors"]}}, "model.adapter is set, but train.parts leaves it out"),
        ({"train": {"parts": ["adapter", "image"]}}, "train.parts holds image, but model.image is not set"),
        ({"train": {"loss_kernel": "liger", "use_cpu": True}}, "train.loss_kernel is liger, .* train.use_cpu is true"),
        (
            {"train": {"loss_kernel": "liger"}, "sampler": {"mode": "sandwich"}},
            "train.loss_kernel is liger, .* sampler.distill_weight",
        ),
        ({"train": {"validate_every": 5}}, "train.validate_every is set, but data.validation names no manifest"),
    ],
)
def test_contradictions_name_their_key(blocks: dict[str, dict[str, Any]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run(**blocks)


def test_parts_follow_the_model() -> None:
    assert run().parts == ("compressors", "adapter")
    assert run(dataclasses.replace(MODEL, adapter=None)).parts == ("compressors",)
    with pytest.raises(ValueError, match=r"train\.parts holds adapter, but model\.adapter is not set"):
        run(dataclasses.replace(MODEL, adapter=None), train={"parts": ["adapter"]})
    assert get_args(Part) == PARTS


def test_half_precision_parts_train_in_half_precision() -> None:
    half = dataclasses.replace(MODEL, dtype="bfloat16")
    assert run(half, train={"precision": "bfloat16"}).model.dtype == "bfloat16"
    with pytest.raises(ValueError, match=r"model\.dtype is bfloat16, which train\.precision float32 cannot"):
        run(half)


def test_resolved_settings_start_the_same_run_again() -> None:
    settings = run(sampler={"mode": "sandwich"}, train={"part_learning_rates": {"adapter": 0.1}})
    assert read_run_config(yaml.safe_load(config_yaml(settings))) == settings


def test_differences_are_named_with_both_values() -> None:
    before, after = dataclasses.asdict(run()), dataclasses.asdict(run(train={"seed": 3}, data={"max_rows": 2}))
    assert differences(before, after) == ["data.max_rows was 64 and is 2", "train.seed was 0 and is 3"]


def test_reading_settings_loads_no_torch() -> None:
    code = "import sys, mllm.config.run; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0
