"""Short ways to write the typed parts of a config, for tests: a test says what it is about and no more."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from transformers import PreTrainedConfig

from mllm.budget import MediumSpace, Space
from mllm.config.model import ADAPTERS, AdapterConfig
from mllm.config.reading import read
from mllm.config.space import medium_space, space_of
from mllm.encoders import EncoderBlock, default_block
from mllm.model.configuration import BLOCKS

_TEXT = {"encoder": "source", "compressor": "kind", "projector": "kind"}


def merged(*blocks: Mapping[str, Any]) -> dict[str, Any]:
    """Put blocks of one medium together, the later ones winning key by key; another kind replaces what was there."""
    out: dict[str, Any] = {}
    for block in blocks:
        for name, value in block.items():
            if name not in _TEXT or value is None:
                out[name] = value
                continue
            values = {_TEXT[name]: value} if isinstance(value, str) else dict(value)
            before = out.get(name, {})
            is_other = "kind" in values and values["kind"] != before.get("kind", values["kind"])
            out[name] = values if is_other else {**before, **values}
    return out


def medium(name: str, values: Mapping[str, Any], **more: Any) -> Any:
    """Read the block of a medium; its encoder comes from nowhere unless it is said."""
    return read(BLOCKS[name], merged({"encoder": {}}, values, more, _source(values, more)), f"model.{name}")


def _source(values: Mapping[str, Any], more: Mapping[str, Any]) -> dict[str, Any]:
    encoder = merged(values, more).get("encoder", {})
    return {} if "source" in encoder or encoder.get("kind") == "frames" else {"encoder": {"source": "none"}}


def space(**media: Mapping[str, Any]) -> Space:
    """Return the space of media that are given as the values of their blocks."""
    return space_of({name: medium(name, values) for name, values in media.items()})


def one_space(name: str, values: Mapping[str, Any]) -> MediumSpace:
    """Return the space of one medium."""
    return medium_space(name, medium(name, values))


def encoder_block(config: PreTrainedConfig, values: Mapping[str, Any] | None = None) -> EncoderBlock:
    """Return the `encoder` block of a backbone with some values changed."""
    return replace(default_block(config), **(values or {}))


def adapter_of(values: Mapping[str, Any]) -> AdapterConfig:
    """Read an adapter; LoRA where no kind is said."""
    return read(ADAPTERS[values.get("kind", "lora")], values, "model.adapter")
