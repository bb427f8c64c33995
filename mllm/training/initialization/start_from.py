"""Starts a run from the trained values of another one, of a converted checkpoint, or from a LoRA of PEFT's format.

Knows run folders, names of parameters and what makes two compressors the same. Does not know how anything is trained.
"""

import logging
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn

from mllm.checkpoints.load import TRAINABLES
from mllm.checkpoints.peft_folders import CONFIG_FILE, load_lora
from mllm.config.medium import MediumConfig
from mllm.config.reading import plain
from mllm.config.run import differences
from mllm.model.configuration import ElasticConfig
from mllm.model.trainables import NEW_TOKENS, part_of, saved_names

# What may differ: the counts that are trained, how files become input, and what the shapes of the values tell anyway.
_FREE = {"budgets", "tiling", "span"}
_FREE_OF_PARTS = {
    "encoder": {"pad_to_square", "normalize", "size_pixels", "crop_pixels"},
    "compressor": {"num_queries", "start"},
    "projector": {"hidden_size"},
}
logger = logging.getLogger(__name__)


def start_from(model: Any, folder: str | Path) -> list[str]:
    """Put every trained value of a run into a model that is about to train.

    Args:
        model: an `ElasticForConditionalGeneration` in which what trains is set.
        folder: the run, or a LoRA of PEFT's format.

    Returns:
        The names of what was put in; everything else that trains keeps its initial value.

    Raises:
        FileNotFoundError: the folder is neither.
        ValueError: values that have no place in the model, that would not train and so be lost, or that were trained
            beside another encoder or compressor; all are named, with the keys to change.
    """
    folder = Path(folder)
    if (folder / CONFIG_FILE).is_file():
        names = load_lora(model, folder)
        logger.info("started from the LoRA in %s: %d values", folder, len(names))
        return names
    if not (folder / TRAINABLES).is_file():
        raise FileNotFoundError(
            f"train.start_from {folder} is no run: there is no {TRAINABLES} in it, and no {CONFIG_FILE} of a LoRA"
        )
    before = ElasticConfig.from_pretrained(folder)
    _check_parts(model.config, before, folder)
    parameters, learning = dict(model.named_parameters()), set(saved_names(model))
    with safe_open(folder / TRAINABLES, framework="pt") as file:
        names = sorted(file.keys())
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name in names}
        if NEW_TOKENS in shapes and NEW_TOKENS in parameters:  # rows go by their tokens, and here may be more of them
            shapes[NEW_TOKENS] = (len(parameters[NEW_TOKENS]), *shapes[NEW_TOKENS][1:])
        _check_names(shapes, parameters, learning, folder)
        with torch.no_grad():
            for name in names:
                if name == NEW_TOKENS:
                    rows = _rows_of(before, model.config)
                    parameters[name][rows] = file.get_tensor(name).to(parameters[name])
                else:
                    parameters[name].copy_(file.get_tensor(name))
    parts = ", ".join(sorted({part_of(name) for name in names}))
    logger.info("started from %s: %s (%d of %d values that train)", folder, parts, len(names), len(learning))
    return names


def _rows_of(before: ElasticConfig, now: ElasticConfig) -> list[int]:
    """Find where the new tokens of a run have their rows in a model, which may have others beside them."""
    tokens = list(now.new_tokens or {})
    return [tokens.index(token) for token in before.new_tokens or {}]


def _check_names(
    shapes: dict[str, tuple[int, ...]], parameters: dict[str, nn.Parameter], learning: set[str], folder: Path
) -> None:
    problems = []
    for name, shape in shapes.items():
        if name not in parameters:
            problems.append(f"{name} is not in this model")
        elif hasattr(parameters[name], "ds_id"):
            problems.append(f"{name} is sharded by ZeRO-3 already; use ZeRO-2")
        elif tuple(parameters[name].shape) != shape:
            problems.append(f"{name} has shape {shape}, here {tuple(parameters[name].shape)}")
        elif name not in learning:
            problems.append(f"{name} would not train and so be lost; put {part_of(name)} into train.parts")
    if problems:
        more = f" and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise ValueError(f"train.start_from {folder} does not fit: {'; '.join(problems[:5])}{more}")


def _compared(block: MediumConfig) -> dict[str, Any]:
    """Return what of a medium's block must be the same in both runs."""
    values = {key: value for key, value in plain(block).items() if key not in _FREE}
    for part, free in _FREE_OF_PARTS.items():
        if part in values:
            values[part] = {key: value for key, value in values[part].items() if key not in free}
    return values


def _check_parts(now: ElasticConfig, before: ElasticConfig, folder: Path) -> None:
    """Refuse media that were trained otherwise; another LLM is allowed and logged."""
    sources, old_sources = now.sources or {}, before.sources or {}
    media, old_media = now.encoded_media, before.encoded_media
    problems = []
    for medium in sorted(media.keys() & old_media.keys()):
        old, new = (_compared(every[medium]) for every in (old_media, media))
        problems += [f"model.{medium}.{line}" for line in differences(old, new)]
    if gone := sorted(set(before.new_tokens or {}) - set(now.new_tokens or {})):
        problems.append(f"it has a row for the new token {gone[0]}, which is none here; set the span of its medium")
    for part in sorted(sources.keys() & old_sources.keys()):
        digests = [every[part]["sha256"] for every in (old_sources, sources)]
        if all(digests) and digests[0] != digests[1]:
            line = f"the weights of {part} were {old_sources[part]['reference']}, here {sources[part]['reference']}"
            if part == "llm":
                logger.warning("train.start_from %s: %s", folder, line)
            else:
                problems.append(line)
    if problems:
        raise ValueError(f"train.start_from {folder} was trained otherwise: {'; '.join(problems)}")
