"""Builds a model and its processor from a config: frozen parts from their sources, compressors and adapter fresh.

Knows configs and where weights come from. Does not know training, budgets of a step, or files of samples.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedConfig

from mllm.adapters import build_adapter
from mllm.checkpoints import pretrained
from mllm.checkpoints.pretrained import load_encoder, load_host, load_llm, unsharded
from mllm.checkpoints.resolve import resolve
from mllm.checkpoints.sources import digest_of, folder_of, resolve_source
from mllm.checkpoints.vocabulary import extended_tokenizer, find_new_tokens, start_new_tokens
from mllm.compressors import Query
from mllm.compressors.query_init import initialise_as_pyramid
from mllm.config.medium import ImageQueryConfig
from mllm.config.model import ModelConfig
from mllm.config.processor import ProcessorConfig
from mllm.encoders import AVHubertAudioConfig, wrap_encoder
from mllm.hosts import placeholder_id, read_host_processor
from mllm.media import DEFAULT_LIMITS, MediaLimits
from mllm.model.configuration import CONFIG_KEYS, TOWER_NAMES, ElasticConfig
from mllm.model.modeling import ElasticForConditionalGeneration
from mllm.model.precision import keep_in_float32, read_dtype
from mllm.model.trainables import is_sharded, part_of
from mllm.processing.processor import PLACEHOLDER_TOKENS, ElasticProcessor
from mllm.transforms.image_processors import read_image_processor
from mllm.utils.sealing import is_checking

FRAMES_PROMPT = "describe the video."
"""What is asked about videos of frames; the default question about videos is for lips."""


def build(
    config: ModelConfig, *, limits: MediaLimits = DEFAULT_LIMITS
) -> tuple[ElasticForConditionalGeneration, ElasticProcessor]:
    """Build a model ready to train, and its processor.

    Args:
        config: of the model; it need not be resolved.
        limits: what files the processor reads may be.

    Raises:
        ValueError: keys that contradict each other or the parts they name.
        OSError: a source that is neither a folder nor to be had from the hub.
    """
    tokenizer, elastic = build_config(config)
    processor = processor_of(config, tokenizer, elastic, limits=limits)
    model = assemble(elastic, dtype=config.dtype, attention=config.attention, seed=config.seed)
    image = config.image
    if image is not None and isinstance(image.compressor, ImageQueryConfig) and image.compressor.start == "pyramid":
        _start_as_pyramid(model.model.compressors["image"], seed=config.seed)
    start_new_tokens(model, tokenizer)
    return model, processor


def _start_as_pyramid(compressor: nn.Module, *, seed: int) -> None:
    assert isinstance(compressor, Query)
    if is_sharded(compressor):
        raise ValueError(
            "model.image.compressor.start pyramid cannot be found under ZeRO-3, which keeps no query whole; use ZeRO-2"
        )
    initialise_as_pyramid(compressor, torch.Generator().manual_seed(seed))


@dataclass(frozen=True)
class PartConfigs:
    """Holds the configs of the LLM and, by medium, of the encoders; of a host, its own stands for each of its media."""

    text: PreTrainedConfig
    encoders: dict[str, PreTrainedConfig]
    host: PreTrainedConfig | None = None


def part_configs(config: ModelConfig) -> PartConfigs:
    """Read the configs of the LLM and, by medium, of the encoders from their sources, or of the host."""
    if config.host is not None:
        host = pretrained.host_config(config.host)
        return PartConfigs(host.get_text_config(), dict.fromkeys(config.encoded_media, host), host)
    assert config.llm is not None
    encoders = {m: pretrained.encoder_config(block.encoder.source, m) for m, block in config.encoded_media.items()}
    return PartConfigs(pretrained.llm_config(config.llm), encoders)


def resolved(config: ModelConfig) -> ModelConfig:
    """Return a config whose every value is a value, as its parts on disk have it.

    Raises:
        ValueError: a key that a part has no use for. OSError: a part that is not to be had.
    """
    parts = part_configs(config)
    return resolve(config, text_config=parts.text, encoder_configs=parts.encoders)


def build_config(config: ModelConfig) -> tuple[Any, ElasticConfig]:
    """Build the tokenizer and the config of a model, with the digests of its sources.

    Raises:
        ValueError: a key that a part has no use for. OSError: a part that is not to be had.
    """
    parts = part_configs(config)
    sources = {
        part: {"reference": reference, "sha256": digest_of(resolve_source(reference)), **folder_of(reference)}
        for part, reference in config.sources.items()
    }
    if parts.host is not None:
        assert config.host is not None
        tokenizer = pretrained.read_host_tokenizer(config.host, parts.host)
        return tokenizer, config_of_host(config, parts.host, sources=sources)
    tokenizer = extended_tokenizer(config, num_rows=parts.text.vocab_size)
    elastic = config_of_parts(
        config,
        text_config=parts.text,
        encoder_configs=parts.encoders,
        placeholder_ids={m: tokenizer.convert_tokens_to_ids(PLACEHOLDER_TOKENS[m]) for m in parts.encoders},
        new_tokens=find_new_tokens(config, tokenizer, num_rows=parts.text.vocab_size),
        sources=sources,
    )
    return tokenizer, elastic


def config_of_host(
    config: ModelConfig, host: PreTrainedConfig, *, sources: dict[str, dict[str, str]] | None = None
) -> ElasticConfig:
    """Build the config of a model on a host whose config is at hand, whatever it was read from.

    Raises:
        ValueError: a medium that the host does not read, or a largest budget that is not its own.
    """
    encoders = dict.fromkeys(config.encoded_media, host)
    full = resolve(config, text_config=host.get_text_config(), encoder_configs=encoders)
    return ElasticConfig(
        host_config=host,
        media=full.media,
        placeholder_ids={medium: placeholder_id(host, medium) for medium in encoders},
        adapter=full.adapter,
        quantization=config.quantization,
        sources=sources or {},
    )


def config_of_parts(
    config: ModelConfig,
    *,
    text_config: PreTrainedConfig,
    encoder_configs: Mapping[str, PreTrainedConfig],
    placeholder_ids: dict[str, int],
    new_tokens: dict[str, int] | None = None,
    sources: dict[str, dict[str, str]] | None = None,
) -> ElasticConfig:
    """Build the config of a model of parts whose configs are at hand, whatever they were read from."""
    parts: dict[str, Any] = {CONFIG_KEYS[medium]: encoder for medium, encoder in encoder_configs.items()}
    full = resolve(config, text_config=text_config, encoder_configs=encoder_configs)
    return ElasticConfig(
        text_config=text_config,
        **parts,
        media=full.media,
        placeholder_ids=placeholder_ids,
        new_tokens=new_tokens or {},
        adapter=full.adapter,
        quantization=config.quantization,
        sources=sources or {},
    )


def build_processor(config: ModelConfig, *, limits: MediaLimits = DEFAULT_LIMITS) -> ElasticProcessor:
    """Build the processor of a model, without the model.

    Args:
        limits: what files it reads may be.
    """
    return processor_of(config, *build_config(config), limits=limits)


def processor_of(
    config: ModelConfig, tokenizer: Any, elastic: ElasticConfig, *, limits: MediaLimits = DEFAULT_LIMITS
) -> ElasticProcessor:
    """Make the processor of a model whose config is at hand.

    Args:
        config: of the model, whose encoders' sources hold what files are preprocessed by.
        tokenizer, elastic: of `build_config`.
        limits: what files it reads may be.
    """
    if config.host is not None:
        source = resolve_source(config.host)
        settings = ProcessorConfig(host=read_host_processor(source, elastic.host_config))
        processor = ElasticProcessor(tokenizer, elastic, settings)
        processor.limits = limits
        return processor
    settings = ProcessorConfig(
        chat_format=config.chat_format,
        preprocessors={
            medium: preprocessor_of(block.encoder.source, medium, elastic.encoder_configs[medium])
            for medium, block in config.encoded_media.items()
        },
        prompts={"video": FRAMES_PROMPT} if config.shows_frames else {},
        shares_lengths=config.released_behaviour,
        names_images=config.names_images,
    )
    processor = ElasticProcessor(tokenizer, elastic, settings)
    processor.limits = limits
    return processor


def preprocessor_of(source: str, medium: str, encoder: PreTrainedConfig) -> dict[str, Any]:
    """Read the image processor or feature extractor that came with an encoder, as plain values; empty without one."""
    if medium == "image":
        return read_image_processor(resolve_source(source)).to_dict()
    if medium == "audio" and encoder.model_type != AVHubertAudioConfig.model_type:
        return pretrained.read_feature_extractor(source).to_dict()
    return {}


def assemble(
    config: ElasticConfig, *, dtype: str | torch.dtype = "float32", attention: str = "sdpa", seed: int = 0
) -> ElasticForConditionalGeneration:
    """Make a model with the frozen parts its config names; compressors and adapter have their initial values.

    Args:
        dtype: of the frozen parts; see `mllm.model.precision`.
        seed: of the initial values; the same on every process.

    Raises:
        ValueError: a source whose weights are not those the model was trained on, or are not whole, or a quantisation
            that cannot be had here.
    """
    sources = config.sources or {}
    text_dtype = read_dtype(dtype)
    with torch.device("meta"), unsharded():
        model = ElasticForConditionalGeneration(config)
    if config.host_config is not None:
        put_host(
            model,
            load_host(
                _verified("host", sources),
                config.host_config,
                dtype=text_dtype,
                attention=attention,
                quantization=config.quantization,
            ),
        )
    else:
        llm: Any = load_llm(
            _verified("llm", sources),
            config.text_config,
            dtype=text_dtype,
            attention=attention,
            quantization=config.quantization,
        )
        model.model.language_model = getattr(llm, llm.base_model_prefix)
        model.set_output_embeddings(cast(nn.Module, llm.get_output_embeddings()))
        model.generation_config = llm.generation_config
        for medium, encoder in config.encoder_configs.items():
            backbone = load_encoder(_verified(medium, sources), encoder, dtype=text_dtype)
            setattr(model.model, TOWER_NAMES[medium], wrap_encoder(backbone, config.encoded_media[medium].encoder))
    materialize(model, model.model.compressors, seed=seed)
    for part in (model.model.newline, model.model.new_tokens):
        if part is not None:
            materialize(model, part, seed=seed)
    put_adapters(model, seed=seed)
    return model.eval()


def put_host(model: ElasticForConditionalGeneration, host: Any) -> None:
    """Take the encoder, projector, decoder, head and ends of answers of a host into a model, in place."""
    model.model.set_host(host.model)
    model.set_output_embeddings(cast(nn.Module, host.get_output_embeddings()))
    model.generation_config = host.generation_config


def put_adapters(model: ElasticForConditionalGeneration, *, seed: int = 0) -> None:
    """Put the adapters that a model's config names into its encoders and its LLM, in place; they are in float32."""
    for medium, block in model.config.encoded_media.items():
        if block.encoder is not None and block.encoder.adapter is not None:
            build_adapter(model.model.encoder(medium).backbone, block.encoder.adapter, seed=seed)
    if model.config.adapter is not None:
        build_adapter(model.model.language_model, model.config.adapter, seed=seed)
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
    if is_checking() and source["sha256"] and source["sha256"] != (digest := digest_of(folder)):
        raise ValueError(
            f"the weights of {part} in {source['reference']} are not those this model was trained on "
            f"(SHA-256 {digest[:12] or 'of nothing'}..., expected {source['sha256'][:12]}...)"
        )
    return folder
