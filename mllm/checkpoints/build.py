"""From settings to a model and its processor: frozen parts from their sources, compressors and adapter fresh.

Knows settings, configs and where weights come from. Does not know training, budgets of a step, or files of samples.
"""

from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedConfig

from mllm.adapters import build_adapter
from mllm.adapters.expert_ids import kinds_of, scales_of, tasks_of
from mllm.budget import MediumSpace, Space
from mllm.checkpoints import pretrained
from mllm.checkpoints.pretrained import load_encoder, load_llm, unsharded
from mllm.checkpoints.sources import digest_of, place_of, resolve_source
from mllm.checkpoints.vocabulary import extended_tokenizer, find_new_tokens, start_new_tokens
from mllm.compressors import Query
from mllm.compressors.query_init import initialise_as_pyramid
from mllm.config.model import FRAME_SETTINGS, MediumConfig, ModelConfig
from mllm.encoders import AVHubertAudioConfig, encoder_facts, wrap_encoder
from mllm.media import DEFAULT_LIMITS, MediaLimits
from mllm.model.configuration import CONFIG_KEYS, TOWER_NAMES, ElasticConfig
from mllm.model.modeling import ElasticForConditionalGeneration
from mllm.model.precision import keep_in_float32, read_dtype
from mllm.model.trainables import is_sharded, part_of
from mllm.processing.processor import ElasticProcessor
from mllm.transforms.image_processors import read_image_processor

# Settings of a medium that do not shape the model: where its encoder is, how files become its input, its markers.
_NOT_MODEL = (
    *("encoder", "span", "normalize_audio", "pad_to_square", "size_pixels", "crop_pixels", "budget_range"),
    *("query_start", *FRAME_SETTINGS),
)
PADDED = {"image_processor_type": "LlavaImageProcessorPil", "do_pad": True}
"""What makes an image processor put margins in its mean colour around an image, computed as LLaVA's code does."""
DEFAULT_FRAMES = 8
"""Frames taken from a video whose frames are encoded like images."""


def build(
    settings: ModelConfig, *, limits: MediaLimits = DEFAULT_LIMITS
) -> tuple[ElasticForConditionalGeneration, ElasticProcessor]:
    """A model ready to train, and its processor.

    Args:
        limits: what files the processor reads may be.

    Raises:
        ValueError: settings that contradict each other or the parts they name.
        OSError: a source that is neither a folder nor to be had from the hub.
    """
    processor = build_processor(settings, limits=limits)
    config = elastic_config(settings, processor)
    model = assemble(config, dtype=settings.dtype, attention=settings.attention, seed=settings.seed)
    for medium, own in settings.media.items():
        if own.query_start == "pyramid":
            _read_places(model.model.compressors[medium], seed=settings.seed)
    start_new_tokens(model, processor.tokenizer)
    return model, processor


def _read_places(compressor: nn.Module, *, seed: int) -> None:
    if not isinstance(compressor, Query):
        raise ValueError("query_start=pyramid needs compressor: query; leave it out")
    if is_sharded(compressor):
        raise ValueError("query_start=pyramid cannot be found under ZeRO-3, which keeps no query whole; use ZeRO-2")
    initialise_as_pyramid(compressor, torch.Generator().manual_seed(seed))


def build_processor(settings: ModelConfig, *, limits: MediaLimits = DEFAULT_LIMITS) -> ElasticProcessor:
    """The processor of a model that is described by settings.

    Args:
        limits: what files it reads may be.
    """
    text_config = pretrained.llm_config(settings.llm)
    tokenizer = extended_tokenizer(settings, num_rows=text_config.vocab_size)
    media = {
        medium: {
            "encoder": encoder_config(own, medium).to_dict(),
            "preprocessor": _preprocessor(medium, own),
            "space": space_settings(own),
            "span": list(own.span),
        }
        for medium, own in settings.encoded_media.items()
    }
    _check_one_size(settings)
    if settings.shows_frames:
        media["video"] = frames_entry(settings, media["image"])
    elastic = {"chat_format": settings.chat_format, "media": media, "experts": expert_names(settings)}
    if settings.released_behaviour:
        elastic["shares_lengths"] = True
    if settings.names_images:
        elastic["names_images"] = True
    if settings.shows_frames:
        elastic["prompts"] = {"video": "describe the video."}  # the default question about videos is for lips
    limit = getattr(text_config, "max_position_embeddings", None)
    if isinstance(limit, int):
        elastic["context_tokens"] = limit
    processor = ElasticProcessor(tokenizer, elastic=elastic)
    processor.limits = limits
    return processor


def _check_one_size(settings: ModelConfig) -> None:
    """Raises: ValueError for tiles or frames with an encoder whose images keep their shape."""
    image = settings.image
    if image is None or not (settings.shows_frames or image.tiling is not None):
        return
    if encoder_facts(encoder_config(image, "image"), space_settings(image)).max_patches is not None:
        what = "image.tiling" if image.tiling is not None else "video.encoder image"
        raise ValueError(f"{what} needs an encoder that reads images of one size, and this one keeps their shape")


