"""Examines a pretrained VLM or audio LLM that is to be adopted, and refuses one whose numbers are not met here.

Knows hosts, built models and random media. Does not know data, training or how a finding is shown.

The oracle is transformers: at the full budget the host's own processor and forward pass; at a reduced one the host's
own forward pass on fewer placeholders, which is given the pooled features in place of its own (`mm_encoder_outputs`, or
as embeddings where a class reads no such thing). So ids, features, splice, positions, masks and head are all compared.
"""

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from transformers import BatchFeature

from mllm.adapters.adapter_inputs import decoder_layers
from mllm.budget.tiling import Size, Tiling
from mllm.checkpoints.build import config_of_host, put_host
from mllm.checkpoints.pretrained import host_config, load_host, read_host_tokenizer, unsharded
from mllm.checkpoints.sources import resolve_source
from mllm.config.model import ModelConfig
from mllm.config.processor import ProcessorConfig
from mllm.config.reading import read
from mllm.encoders import EncoderFacts
from mllm.hosts import (
    build_host,
    find_family,
    host_facts,
    host_tiling,
    read_host_processor,
    reading_parts,
    tekken_inputs,
)
from mllm.hosts.resizing import GEMMA4_TOKENS, RESIZING
from mllm.hosts.tiles import method_settings
from mllm.model.modeling import ElasticForConditionalGeneration
from mllm.model.precision import read_dtype
from mllm.processing.processor import ElasticProcessor

QUESTION = "what is this?"
_IMAGE_PIXELS = ((90, 120), (200, 140))
_AUDIO_SECONDS = (1.0, 2.5)
_STREAM_RATES = ("/1", "/2", "/4", "/8")
_PATCH_RATES = ("/1", "/4", "/16")


@dataclass(frozen=True)
class Findings:
    """Tells what a host is made of.

    Args:
        model_type, medium: of the host.
        encoder, projector, llm: names of the classes, and their parameters.
        grid: rows and columns of a tile; of a typical image where images keep their shape.
        tokens_per_second, whole_seconds: of audio, and of the windows it is read in, where those are always whole.
        budgets: proposed, largest first.
        keeps_shape: images keep their shape, so that budgets are rates.
        resolutions: numbers N of `image<=N` to try, where the host can see images smaller.
    """

    model_type: str
    medium: str
    encoder: tuple[str, int]
    projector: tuple[str, int]
    llm: tuple[str, int]
    grid: tuple[int, int] | None
    tokens_per_second: float | None
    budgets: tuple[str, ...]
    keeps_shape: bool = False
    resolutions: tuple[int, ...] = ()
    whole_seconds: float | None = None


def examine(reference: str) -> Findings:
    """Tell what a host is made of, from its config alone.

    Raises:
        ValueError: a family that is not supported, or a member of one whose features are no grid.
        OSError: a source that is neither a folder nor to be had from the hub.
    """
    config = host_config(reference)
    family, facts = find_family(config.model_type, reference=reference), host_facts(config)
    with torch.device("meta"), unsharded():
        body = build_host(config).model
    encoder, projectors = reading_parts(body)
    names = ", ".join(type(part).__name__ for part in projectors)
    num_merging = sum(_size(getattr(encoder, name)) for name in family.merging)
    return Findings(
        model_type=config.model_type,
        medium=family.medium,
        encoder=(type(encoder).__name__, _size(encoder) - num_merging),
        projector=(names, sum(_size(part) for part in projectors)),
        llm=_sized(getattr(body, family.decoder)),
        grid=facts.grid,
        keeps_shape=facts.max_patches is not None,
        tokens_per_second=facts.frames_per_second,
        budgets=_proposed(facts),
        resolutions=_resolutions(config, facts),
        whole_seconds=family.clips.whole_seconds if family.clips is not None else None,
    )


def _proposed(facts: EncoderFacts) -> tuple[str, ...]:
    if facts.grid is None:
        return _STREAM_RATES
    return proposed_counts(facts.grid) if facts.max_patches is None else _PATCH_RATES


def _resolutions(config: Any, facts: EncoderFacts) -> tuple[int, ...]:
    """List two smaller ways of seeing: as much as four tiles and the whole have, and as one."""
    if facts.grid is None:
        return ()
    if (tiling := host_tiling(config)) is not None:
        return _tile_resolutions(tiling, facts.grid, facts.image_pixels)
    if config.model_type not in RESIZING:
        return ()
    if config.model_type == "gemma4":
        return GEMMA4_TOKENS[-2:]
    if facts.max_patches is not None:
        return (1024, 256)
    rows, columns = facts.grid
    return (5 * rows * columns, rows * columns)


