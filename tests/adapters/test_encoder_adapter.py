"""LoRA inside a frozen encoder: it learns, its weights do not move, and a saved or merged model answers the same."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from published_parts import part_config

from mllm.adapters import adapters_disabled, build_adapter
from mllm.budget import Budget
from mllm.checkpoints.build import build
from mllm.checkpoints.export import export
from mllm.checkpoints.load import load, save_run
from mllm.config.model import EncoderAdapterConfig, ModelConfig
from mllm.encoders import backbone_class
from mllm.model.trainables import part_of, set_trainables

LORA = EncoderAdapterConfig(rank=4, alpha=8, targets=["q_proj", "v_proj"])


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return tiny.write_parts(tmp_path_factory.mktemp("parts"))


def settings_of(parts: dict[str, str], lora: EncoderAdapterConfig | None = LORA) -> ModelConfig:
    plain = tiny.settings_on(parts, ("audio", "video"))
    assert plain.video is not None
    encoder = dataclasses.replace(plain.video.encoder, adapter=lora)
    return dataclasses.replace(plain, video=dataclasses.replace(plain.video, encoder=encoder))


def logits(model: Any, processor: Any) -> torch.Tensor:
    row = [tiny.random_media("video", 10, seed=3), tiny.random_media("audio", 20, seed=4), "what?"]
    batch = tiny.batch(processor, [(row, "red")], for_training=True)
    inputs = processor.expand(batch, [[Budget.parse("audio=/4,video=/2")]], left_padding=False).inputs
    return model(**inputs).logits


def stir(model: Any) -> None:
    """Give every LoRA something to say."""
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(1)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3)


def test_it_learns_inside_an_encoder_that_stays_as_it_is(parts: dict[str, str]) -> None:
    model, processor = build(settings_of(parts))
    names = set_trainables(model)
    inside = {name for name in names if name.startswith("model.video_tower.")}
    layers = model.config.encoder_configs["video"].num_hidden_layers
    assert len(inside) == layers * 2 * 2
    assert {part_of(name) for name in inside} == {"adapter"}
    model.train()
    assert not model.model.video_tower.training
    statistics = {name: value.clone() for name, value in model.model.video_tower.named_buffers()}
    stir(model)
    logits(model, processor).sum().backward()
    with_gradient = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert inside <= with_gradient <= set(names)
    assert all(parameter.grad.abs().sum() > 0 for name, parameter in model.named_parameters() if name in inside)
    assert all(value.equal(statistics[name]) for name, value in model.model.video_tower.named_buffers())


@torch.no_grad()
def test_disabled_it_is_the_frozen_encoder_bit_for_bit(parts: dict[str, str]) -> None:
    adapted, processor = build(settings_of(parts))
    plain, _ = build(settings_of(parts, None))
    assert logits(adapted, processor).equal(logits(plain, processor)), "it begins as nothing"
    stir(adapted)
    stir(plain)  # the LLM's own adapter
    assert not logits(adapted, processor).allclose(logits(plain, processor), atol=1e-3)
    with adapters_disabled(adapted), adapters_disabled(plain):
        assert logits(adapted, processor).equal(logits(plain, processor))


@torch.no_grad()
def test_saved_and_loaded_or_merged_it_answers_the_same(parts: dict[str, str], tmp_path: Path) -> None:
    model, processor = build(settings_of(parts))
    set_trainables(model)
    stir(model)
    expected = logits(model.eval(), processor)
    save_run(model, processor, tmp_path / "run")
    assert logits(*load(tmp_path / "run")).equal(expected)
    export(tmp_path / "run", tmp_path / "merged")
    merged, merged_processor = load(tmp_path / "merged")
    assert not any("lora" in name for name, _ in merged.named_parameters())
    torch.testing.assert_close(logits(merged, merged_processor), expected, rtol=1e-4, atol=1e-4)


def test_its_size_in_av_hubert_large_is_the_published_one() -> None:
    """Omni-AVSR: query and value of 24 layers at rank 64 are 6.29 million parameters."""
    config = part_config("av-hubert-large")
    with torch.device("meta"):
        made = backbone_class(config)._from_config(config)
        build_adapter(made, EncoderAdapterConfig(rank=64, alpha=128, targets=["q_proj", "v_proj"]))
    count = sum(parameter.numel() for name, parameter in made.named_parameters() if ".lora_" in name)
    assert count / 1e6 == pytest.approx(6.29, abs=0.005)