def elastic_config(settings: ModelConfig, processor: ElasticProcessor) -> ElasticConfig:
    """The config of a model that is described by settings, with the digests of its sources."""
    text_config = pretrained.llm_config(settings.llm)
    encoders = {medium: encoder_config(own, medium) for medium, own in settings.encoded_media.items()}
    return config_of_parts(
        settings,
        text_config=text_config,
        encoder_configs=encoders,
        placeholder_ids={m: processor.placeholder_ids[m] for m in encoders},
        span_ids=processor.span_ids,
        new_tokens=find_new_tokens(settings, processor.tokenizer, num_rows=text_config.vocab_size),
        sources={
            part: {"reference": reference, "sha256": digest_of(resolve_source(reference)), **place_of(reference)}
            for part, reference in settings.sources.items()
        },
    )


def config_of_parts(
    settings: ModelConfig,
    *,
    text_config: PreTrainedConfig,
    encoder_configs: Mapping[str, PreTrainedConfig],
    placeholder_ids: dict[str, int],
    span_ids: dict[str, list[list[int]]] | None = None,
    new_tokens: dict[str, int] | None = None,
    sources: dict[str, dict[str, str]] | None = None,
) -> ElasticConfig:
    """The elastic config of parts whose configs are at hand, whatever they were read from."""
    parts: dict[str, Any] = {CONFIG_KEYS[medium]: config for medium, config in encoder_configs.items()}
    return ElasticConfig(
        text_config=text_config,
        **parts,
        media={medium: space_settings(own) for medium, own in settings.encoded_media.items()},
        placeholder_ids=placeholder_ids,
        span_ids=span_ids or {},
        new_tokens=new_tokens or {},
        adapter=adapter_settings(settings),
        sources=sources or {},
    )


def adapter_settings(settings: ModelConfig) -> dict[str, Any] | None:
    """What shapes the adapter, as the config keeps it: with the names of its experts where it has some.

    Raises:
        ValueError: scales or tasks for a variant without such experts, or scales that are not of the trained space.
    """
    if settings.adapter is None:
        return None
    values = settings.adapter.values
    if values["kind"] == "lora":
        return values
    spaces = {medium: space_settings(own) for medium, own in settings.encoded_media.items()}
    if settings.shows_frames:
        spaces["video"] = frames_space(settings)
    space = Space.from_settings(spaces)
    if values["kind"] == "mome":
        if values["disjoint_routers"]:
            values["scales"] = scales_of(values["scales"], space)
        return values
    kinds = kinds_of(values["variant"])
    for kind, names_of in (("scale", scales_of), ("task", tasks_of)):
        key = f"{kind}s"
        if kind not in kinds and values[key]:
            raise ValueError(f"adapter.{key} is {values[key]}, but variant {values['variant']} has experts of {kinds}")
        values[key] = names_of(values[key], space) if kind in kinds else []
    return values


def expert_names(settings: ModelConfig) -> dict[str, list[str]]:
    """The scales and the tasks that have a expert of the adapter, as the processor keeps them."""
    adapter = adapter_settings(settings) or {}
    return {key: adapter[key] for key in ("scales", "tasks") if adapter.get(key)}


def encoder_config(settings: MediumConfig, medium: str) -> PreTrainedConfig:
    """The config of a medium's encoder, read from its source."""
    return pretrained.encoder_config(settings.encoder, medium)


