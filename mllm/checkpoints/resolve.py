"""Fills in what the config of a model leaves to its parts, once they are known, and refuses what they have no use for.

Knows configs of parts. Does not know weights, files or how anything is computed. After this every value is a value: how
many heads, how large a projector, which scales.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from transformers import PreTrainedConfig

from mllm.adapters.expert_ids import kinds_of, scales_of, tasks_of
from mllm.compressors import count_heads
from mllm.config.medium import (
    FramesConfig,
    HybridConfig,
    ImageEncoderConfig,
    MlpConfig,
    MoeConfig,
    QueryConfig,
    WordsConfig,
)
from mllm.config.model import LoraBankConfig, ModelConfig, MomeConfig
from mllm.config.space import space_of
from mllm.encoders import EncoderFacts, encoder_facts
from mllm.hosts import HOSTS, host_facts


def resolve(
    model: ModelConfig, *, text_config: PreTrainedConfig, encoder_configs: Mapping[str, PreTrainedConfig]
) -> ModelConfig:
    """Return the config with every "auto", every empty list of scales and all that one key sets by another filled in.

    Doing so again changes nothing.

    Args:
        text_config: of the LLM. encoder_configs: by medium, of those that have an encoder of their own.

    Raises:
        ValueError: a key that the family of an encoder has no use for, scales or tasks for a variant without such, or
            scales that are not of the trained space.
    """
    media: dict[str, Any] = dict(model.media)
    for medium in model.encoded_media:
        if model.host is not None:
            _check_full(medium, media[medium], host_facts(encoder_configs[medium]))
            _check_positions(medium, media[medium], encoder_configs[medium].model_type)
            continue
        facts = encoder_facts(encoder_configs[medium], media[medium].encoder)
        media[medium] = _resolve_medium(media[medium], facts, out_size=int(text_config.hidden_size))
        if medium == "image":
            _check_one_size(model, facts)
    video = media.get("video")
    if video is not None and isinstance(video.encoder, FramesConfig) and not video.encoder.trained_counts:
        media["video"] = replace(video, encoder=replace(video.encoder, trained_counts=[video.encoder.count]))
    return replace(model, **media, adapter=_resolve_adapter(replace(model, **media)))


def _check_full(medium: str, block: Any, facts: EncoderFacts) -> None:
    """Refuse budgets whose largest is not the host's own, at which it answers as it did before.

    Raises:
        ValueError: naming the full budget; or a medium that the host does not read.
    """
    if facts.medium != medium:
        raise ValueError(f"model.{medium} is set, but this host reads {facts.medium}")
    full = "/1"
    if facts.grid is not None and facts.max_patches is None:
        full = str(facts.grid[0] * facts.grid[1])
    if str(block.amounts[0]) != full:
        raise ValueError(
            f"model.{medium}.budgets begins with {block.amounts[0]}; the largest must be the host's full budget, {full}"
        )


def _check_positions(medium: str, block: Any, model_type: str) -> None:
    """Refuse to choose positions of three dimensions for a host that has none.

    Raises:
        ValueError: naming the families that have them.
    """
    positions = getattr(block, "positions", None)
    if positions is not None and not HOSTS[model_type].has_grid_positions:
        allowed = ", ".join(name for name, family in HOSTS.items() if family.has_grid_positions)
        raise ValueError(
            f"model.{medium}.positions is {positions}, but those of a {model_type} have one dimension; leave it out. "
            f"They have three in {allowed}"
        )


def _resolve_medium(block: Any, facts: EncoderFacts, *, out_size: int) -> Any:
    encoder, compressor, projector = block.encoder, block.compressor, block.projector
    if isinstance(encoder, ImageEncoderConfig) and facts.max_patches is not None:
        encoder = replace(encoder, max_num_patches=facts.max_patches)
    if isinstance(compressor, QueryConfig | HybridConfig):
        compressor = replace(compressor, num_heads=count_heads(compressor.num_heads, facts.hidden_size))
    if isinstance(compressor, QueryConfig):
        compressor = replace(compressor, num_queries=block.num_queries)
    if isinstance(compressor, HybridConfig) and compressor.anchors == "auto":
        compressor = replace(compressor, anchors=[size for size in block.anchors if size > 1])
    if isinstance(projector, MlpConfig | MoeConfig | WordsConfig) and projector.hidden_size == "auto":
        projector = replace(projector, hidden_size=out_size)
    return replace(block, encoder=encoder, compressor=compressor, projector=projector)


def _check_one_size(model: ModelConfig, facts: EncoderFacts) -> None:
    """Refuse tiles or frames with an encoder whose images keep their shape."""
    if facts.max_patches is None or model.image is None:
        return
    if model.shows_frames or model.image.tiling is not None:
        key = "model.image.tiling" if model.image.tiling is not None else "model.video.encoder.kind frames"
        raise ValueError(f"{key} needs an encoder that reads images of one size, and this one keeps their shape")


def _resolve_adapter(model: ModelConfig) -> Any:
    """Name the scales and tasks that the adapter has something for."""
    adapter = model.adapter
    space = space_of(model.media)
    if isinstance(adapter, MomeConfig):
        return replace(adapter, scales=scales_of(adapter.scales, space)) if adapter.disjoint_routers else adapter
    if not isinstance(adapter, LoraBankConfig):
        return adapter
    held = kinds_of(adapter.variant)
    for kind, names in (("scale", adapter.scales), ("task", adapter.tasks)):
        if kind not in held and names:
            raise ValueError(
                f"model.adapter.{kind}s is {names}, but variant {adapter.variant} has experts of "
                f"{', '.join(held)} alone"
            )
    return replace(
        adapter,
        scales=scales_of(adapter.scales, space) if "scale" in held else [],
        tasks=tasks_of(adapter.tasks, space) if "task" in held else [],
    )
