"""Decides what trains, lists it and counts it: the one place that does.

Knows parameter names. Does not know why they should learn.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.distributed.tensor import DTensor

from mllm.encoders import freeze
from mllm.model.configuration import TOWER_NAMES

PARTS = ("compressors", "adapter", "llm", *TOWER_NAMES)
"""What `train.parts` may name: compressors (with projectors, newline and rows of new tokens), the adapter, or a whole
part of the model."""
ADAPTER_MARKS = (".lora_", ".mome.")
"""What the names of an adapter's parameters hold."""
OUTSIDE_MARK = ".adapter_"
"""The same of adapters from outside, in the LLM alone: encoders such as wav2vec 2.0 have such names of their own."""
WORD_TABLE_MARK = ".word_table."
"""What the names of a word projector's tables hold, which are made before the first step, and held from then on."""
NEW_TOKENS = "model.new_tokens.rows"
"""The rows of tokens that the LLM was never trained on; see `mllm.model.new_tokens`."""

logger = logging.getLogger(__name__)


def is_sharded(module: nn.Module) -> bool:
    """Tell whether weights are in shards, one on each process: all by ZeRO-3, frozen layers of the LLM by FSDP2."""
    return any(_in_zero3(parameter) or isinstance(parameter, DTensor) for parameter in module.parameters())


def trains_in_shards(model: nn.Module) -> bool:
    """Tell whether what trains is in shards, as it is by ZeRO-3 and not by FSDP2."""
    return any(_in_zero3(parameter) for parameter in model.parameters() if parameter.requires_grad)


def _in_zero3(parameter: nn.Parameter) -> bool:
    return hasattr(parameter, "ds_id")


@contextmanager
def whole(module: nn.Module) -> Iterator[None]:
    """Let the weights of a module be read inside, also where ZeRO-3 shards them; every process calls this."""
    if not any(_in_zero3(parameter) for parameter in module.parameters()):
        yield
        return
    from deepspeed import zero

    with zero.GatheredParameters(list(module.parameters())):
        yield


def set_trainables(model: Any, parts: tuple[str, ...] = ("compressors", "adapter")) -> list[str]:
    """Let exactly the named parts learn, freeze everything else, and log the list with counts.

    The rows of new tokens learn whatever is named: nobody has trained them, and frozen ones would never mean a thing.

    Args:
        model: an `ElasticForConditionalGeneration`, its adapter already in place.
        parts: see `PARTS`.

    Returns:
        The names of what checkpoints hold, sorted; see `saved_names`.

    Raises:
        ValueError: an unknown part, or nothing left that trains.
    """
    if unknown := set(parts) - set(PARTS):
        raise ValueError(f"train.parts holds {sorted(unknown)}; allowed: {', '.join(PARTS)}")
    for medium, encoder in TOWER_NAMES.items():
        if medium not in parts and hasattr(model.model, encoder):
            freeze(getattr(model.model, encoder))
    for name, parameter in model.named_parameters():  # an adapter inside a frozen encoder learns all the same
        learns = part_of(name) in parts and WORD_TABLE_MARK not in name
        parameter.requires_grad_(learns or name == NEW_TOKENS)
    if not trainable_names(model):
        raise ValueError(f"train.parts {list(parts)} leaves nothing to train in this model")
    model.config.trained_parts = list(parts)
    _log(model)
    return saved_names(model)


def trainable_names(model: nn.Module) -> list[str]:
    """List the names of the parameters that learn, sorted."""
    return sorted(name for name, parameter in model.named_parameters() if parameter.requires_grad)


def held_names(model: Any) -> list[str]:
    """List the names of the parameters that were made with what learns, and do not learn themselves, sorted."""
    if "compressors" not in model.config.trained_parts:
        return []
    return sorted(name for name, _ in model.named_parameters() if WORD_TABLE_MARK in name)


def saved_names(model: Any) -> list[str]:
    """List the names of the parameters that checkpoints hold, sorted: those that learn, and those held beside them."""
    return sorted({*trainable_names(model), *held_names(model)})


def part_of(name: str) -> str:
    """Find the part (see `PARTS`) that a parameter belongs to, by its name."""
    is_outside = OUTSIDE_MARK in name and name.startswith("model.language_model.")
    if is_outside or any(mark in name for mark in ADAPTER_MARKS):
        return "adapter"
    if name == NEW_TOKENS or name.startswith(("model.compressors.", "model.newline.")):
        return "compressors"
    for medium, encoder in TOWER_NAMES.items():
        if name.startswith(f"model.{encoder}."):
            return medium
    return "llm"


def _log(model: nn.Module) -> None:
    counts: dict[str, list[int]] = {}  # trained and all, by part
    for name, parameter in model.named_parameters():
        count = counts.setdefault(part_of(name), [0, 0])
        count[0] += parameter.numel() if parameter.requires_grad else 0
        count[1] += parameter.numel()
        if parameter.requires_grad:
            logger.debug("trains: %s %s", name, tuple(parameter.shape))
    for part, (trained, everything) in counts.items():
        logger.info("%s: %s of %s parameters train", part, f"{trained:,}", f"{everything:,}")