def _tile_resolutions(tiling: Tiling, grid: Size, tile: Size | None) -> tuple[int, ...]:
    """List numbers that every image can keep to: with the thumbnail and four tiles, and with as few as there can be."""
    assert tile is not None
    counts = sorted({rows * columns for rows, columns in tiling.shapes(tile)})
    fewer = [count for count in (4, counts[0]) if counts[0] <= count < counts[-1]]
    rows, columns = grid
    # With a newline behind each row, of which there are most where tiles stand on each other.
    return tuple((1 + count) * rows * columns + count * rows for count in dict.fromkeys(fewer))


def proposed_counts(grid: tuple[int, int]) -> tuple[str, ...]:
    """List counts to train on: the whole grid, and grids of half the sides of the one before, down to one token."""
    rows, columns = grid
    counts = [rows * columns]
    while rows * columns > 1:
        rows, columns = (rows + 1) // 2, (columns + 1) // 2
        counts.append(rows * columns)
    return tuple(map(str, counts))


def probe(reference: str, *, dtype: str = "float32") -> None:
    """Compare a host with what this project makes of it, on random media, and refuse it where any number differs.

    Raises:
        ValueError: ids or logits that are not the host's own; or as `examine`, or weights that are not whole.
        OSError: as `examine`.
    """
    findings = examine(reference)
    model, processor, host = _adopted(reference, findings, dtype)
    # The gate is part of what is promised, so an LLM that cannot have it is no host.
    decoder_layers(model.model.language_model)
    for number, raw in enumerate(_media_of(findings.medium, np.random.default_rng(0))):
        _compare(model, processor, host, raw, budgets=findings.budgets, number=number)


@torch.no_grad()
def _compare(
    model: ElasticForConditionalGeneration,
    processor: ElasticProcessor,
    host: Any,
    raw: Any,
    *,
    budgets: tuple[str, ...],
    number: int,
) -> None:
    medium = processor.host.medium if processor.host is not None else ""
    full = _inputs(processor, raw, "")
    theirs = host_inputs(processor, raw, host)
    if not torch.equal(full["input_ids"], theirs["input_ids"]):
        raise ValueError(
            f"the prompt of {medium} {number + 1} has {full['input_ids'].shape[1]} ids, and the host's own processor "
            f"makes {theirs['input_ids'].shape[1]}, or others; it cannot be adopted"
        )
    _check_equal(model(**full).logits, host(**theirs).logits, f"{medium} {number + 1} at the full budget")
    most = int(full[f"num_{medium}_tokens"].max())
    for budget in budgets[1:]:
        if int(budget.removeprefix("/")) > most:  # the clip is too short for this rate
            continue
        reduced = _inputs(processor, raw, f"{medium}={budget}")
        expected = host(**oracle_inputs(model, host, reduced, theirs)).logits
        _check_equal(model(**reduced).logits, expected, f"{medium} {number + 1} at {budget}")


def _adopted(
    reference: str, findings: Findings, dtype: str
) -> tuple[ElasticForConditionalGeneration, ElasticProcessor, Any]:
    """Build a model on a host that is loaded once: both have the same weights in memory."""
    config = host_config(reference)
    kept = ProcessorConfig(host=read_host_processor(resolve_source(reference), config))
    host: Any = load_host(reference, config, dtype=read_dtype(dtype), attention="sdpa")
    block = {"budgets": list(findings.budgets)}
    elastic = config_of_host(read(ModelConfig, {"host": reference, findings.medium: block}, path="model"), config)
    with torch.device("meta"), unsharded():
        model = ElasticForConditionalGeneration(elastic)
    put_host(model, host)
    return model.eval(), ElasticProcessor(read_host_tokenizer(reference, config), elastic, kept), host


def _media_of(medium: str, rng: np.random.Generator) -> list[Any]:
    if medium == "image":
        sizes = [(*size, 3) for size in _IMAGE_PIXELS]
        return [Image.fromarray(rng.integers(0, 256, size, dtype=np.uint8)) for size in sizes]
    return [rng.normal(0, 0.1, round(seconds * 16_000)).astype(np.float32) for seconds in _AUDIO_SECONDS]


def _inputs(processor: ElasticProcessor, raw: Any, budget: str) -> BatchFeature:
    media: dict[str, Any] = {"images": [raw]} if isinstance(raw, Image.Image) else {"audio": [(raw, 16_000)]}
    return processor(text=QUESTION, budget=budget, **media)


