"""Knows how LLaVA-1.5, MQT-LLaVA and LLaVA-1.5-M3 name what they hold, and what the shapes of it tell.

Knows names and shapes. Does not know files, options of a command, or what a run folder looks like.
Sources: LLaVA-1.5 (arXiv 2310.03744), MQT-LLaVA (2405.19315), M3 (2405.17430) and their released code.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from mllm.convert.state_files import StoredWeight

ENCODER_PREFIX = "model.vision_tower.vision_tower.vision_model."
QUERIES = "model.query_abstractor."
PROJECTOR = "model.mm_projector."
EMBEDDINGS = "model.embed_tokens.weight"
_LLM = ("model.embed_tokens.", "model.layers.", "model.norm.", "lm_head.")
_CONSTANTS = ("rotary_emb.inv_freq", "embeddings.position_ids")
"""The ends of entries that old checkpoints hold and that are computed now."""
_OURS = "model.compressors.image."


@dataclass(frozen=True)
class Split:
    """Holds the entries of a checkpoint by what they belong to: the encoder's without prefix, else as released.

    Those of LLM and encoder are still in their files.
    """

    llm: dict[str, StoredWeight] = field(default_factory=dict)
    vision: dict[str, StoredWeight] = field(default_factory=dict)
    queries: dict[str, Tensor] = field(default_factory=dict)
    projector: dict[str, Tensor] = field(default_factory=dict)

    @property
    def connector(self) -> str:
        """The kind of what stands between the encoder and the LLM: `query` or `pool`."""
        return "query" if self.queries else "pool"


def split_state(state: Mapping[str, StoredWeight]) -> Split:
    """Sort the entries of a checkpoint.

    Raises:
        ValueError: an entry of none of the parts, not exactly one kind of connector, or a damaged one.
    """
    split, unknown = Split(), []
    for name, value in state.items():
        if name.endswith(_CONSTANTS):
            continue
        if name.startswith(ENCODER_PREFIX):
            split.vision[name.removeprefix(ENCODER_PREFIX)] = value
        elif name.startswith(QUERIES):
            split.queries[name] = value.read()
        elif name.startswith(PROJECTOR):
            split.projector[name] = value.read()
        elif name.startswith(_LLM):
            split.llm[name] = value
        else:
            unknown.append(name)
    if unknown:
        raise ValueError(f"the checkpoint holds unknown {', '.join(sorted(unknown)[:3])} ({len(unknown)} in all)")
    if bool(split.queries) == bool(split.projector):
        which = "both" if split.queries else "neither"
        raise ValueError(f"the checkpoint holds {which} of {QUERIES}* and {PROJECTOR}*; exactly one is expected")
    return split


@dataclass(frozen=True)
class Queries:
    """Holds what the shape of MQT's queries tells."""

    num_queries: int
    size: int

    def layout(self, out_size: int) -> dict[str, tuple[int, ...]]:
        """Give names and shapes of every entry; `out_size` is the LLM's."""
        size = self.size
        shapes: dict[str, tuple[int, ...]] = {
            "pos_embed": (self.num_queries, size),
            "query": (self.num_queries, size),
            "proj": (size, out_size),
            "attn.in_proj_weight": (3 * size, size),
            "attn.in_proj_bias": (3 * size,),
            "attn.out_proj.weight": (size, size),
            "attn.out_proj.bias": (size,),
        }
        shapes |= {f"ln_{letter}.{kind}": (size,) for letter in "qkv" for kind in ("weight", "bias")}
        return {f"{QUERIES}{name}": shape for name, shape in shapes.items()}

    @staticmethod
    def entries(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Name our entries; the names behind the prefix are the released ones."""
        return {f"{_OURS}{name.removeprefix(QUERIES)}": value.float() for name, value in state.items()}


def read_queries(state: Mapping[str, Tensor], *, feature_size: int) -> Queries:
    """Read what MQT's queries are.

    Args:
        feature_size: of the vision encoder.

    Raises:
        ValueError: queries that form no square or are not as wide as the encoder.
    """
    name = f"{QUERIES}query"
    if name not in state or state[name].dim() != 2:
        raise ValueError(f"the checkpoint misses {name}, a matrix")
    num_queries, size = state[name].shape
    if not num_queries or math.isqrt(num_queries) ** 2 != num_queries:
        raise ValueError(f"{name} holds {num_queries} queries, which form no square grid")
    if size != feature_size:
        raise ValueError(f"{name} is {size} wide, but the vision encoder is {feature_size} wide")
    return Queries(num_queries, size)


@dataclass(frozen=True)
class PatchProjector:
    """Holds what the names and shapes of LLaVA's projector tell; `hidden_size` is None where it is a single Linear."""

    hidden_size: int | None

    @property
    def kind(self) -> str:
        """What the released config.json calls it."""
        return "linear" if self.hidden_size is None else "mlp2x_gelu"

    def layout(self, in_size: int, out_size: int) -> dict[str, tuple[int, ...]]:
        """Give names and shapes of every entry: from the encoder's size to the LLM's."""
        if self.hidden_size is None:
            return {f"{PROJECTOR}weight": (out_size, in_size), f"{PROJECTOR}bias": (out_size,)}
        return {
            f"{PROJECTOR}0.weight": (self.hidden_size, in_size),
            f"{PROJECTOR}0.bias": (self.hidden_size,),
            f"{PROJECTOR}2.weight": (out_size, self.hidden_size),
            f"{PROJECTOR}2.bias": (out_size,),
        }

    def entries(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Name our entries: the numbers of the layers are the released ones."""
        prefix = f"{_OURS}projectors.0." + ("0." if self.hidden_size is None else "")
        return {f"{prefix}{name.removeprefix(PROJECTOR)}": value.float() for name, value in state.items()}


def read_projector(state: Mapping[str, Tensor]) -> PatchProjector:
    """Read what LLaVA's projector is.

    Raises:
        ValueError: no matrix where its first layer should be.
    """
    if f"{PROJECTOR}weight" in state:
        return PatchProjector(None)
    first = state.get(f"{PROJECTOR}0.weight")
    if first is None or first.dim() != 2:
        raise ValueError(f"the checkpoint misses {PROJECTOR}0.weight, a matrix")
    return PatchProjector(first.shape[0])
