"""Holds what released checkpoints of LLaVA-1.5, MQT-LLaVA and LLaVA-1.5-M3 do not, with the published values.

Plain dataclasses. Knows no torch, so that `--help` is quick.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

LLM = "lmsys/vicuna-7b-v1.5"
VISION = "openai/clip-vit-large-patch14-336"
SCALES_KEY = "matryoshka_vis_token_scale"
"""A key of `config.json` that only M3's have: the counts it was trained at."""


@dataclass(frozen=True)
class System:
    """Holds what the checkpoints of one system have in common.

    Args:
        title: as its paper calls it.
        connector: `query` for Matryoshka queries, `pool` for a projector whose tokens may be averaged.
        scales: published counts of the connector `pool`; empty for all patches and only them.
    """

    title: str
    connector: Literal["query", "pool"]
    scales: tuple[int, ...] = ()


SYSTEMS = {
    "mqt-llava": System("MQT-LLaVA", "query"),
    "llava-m3": System("LLaVA-1.5-M3", "pool", scales=(1, 9, 36, 144, 576)),
    "llava": System("LLaVA-1.5", "pool"),
}


@dataclass(frozen=True, kw_only=True)
class Options:
    """Hold what was used to train the checkpoint and is not in it."""

    llm: str | None = None
    """Folder or hub name of the LLM: config and tokenizer, and the weights of a first stage. By default those of the
    checkpoint's folder where it has them, else lmsys/vicuna-7b-v1.5."""
    vision: str | None = None
    """Folder or hub name of the vision encoder: config and image processor, and the weights where the checkpoint holds
    none. By default what the checkpoint's config.json names, else openai/clip-vit-large-patch14-336."""
    feature_layer: int | None = None
    """Hidden states of the encoder that are read, by index; by default as in config.json, else -2."""
    image_aspect_ratio: Literal["pad", "square"] | None = None
    """How an image becomes square: grey margins, or its middle cut out. By default as in config.json, else pad."""
    budgets: list[int] = field(default_factory=list)
    """Counts it was trained at. By default as published: M3 as in config.json or 1, 9, 36, 144, 576; MQT every even
    count, its first stage all queries; LLaVA all patches."""
    query_heads: int | None = None
    """Number of attention heads of the queries of MQT; by default as many as the encoder has, 16 of CLIP-L."""


@dataclass(frozen=True)
class ReleasedConfig:
    """Holds what the `config.json` of a checkpoint says; defaults where it is silent or there is none.

    Args:
        values: all of it.
        source: its name, for messages.
    """

    values: Mapping[str, Any]
    source: str = ""

    def __post_init__(self) -> None:
        for key, allowed in _ALLOWED.items():
            value = self.values.get(key)
            if value is not None and value not in allowed:
                shown = " or ".join(map(str, allowed))
                raise ValueError(f"{key} is {value} in {self.source}; only {shown} can be converted")

    @property
    def vision(self) -> str:
        """The encoder it names."""
        return self.values.get("mm_vision_tower") or VISION

    @property
    def feature_layer(self) -> int:
        """The hidden states of the encoder that are read."""
        return self.values.get("mm_vision_select_layer", -2)

    @property
    def image_aspect_ratio(self) -> str:
        """How an image becomes square. The released code cuts the middle out where its config says nothing."""
        return self.values.get("image_aspect_ratio") or ("square" if self.values else "pad")

    @property
    def scales(self) -> Sequence[int]:
        """The counts M3 was trained at."""
        return self.values.get(SCALES_KEY) or ()

    def check_size(self, hidden_size: int) -> None:
        """Refuse an encoder of another size.

        Raises:
            ValueError: both sizes.
        """
        expected = self.values.get("mm_hidden_size", hidden_size)
        if expected != hidden_size:
            raise ValueError(
                f"mm_hidden_size is {expected} in {self.source}, but the vision encoder is {hidden_size} wide"
            )


_ALLOWED: dict[str, tuple[Any, ...]] = {
    "model_type": ("llava_llama", "llava", "llama"),
    "mm_vision_select_feature": ("patch",),
    "mm_patch_merge_type": ("flat",),
    "mm_use_im_start_end": (False,),
    "image_aspect_ratio": ("pad", "square"),
}
"""Values of `config.json` that the converted model can have."""
