"""A compressor and an adapter of another package are named by their kind, as ours are."""

from dataclasses import dataclass
from typing import Any, Literal

import pytest
import tiny
import torch
from torch import Tensor, nn

from mllm import adapters, compressors
from mllm.adapters.lora import inject
from mllm.budget import Budget
from mllm.compressors import Pool, ProjectorBank, Site, build_projector, register_compressor
from mllm.config import medium as medium_configs
from mllm.config import model as model_configs


@dataclass(frozen=True, kw_only=True)
class LoudConfig:
    """Pooling that multiplies."""

    kind: Literal["loud"] = "loud"
    """Multiplies soft tokens."""
    factor: float = 2.0
    """Multiplies by this."""


class Loud(Pool):
    """Pools and multiplies."""

    factor = 1.0

    def forward(self, *arguments: Any, **options: Any) -> Tensor:
        return self.factor * super().forward(*arguments, **options)


def build_loud(site: Site, block: Any) -> Loud:
    projector = build_projector(block.projector, in_size=site.in_size, out_size=site.out_size)
    made = Loud(projectors=ProjectorBank([projector]), grid=site.grid)
    made.factor = block.compressor.factor
    return made


@dataclass(frozen=True, kw_only=True)
class NarrowConfig:
    """LoRA of rank 1."""

    kind: Literal["narrow"] = "narrow"
    """Adds LoRA of rank 1."""


@pytest.fixture(autouse=True)
def registries(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forgets what a test registers."""
    every = (compressors.COMPRESSORS, medium_configs.IMAGE_COMPRESSORS, medium_configs.STREAM_COMPRESSORS)
    for registry in (*every, adapters.ADAPTERS, model_configs.ADAPTERS):
        monkeypatch.setattr(registry, "_kinds", dict(registry))


def test_a_compressor_of_another_package_is_named_counted_built_and_kept() -> None:
    register_compressor("loud", config=LoudConfig, build=build_loud, media=["image"])
    own = tiny.settings(("image",), image={"compressor": {"kind": "loud", "factor": 3.0}})
    model, processor = tiny.model(own), tiny.processor(own)
    plain = tiny.model(tiny.settings(("image",)))
    inputs = processor.expand(
        tiny.batch(processor, [([tiny.random_media("image"), "what?"], "red")]),
        [[Budget.parse("image=7")]],
        left_padding=True,
    ).inputs
    loud, quiet = (
        one.model.get_image_features(inputs["pixel_values"], inputs["num_image_tokens"]).pooler_output[0]
        for one in (model, plain)
    )
    torch.testing.assert_close(loud, 3 * quiet)
    assert model.config.to_dict()["media"]["image"]["compressor"] == {"kind": "loud", "factor": 3.0}
    with pytest.raises(ValueError, match=r"model.image.compressor.order goes with kind pool, not with loud"):
        tiny.settings(("image",), image={"compressor": {"kind": "loud", "order": "haar"}})
    with pytest.raises(ValueError, match=r"model.audio.compressor.kind is 'loud'; allowed: pool, query, stack"):
        tiny.settings(("audio",), audio={"compressor": "loud"})
    with pytest.raises(ValueError, match="compressor 'pool' is taken"):
        register_compressor("pool", config=LoudConfig, build=build_loud, media=["image"])
    with pytest.raises(ValueError, match="media holds 'smell'; allowed: image, audio, video"):
        register_compressor("other", config=LoudConfig, build=build_loud, media=["smell"])


def test_an_adapter_of_another_package_is_named_and_put_in() -> None:
    def inject_narrow(module: nn.Module, config: NarrowConfig, seed: int) -> None:
        inject(module, rank=1, alpha=1, targets=["q_proj"], seed=seed)

    adapters.register_adapter("narrow", config=NarrowConfig, inject=inject_narrow)
    from dataclasses import replace

    from mllm.config.model import ModelConfig
    from mllm.config.reading import read

    read_adapter = read(ModelConfig, {"llm": "none", "adapter": "narrow"}, "model").adapter
    assert read_adapter == NarrowConfig()
    model = tiny.model(replace(tiny.settings(("audio",)), adapter=read_adapter))
    names = [name for name, _ in model.named_parameters() if "lora_A" in name]
    assert len(names) == 2
    assert all(model.get_parameter(name).shape[0] == 1 for name in names)
