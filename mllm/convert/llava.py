"""Converts a released LLaVA-1.5, MQT-LLaVA or LLaVA-1.5-M3 to a run folder: the connector, and the frozen parts beside
it.

    released weights ── split_state ── LLM, vision encoder ───── DIR/llm, DIR/image   (`run:llm`, `run:image`)
                                    └─ queries or projector ──── DIR/trainables.safetensors

A part that is not in the checkpoint (the LLM of a first stage, an encoder that is loaded from elsewhere) is named by
its source, as after a training of ours. Knows options and the parts of a checkpoint. Everything is checked before
anything is written. Does not know how the entries are named; that is `llava_layout.py`.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedConfig

from mllm.checkpoints.build import build_config, processor_of
from mllm.checkpoints.load import save_run
from mllm.checkpoints.pretrained import encoder_config, llm_config, read_tokenizer, unsharded
from mllm.checkpoints.sources import inside_run, resolve_source
from mllm.config.medium import (
    ImageConfig,
    ImageEncoderConfig,
    ImagePoolConfig,
    ImageQueryConfig,
    LinearConfig,
    MlpConfig,
    with_source,
)
from mllm.config.model import ModelConfig
from mllm.convert.llava_layout import EMBEDDINGS, Split, read_projector, read_queries, split_state
from mllm.convert.llava_options import LLM, SCALES_KEY, SYSTEMS, Options, ReleasedConfig, System
from mllm.convert.state_files import WHOLE_MODELS, StoredWeight, check_layout, find_weights, read_json, write_stored
from mllm.encoders import backbone_class, encoder_facts
from mllm.model.modeling import ElasticForConditionalGeneration
from mllm.model.trainables import set_trainables
from mllm.transforms.image_processors import read_image_processor
from mllm.utils.files import new_folder

FIRST_STAGES = ("query_abstractor.bin", "mm_projector.bin")
_TOKENIZERS = ("tokenizer.json", "tokenizer.model")


@dataclass(frozen=True)
class Parts:
    """Holds everything a run folder is made of.

    Args:
        weights: of the frozen parts that are in the checkpoint, by part and by the names transformers gives them; they
            stay in its files until they are written.
        configs: of both parts. sources: where each comes from if it is not in the checkpoint.
        tokenizer: the LLM's.
        image: how images become soft tokens.
        trained: what a checkpoint of ours holds, by its names.
        facts: what was found, in words.
    """

    weights: dict[str, dict[str, StoredWeight]]
    configs: dict[str, PreTrainedConfig]
    sources: dict[str, str]
    tokenizer: Any
    image: ImageConfig
    trained: dict[str, Tensor]
    facts: list[str]


def convert(path: str | Path, out: str | Path, *, system: str, options: Options) -> list[str]:
    """Convert a released file or folder; `mllm.load(out)` loads what is written.

    Args:
        system: one of `SYSTEMS`.

    Returns:
        What was found, in words.

    Raises:
        FileNotFoundError: no such file or folder.
        ValueError: weights that are none of such a checkpoint, options that contradict them, or a folder in use.
    """
    path = Path(path)
    with new_folder(out) as folder:
        split = split_state(find_weights(path, (*WHOLE_MODELS, *FIRST_STAGES)))
        parts = read_parts(split, path if path.is_dir() else None, SYSTEMS[system], options)
        write_parts(parts, folder)
        write_run(parts, folder)
    return parts.facts


def read_parts(split: Split, folder: Path | None, system: System, options: Options) -> Parts:
    """Read and check everything in a checkpoint.

    Args:
        folder: the checkpoint lies in, with what else is in it.

    Raises:
        ValueError: entries that are missing, unknown or misshapen, or options that contradict them.
    """
    released = ReleasedConfig({})
    if folder is not None and (folder / "config.json").is_file():
        released = ReleasedConfig(read_json(folder / "config.json"), str(folder / "config.json"))
    _check_system(split, released, system, options)
    sources = {"llm": options.llm or LLM, "image": options.vision or released.vision}
    text, tokenizer = _llm(split, folder, released, options)
    vision = encoder_config(sources["image"], "image")
    if vision.model_type != "clip_vision_model":
        raise ValueError(f"{sources['image']} is a {vision.model_type}; only checkpoints with CLIP can be converted")
    released.check_size(vision.hidden_size)
    weights = {"llm": _llm_weights(split.llm, text)} if split.llm else {}
    if split.vision:
        weights["image"] = _vision_weights(split.vision, vision)
    encoder = ImageEncoderConfig(
        source="",  # where it lies is filled in when that is written
        feature_layer=released.feature_layer if options.feature_layer is None else options.feature_layer,
        pad_to_square=(options.image_aspect_ratio or released.image_aspect_ratio) == "pad",
    )
    compressor, projector, trained = _connector(split, released, text, vision)
    if isinstance(compressor, ImageQueryConfig):
        compressor = replace(compressor, num_heads=_heads(vision, options))
    image = ImageConfig(
        encoder=encoder,
        compressor=compressor,
        projector=projector,
        budgets=list(_budgets(split, released, vision, system, options)),
    )
    parts = Parts(
        weights,
        {"llm": text, "image": vision},
        sources,
        tokenizer,
        image,
        trained,
        facts=[],
    )
    return replace(parts, facts=_facts(parts, vision))


def _check_system(split: Split, released: ReleasedConfig, system: System, options: Options) -> None:
    """Refuse a checkpoint of another of the three systems.

    Raises:
        ValueError: what it is instead, and the option that contradicts it.
    """
    if split.connector != system.connector:
        kind = "queries (MQT-LLaVA)" if split.queries else "a projector (LLaVA-1.5, LLaVA-1.5-M3)"
        raise ValueError(f"the checkpoint holds {kind}; it is no {system.title} (see `mllm convert`)")
    if released.scales and not system.scales:
        raise ValueError(f"{SCALES_KEY} is {list(released.scales)} in {released.source}; it is no {system.title}")
    if system.scales and released.values and not released.scales and not options.budgets:
        raise ValueError(
            f"{released.source} has no {SCALES_KEY}, so it is a LLaVA-1.5 that was not trained at several counts "
            "(`mllm convert llava`); give budgets if it was"
        )
    if options.query_heads is not None and split.connector != "query":
        raise ValueError(f"query_heads goes with MQT-LLaVA; {system.title} has no queries")


def _llm(split: Split, folder: Path | None, released: ReleasedConfig, options: Options) -> tuple[Any, Any]:
    """Read config and tokenizer of the LLM: from the option, from the folder where there is none, or the published
    ones."""
    source = options.llm or LLM
    beside = folder if options.llm is None and split.llm else None
    is_in_folder = beside is not None and bool(released.values)
    text = _text_config(released) if is_in_folder else llm_config(source)
    if beside is not None and any((beside / name).is_file() for name in _TOKENIZERS):
        source = str(beside)
    tokenizer = read_tokenizer(source, config=text)
    rows = split.llm[EMBEDDINGS].shape[0] if EMBEDDINGS in split.llm else text.vocab_size
    if len(tokenizer) > rows:
        raise ValueError(
            f"the tokenizer of {source} holds {len(tokenizer)} tokens, but the LLM embeds {rows}; "
            "was it trained on another LLM? (option llm)"
        )
    return text, tokenizer


def _text_config(released: ReleasedConfig) -> LlamaConfig:
    """Read the Llama in a LLaVA's config.json, whose own model type transformers does not know."""
    known = {*LlamaConfig().to_dict(), "rope_theta", "rope_scaling"} - {"model_type", "architectures", "dtype"}
    values = {key: value for key, value in released.values.items() if key in known}
    return LlamaConfig(**values)


