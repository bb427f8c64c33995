"""Parts from outside: named by `kind` in a config, built and counted; a name is never given twice."""

from dataclasses import dataclass, replace
from typing import Any, Literal

import pytest
import tiny
import torch
from blocks import adapter_of
from torch import Tensor, nn

from mllm import adapters, compressors, encoders
from mllm.budget import Budget
from mllm.compressors import Pool, Site, register_compressor
from mllm.config import medium, model
from mllm.config.medium import ImagePoolConfig, MediumConfig
from mllm.config.reading import read
from mllm.model.trainables import part_of, set_trainables


class CornerPool(Pool):
    """Averages as `Pool` does and adds a constant, so that one can tell them apart."""

    def forward(self, *inputs: Any, **options: Any) -> Tensor:
        return super().forward(*inputs, **options) + 1.0


@dataclass(frozen=True, kw_only=True)
class CornerConfig(ImagePoolConfig):
    """Keys of the compressor of these tests."""

    kind: Literal["corner"] = "corner"  # pyright: ignore[reportIncompatibleVariableOverride]
    strength: float = 1.0
    """Is read by nothing; a key of its own."""


def build_corner(site: Site, block: MediumConfig) -> CornerPool:
    assert isinstance(block.compressor, CornerConfig)
    projector = compressors.build_projector(block.projector, in_size=site.in_size, out_size=site.out_size)
    return CornerPool(projectors=compressors.ProjectorBank([projector]), grid=site.grid)


@pytest.fixture(autouse=True)
def restored(monkeypatch: pytest.MonkeyPatch) -> None:
    """Takes out again what a test has registered."""
    configs = (medium.IMAGE_COMPRESSORS, medium.STREAM_COMPRESSORS, model.ADAPTERS)
    for registry in (*configs, compressors.COMPRESSORS, adapters.BUILDERS, encoders.ENCODERS):
        monkeypatch.setattr(registry, "_kinds", dict(registry))


def test_a_compressor_from_outside_is_named_counted_and_run() -> None:
    register_compressor("corner", build_corner, config=CornerConfig, media=["image"])
    register_compressor("corner", build_corner, config=CornerConfig, media=["image"])  # once more changes nothing
    config = tiny.settings(("image",), image={"compressor": {"kind": "corner", "strength": 2.0}, "budgets": [16, 1]})
    assert config.image is not None
    assert isinstance(config.image.compressor, CornerConfig)
    registered, plain = tiny.model(config), tiny.model(tiny.settings(("image",), image={"budgets": [16, 1]}))
    assert isinstance(registered.model.compressors["image"], CornerPool)
    registered.load_state_dict(plain.state_dict())
    processor = tiny.processor(config)
    batch = tiny.batch(processor, [([tiny.random_media("image")], "yes")], for_training=True)
    inputs = processor.expand(batch, [[Budget.parse("image=16")]], left_padding=False).inputs
    counts = inputs["num_image_tokens"]
    assert counts.tolist() == [16]
    with torch.no_grad():
        features = plain.model.encode("image", inputs["pixel_values"])
        ours, theirs = (
            each.model.compress("image", features, num_tokens=counts, max_tokens=16) for each in (registered, plain)
        )
    torch.testing.assert_close(ours, theirs + 1.0)


def test_keys_of_a_kind_from_outside_are_checked_as_ours_are() -> None:
    register_compressor("corner", build_corner, config=CornerConfig, media=["image"])
    block = {"encoder": "a", "budgets": [1]}
    with pytest.raises(ValueError, match=r"model.image.compressor.strenght.*strength"):
        read(medium.ImageConfig, {**block, "compressor": {"kind": "corner", "strenght": 1}}, "model.image")
    with pytest.raises(ValueError, match=r"model.audio.compressor.kind is 'corner'; allowed: pool, query, stack"):
        read(medium.AudioConfig, {"encoder": "a", "budgets": ["/4"], "compressor": {"kind": "corner"}}, "model.audio")


def test_a_name_is_given_once() -> None:
    with pytest.raises(ValueError, match="compressor 'pool' is taken"):
        register_compressor("pool", build_corner, config=CornerConfig, media=["image"])
    with pytest.raises(ValueError, match=r"media names 'smell'; allowed: image, audio, video"):
        register_compressor("corner", build_corner, config=CornerConfig, media=["smell"])
    with pytest.raises(ValueError, match=r"adapter 'lora' is taken by mllm\.config\.model\.LoraConfig"):
        adapters.register_adapter("lora", lambda module, config, seed: None, config=CornerConfig)
    # A name that is free for the builder and taken by a config leaves nothing behind.
    medium.STREAM_COMPRESSORS.register("corner", medium.PoolConfig)
    with pytest.raises(ValueError, match=r"compressor 'corner' is taken by mllm\.config\.medium\.PoolConfig"):
        register_compressor("corner", build_corner, config=CornerConfig, media=["image", "audio"])
    assert "corner" not in compressors.COMPRESSORS
    assert "corner" not in medium.IMAGE_COMPRESSORS
    with pytest.raises(ValueError, match="encoder 'whisper' is taken"):
        encoders.register_encoder("whisper", encoders.ENCODERS["hubert"])


def test_an_adapter_from_outside_trains_and_can_be_named() -> None:
    @dataclass(frozen=True, kw_only=True)
    class ShiftConfig:
        """Keys of the adapter of this test."""

        kind: Literal["shift"] = "shift"
        """Names it."""
        size: int = 1
        """Sets how many numbers are learned."""

        def weights_per_layer(self, linears: Any) -> int:
            return self.size

    def build(module: nn.Module, config: ShiftConfig, seed: int) -> None:
        module.register_parameter("adapter_shift", nn.Parameter(torch.full((config.size,), float(seed))))

    adapters.register_adapter("shift", build, config=ShiftConfig)
    config = replace(tiny.settings(("image",)), adapter=adapter_of({"kind": "shift", "size": 3}))
    built = tiny.model(config)
    assert set_trainables(built, ("adapter",)) == ["model.language_model.adapter_shift"]


def test_what_an_encoder_calls_adapter_is_the_encoders() -> None:
    assert part_of("model.language_model.layers.0.mlp.adapter_bottleneck.down.weight") == "adapter"
    assert part_of("model.audio_tower.backbone.encoder.layers.0.adapter_layer.linear_1.weight") == "audio"