def space_settings(settings: MediumConfig) -> dict[str, Any]:
    """What shapes a medium's encoder, compressor and space, as the config keeps it; unset values are left out."""
    values = {key: value for key, value in asdict(settings).items() if key not in _NOT_MODEL and value is not None}
    if settings.projector_size == 0:
        values["projector_size"] = None
    if settings.budget_range:
        start, stop, step = settings.budget_range
        values["budgets"] = list(range(start, stop + 1, step))
    if settings.compressor == "query" and settings.num_queries is None:
        counts = [int(value) for value in values["budgets"] if not str(value).startswith("/")]
        rates = [int(str(value)[1:]) for value in values["budgets"] if str(value).startswith("/")]
        windows = [(settings.window_frames or 0) // rate for rate in rates]
        values["num_queries"] = max([*counts, *windows])
    return values


def frames_space(settings: ModelConfig) -> dict[str, Any]:
    """What shapes the space of videos whose frames are encoded like images: all but the budgets is the images' own.

    Raises:
        ValueError: a budget that the compressor of images does not serve.
    """
    assert settings.image is not None
    assert settings.video is not None
    own = space_settings(settings.video)
    shared = {key: value for key, value in space_settings(settings.image).items() if key != "tiling"}
    frames = settings.video.frames or DEFAULT_FRAMES
    space = {**shared, "budgets": own["budgets"], "frame_counts": settings.video.frame_counts or [frames]}
    served = MediumSpace.from_settings("image", shared)
    for amount in MediumSpace.from_settings("video", space).trained:
        if not served.between and not served.is_trained(amount):
            raise ValueError(f"video.budgets holds {amount}, and the compressor of images serves {served.allowed()}")
    return space


def frames_entry(settings: ModelConfig, image: Mapping[str, Any]) -> dict[str, Any]:
    """What the processor keeps of videos whose frames are encoded like images, given what it keeps of images."""
    own = settings.video
    assert own is not None
    return {
        "encoder": image["encoder"],
        "preprocessor": image["preprocessor"],
        "space": frames_space(settings),
        "span": list(own.span),
        "frames": {"count": own.frames or DEFAULT_FRAMES, "per_second": own.sample_fps},
    }


def assemble(
    config: ElasticConfig, *, dtype: str | torch.dtype = "float32", attention: str = "sdpa", seed: int = 0
) -> ElasticForConditionalGeneration:
    """A model with the frozen parts its config names; compressors and adapter have their initial values.

    Args:
        dtype: of the frozen parts; see `mllm.model.precision`.
        seed: of the initial values; the same on every process.

    Raises:
        ValueError: a source whose weights are not those the model was trained on, or are not whole.
    """
    sources = config.sources or {}
    text_dtype = read_dtype(dtype)
    with torch.device("meta"), unsharded():
        model = ElasticForConditionalGeneration(config)
    llm: Any = load_llm(_verified("llm", sources), config.text_config, dtype=text_dtype, attention=attention)
    model.model.language_model = getattr(llm, llm.base_model_prefix)
    model.set_output_embeddings(cast(nn.Module, llm.get_output_embeddings()))
    model.generation_config = llm.generation_config
    for medium, own in config.encoder_configs.items():
        backbone = load_encoder(_verified(medium, sources), own, dtype=text_dtype)
        setattr(model.model, TOWER_NAMES[medium], wrap_encoder(backbone, (config.media or {})[medium]))
    materialize(model, model.model.compressors, seed=seed)
    for part in (model.model.newline, model.model.new_tokens):
        if part is not None:
            materialize(model, part, seed=seed)
    put_adapters(model, seed=seed)
    return model.eval()


def put_adapters(model: ElasticForConditionalGeneration, *, seed: int = 0) -> None:
    """Put the adapters that a model's config names into its encoders and its LLM, in place; they are in float32."""
    for medium, own in (model.config.media or {}).items():
        if own.get("encoder_adapter"):
            build_adapter(model.model.encoder(medium).backbone, {**own["encoder_adapter"], "seed": seed})
    if model.config.adapter is not None:
        build_adapter(model.model.language_model, {**model.config.adapter, "seed": seed})
    keep_in_float32(parameter for name, parameter in model.named_parameters() if part_of(name) == "adapter")


def materialize(model: ElasticForConditionalGeneration, part: nn.Module, *, seed: int) -> None:
    """Give a part that was built on the meta device its storage and its initial values, a function of the seed."""
    part.to_empty(device="cpu")
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        part.apply(model._init_weights)


def _verified(part: str, sources: Mapping[str, Mapping[str, str]]) -> str:
    source = sources[part]
    folder = resolve_source(source["reference"])
    if source["sha256"] and source["sha256"] != (found := digest_of(folder)):
        raise ValueError(
            f"the weights of {part} in {source['reference']} are not those this model was trained on "
            f"(SHA-256 {found[:12] or 'of nothing'}..., expected {source['sha256'][:12]}...)"
        )
    return folder


def _preprocessor(medium: str, settings: MediumConfig) -> dict[str, Any]:
    """Returns the plain values that `build_transform` makes the encoder's input of a decoded file with."""
    if medium == "audio" and encoder_config(settings, medium).model_type == AVHubertAudioConfig.model_type:
        if settings.normalize_audio:
            raise ValueError(
                "audio.normalize_audio does not go with AV-HuBERT, whose features are normalised; leave it out"
            )
        return {}
    readers: dict[str, Callable[[], dict[str, Any]]] = {
        "image": lambda: _image_preprocessor(settings),
        "audio": lambda: {
            **pretrained.read_feature_extractor(settings.encoder).to_dict(),
            "normalize_audio": settings.normalize_audio,
        },
        "video": lambda: {"size_pixels": settings.size_pixels, "crop_pixels": settings.crop_pixels},
    }
    return readers[medium]()


def _image_preprocessor(settings: MediumConfig) -> dict[str, Any]:
    """The image processor of a tower, told the size of its images and what to do about their shape."""
    values = read_image_processor(resolve_source(settings.encoder)).to_dict()
    config = encoder_config(settings, "image")
    if (most := encoder_facts(config, space_settings(settings)).max_patches) is not None:
        if settings.pad_to_square:
            raise ValueError("image.pad_to_square does not go with a tower that reads images in their own shape")
        return {**values, "max_num_patches": most, "patch_size": config.patch_size}
    if settings.image_size is not None:
        height, width = settings.image_size
        values |= {"do_resize": True, "size": {"height": height, "width": width}, "do_center_crop": False}
    return {"do_center_crop": False} | values | PADDED if settings.pad_to_square else values