def _llm_weights(state: dict[str, StoredWeight], config: PreTrainedConfig) -> dict[str, StoredWeight]:
    with torch.device("meta"):
        expected = AutoModelForCausalLM.from_config(config, trust_remote_code=False).state_dict()
    check_layout(state, {name: tuple(value.shape) for name, value in expected.items()})
    return state


def _vision_weights(state: dict[str, StoredWeight], config: PreTrainedConfig) -> dict[str, StoredWeight]:
    with torch.device("meta"):
        expected = backbone_class(config)._from_config(config).state_dict()
    try:
        check_layout(state, {name: tuple(value.shape) for name, value in expected.items()})
    except ValueError as error:
        raise ValueError(f"vision_tower (option vision): {error}") from error
    return state


def _connector(
    split: Split, released: ReleasedConfig, text: Any, vision: Any
) -> tuple[ImagePoolConfig | ImageQueryConfig, MlpConfig | LinearConfig | None, dict[str, Tensor]]:
    """Tell compressor and projector as far as shapes do, and our entries for them."""
    if split.queries:
        queries = read_queries(split.queries, feature_size=vision.hidden_size)
        check_layout(split.queries, queries.layout(text.hidden_size))
        return ImageQueryConfig(num_queries=queries.num_queries), None, queries.entries(split.queries)
    projector = read_projector(split.projector)
    check_layout(split.projector, projector.layout(vision.hidden_size, text.hidden_size))
    kind = released.values.get("mm_projector_type", projector.kind)
    if kind != projector.kind:
        raise ValueError(
            f"mm_projector_type is {kind} in {released.source}, but the checkpoint holds a {projector.kind}"
        )
    one: MlpConfig | LinearConfig = LinearConfig(before_pooling=True)
    if projector.hidden_size:
        one = MlpConfig(hidden_size=projector.hidden_size, before_pooling=True)
    return ImagePoolConfig(), one, projector.entries(split.projector)