def host_inputs(
    processor: ElasticProcessor,
    raw: Any,
    host: Any,
    *,
    question: str = QUESTION,
    images_kwargs: Mapping[str, Any] | None = None,
) -> Any:
    """Make the inputs of a question about an image, or about audio at the host's rate, by the host's own pipeline.

    Args:
        processor: of a model on the host.
        raw: an image of Pillow, or samples.
        host: itself, as transformers reads it.
        images_kwargs: with which the host's processor is called, such as a smaller resolution of images.
    """
    assert processor.host is not None
    if processor.host.family.is_tekken:
        outputs = tekken_inputs(host.name_or_path, raw, processor.host.sample_rate_hz, question)
    else:
        outputs = _templated_inputs(processor, raw, question, images_kwargs)
    return {
        key: value.to(host.dtype) if value.is_floating_point() else value
        for key, value in outputs.items()
        if isinstance(value, Tensor) and key not in ("labels", *processor.host.processor.unused_input_names)
    }


def _templated_inputs(
    processor: ElasticProcessor, raw: Any, question: str, images_kwargs: Mapping[str, Any] | None
) -> Any:
    host = processor.host
    assert host is not None
    prompt = processor.apply_chat_template(
        [{"role": "user", "content": [{"type": host.medium}, {"type": "text", "text": question}]}],
        add_generation_prompt=True,
    )
    if host.family.template is not None:  # its processor makes the prompt of the bare question
        prompt = host.media_token + question
    bos = host.tokenizer.bos_token
    options: dict[str, Any] = {"images_kwargs": dict(images_kwargs)} if images_kwargs else {}
    if bos is not None and str(prompt).startswith(bos):
        options["add_special_tokens"] = False
    media = {"images": [raw]} if host.medium == "image" else {"audio": [raw]}
    return host.processor(text=[str(prompt)], **media, return_tensors="pt", **options)


def oracle_inputs(
    model: ElasticForConditionalGeneration, host: Any, reduced: Mapping[str, Tensor], theirs: Mapping[str, Tensor]
) -> dict[str, Any]:
    """Return what lets the host itself read a reduced budget: its own forward pass, given pooled features.

    Args:
        reduced: inputs of the model at the budget.
        theirs: the host's own inputs at the full one.
    """
    text = {key: reduced[key] for key in ("input_ids", "attention_mask")}
    media = {key: value for key, value in reduced.items() if key not in (*text, "scale_ids", "prompt_positions")}
    embeds = model.model.embed(reduced["input_ids"], media)
    if "mm_encoder_outputs" not in inspect.signature(host.forward).parameters:
        return {"inputs_embeds": embeds, "attention_mask": text["attention_mask"]}
    is_soft = reduced["input_ids"] == (model.config.placeholder_ids or {})["image"]
    # 1 at images, but where it is at answers, which there are none of here.
    typed = is_soft.long() * (model.config.host_config.model_type != "paligemma")
    # Whatever the host's own classes call them, and whether they want them or not.
    types = {key: typed for key in ("token_type_ids", "mm_token_type_ids") if key in theirs}
    if "prompt_positions" in reduced:
        types["position_ids"] = reduced["prompt_positions"].permute(2, 0, 1)
    output = _pooled_output(host, theirs, embeds[is_soft])
    return {**text, **types, "mm_encoder_outputs": {"image": output}}


def _pooled_output(host: Any, theirs: Mapping[str, Tensor], soft: Tensor) -> Any:
    """Put pooled features in the place of a host's own, in what its own method gives.

    Args:
        soft: (n, C) soft tokens of an image, with what else its decoder reads of them behind them.
    """
    method = host.model.get_image_features
    known = inspect.signature(method).parameters
    inputs = {key: value for key, value in theirs.items() if key in known}
    output = method(**inputs, **method_settings(host.model), return_dict=True)
    size = host.config.get_text_config().hidden_size
    main, others = soft[:, :size], soft[:, size:]
    output.pooler_output = main[None] if isinstance(output.pooler_output, Tensor) else [main]
    if getattr(output, "deepstack_features", None) is not None:
        output.deepstack_features = [[level] for level in others.split(size, dim=-1)]
    return output


def _check_equal(ours: Tensor, theirs: Tensor, where: str) -> None:
    if ours.shape != theirs.shape or not torch.equal(ours, theirs):
        same = ours.shape == theirs.shape
        by = f"by up to {float((ours - theirs).abs().max()):.3g}" if same else f"in shape, {tuple(theirs.shape)}"
        raise ValueError(f"the logits of {where} differ from the host's own {by}; it cannot be adopted")


def _sized(part: nn.Module) -> tuple[str, int]:
    return type(part).__name__, _size(part)


def _size(part: nn.Module) -> int:
    return sum(parameter.numel() for parameter in part.parameters())