def _budgets(split: Split, released: ReleasedConfig, vision: Any, system: System, options: Options) -> list[int]:
    """Read the trained counts, fewest first.

    Raises:
        ValueError: counts that this checkpoint cannot give.
    """
    grid = encoder_facts(vision).grid
    assert grid is not None
    most = grid[0] * grid[1]
    if split.queries:
        most = next(len(value) for name, value in split.queries.items() if name.endswith(".query"))
        every = range(2, most + 1, 2) if split.llm else [most]
        chosen = options.budgets or list(every) or [most]
    else:
        chosen = options.budgets or list(released.scales or system.scales) or [most]
    if min(chosen) < 1 or max(chosen) > most or len(set(chosen)) < len(chosen):
        raise ValueError(f"budgets is {list(chosen)}; this checkpoint gives counts 1..{most}, each named once")
    return sorted(chosen)


def _heads(vision: Any, options: Options) -> int:
    heads = options.query_heads or vision.num_attention_heads
    if heads < 1 or vision.hidden_size % heads:
        raise ValueError(f"query_heads is {heads}, which does not divide the {vision.hidden_size} of the queries")
    return heads


def write_parts(parts: Parts, folder: Path) -> None:
    """Write the parts of the checkpoint as folders that transformers reads."""
    for part, weights in parts.weights.items():
        part_folder = folder / part
        part_folder.mkdir(parents=True)
        parts.configs[part].save_pretrained(part_folder)
        write_stored(weights, part_folder)
    if "llm" in parts.weights:
        parts.tokenizer.save_pretrained(folder / "llm")
    if "image" in parts.weights:
        source = resolve_source(parts.sources["image"])
        read_image_processor(source).save_pretrained(folder / "image")


def write_run(parts: Parts, folder: Path) -> None:
    """Write config, processor and the connector; the parts of the checkpoint must lie in the folder already."""
    places = {part: str(folder / part) if part in parts.weights else source for part, source in parts.sources.items()}
    model_config = ModelConfig(
        llm=places["llm"], chat_format="vicuna_v1", image=with_source(parts.image, places["image"])
    )
    tokenizer, config = build_config(model_config)
    processor = processor_of(model_config, tokenizer, config)
    for part in parts.weights:
        config.sources = {**(config.sources or {}), part: inside_run(part, (config.sources or {})[part])}
    with torch.device("meta"), unsharded():
        model = ElasticForConditionalGeneration(config)
    names = set_trainables(model)
    check_layout(parts.trained, {name: tuple(model.get_parameter(name).shape) for name in names})
    save_run(model, processor, folder, state={name: value.contiguous() for name, value in parts.trained.items()})


def _facts(parts: Parts, vision: Any) -> list[str]:
    image, budgets = parts.image, sorted(parts.image.values)
    shown = ", ".join(map(str, budgets)) if len(budgets) < 9 else f"{budgets[0]}, {budgets[1]}, ... {budgets[-1]}"
    if isinstance(image.compressor, ImageQueryConfig):
        how = f"{image.num_queries} queries of {vision.hidden_size} with {image.compressor.num_heads} heads"
    elif isinstance(image.projector, MlpConfig):
        how = f"averaged behind the projector, {image.projector.hidden_size} inside"
    else:
        how = "averaged"
    only = " only, other counts are untrained" if len(budgets) == 1 else ""
    margins = "padded to a square" if image.encoder is not None and image.encoder.pad_to_square else "cut to a square"
    origins = {part: "in the checkpoint" if part in parts.weights else source for part, source in parts.sources.items()}
    return [
        f"images: {how}; trained at {shown} tokens{only}; {margins}",
        f"LLM: {origins['llm']}; vision encoder: {origins['image']}",
    ]
