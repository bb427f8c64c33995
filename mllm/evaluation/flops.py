"""Computes what a request costs at a budget, from the config alone: FLOPs by part and bytes of key-value cache.

Knows config fields and counts. Does not know weights, files or time.

A multiply-add is two FLOPs. Counted are matrix products, convolutions and attention; norms, activations, softmax and
rotations are not. Attention over text counts the pairs a causal mask lets through, n p + n (n + 1) / 2 for n tokens
after p, though a kernel that ignores the mask computes n (n + p). Sliding windows are not modelled: they count as full
attention. Encoders count one clip or image at its true length, without the padding of a batch.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig

from mllm.adapters.expert_ids import num_experts
from mllm.budget import Extent, TokenCount
from mllm.budget.nesting import num_queries
from mllm.compressors import count_heads
from mllm.config.medium import (
    HybridConfig,
    LinearConfig,
    MediumConfig,
    MoeConfig,
    NoProjectorConfig,
    QueryConfig,
    StackConfig,
    WordsConfig,
)
from mllm.config.medium import Projector as ProjectorConfig
from mllm.config.model import AdapterConfig, GatedLoraConfig, LoraBankConfig, LoraConfig, MomeConfig
from mllm.encoders import ENCODERS, EncoderBlock, default_block
from mllm.hosts import HOSTS, build_host, host_facts, reading_parts
from mllm.processing.batch import EncodedSample

BYTES_PER_VALUE = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class Item:
    """One encoded medium of a request.

    `num_features` are the encoder's patches or frames, `num_tokens` the soft tokens made of them (0 for a frame that is
    not shown, which the compressor never sees), `height_pixels` and `width_pixels` the size of a video's frames (images
    have the size their config says).
    """

    medium: str
    num_features: int
    num_tokens: int
    height_pixels: int = 0
    width_pixels: int = 0


def items_of(extent: Extent, count: TokenCount, *, frame_pixels: Sequence[int] = (0, 0)) -> list[Item]:
    """Lists the encoded items of one medium: an image's thumbnail and tiles, a video's frames, or the medium itself.

    Every frame that was taken from a video is encoded, and only those that are shown are compressed. A medium that is
    left out is not encoded.

    Args:
        frame_pixels: height and width of the frames of a video that is read as a stream.
    """
    if not count.tokens:
        return []
    if extent.grid is None:
        size = (int(frame_pixels[0]), int(frame_pixels[1])) if extent.medium == "video" else (0, 0)
        return [Item(extent.medium, extent.length, count.tokens, *size)]
    features = extent.length
    if count.resolution is not None and count.resolution.grid is not None:
        features = count.resolution.tokens
    shown = [Item("image", features, count.each or count.tokens)] * count.num_images
    hidden = extent.num_images - count.frames if count.frames else 0
    return shown + [Item("image", extent.length, 0)] * hidden


@dataclass(frozen=True)
class RequestCost:
    """FLOPs of one request by part, and the key-value cache it leaves, in bytes."""

    encoder: int
    compressor: int
    prefill: int
    decode: int
    kv_bytes: int

    @property
    def total(self) -> int:
        """Sums all FLOPs."""
        return self.encoder + self.compressor + self.prefill + self.decode


def request_cost(
    config: Any,
    items: Sequence[Item],
    *,
    num_prompt_tokens: int,
    num_new_tokens: int,
    num_beams: int = 1,
    dtype: str = "float32",
) -> RequestCost:
    """Computes the cost of a request as `generate` runs it: encode once, read the prompt once, decode every beam.

    Beams read the last token of the prompt each for itself (see `mllm.kv_cache.beam`); it counts as prefill.

    Args:
        config: an `ElasticConfig`.
        items: the media of the request.
        num_prompt_tokens: the whole prompt, soft tokens included.
        num_new_tokens: tokens of the answer, its end token included.
        dtype: of the key-value cache.

    Raises:
        ValueError: an LLM or encoder that has no formula here.
    """
    text, adapter, media = config.text_config, config.adapter, config.encoded_media
    encoders = config.encoder_configs
    shared = num_prompt_tokens - 1 if num_beams > 1 else 0
    once = llm_flops(text, num_tokens=shared, num_logits=1, adapter=adapter) if shared else 0
    first = llm_flops(text, num_tokens=num_prompt_tokens - shared, past_tokens=shared, num_logits=1, adapter=adapter)
    rest = max(num_new_tokens - 1, 0)  # the prompt's own pass gives the first token
    later = llm_flops(text, num_tokens=rest, past_tokens=num_prompt_tokens, num_logits=rest, adapter=adapter)
    kept = num_prompt_tokens + rest
    return RequestCost(
        encoder=sum(encoder_flops(encoders[item.medium], item, media[item.medium].encoder) for item in items),
        compressor=sum(
            compressor_flops(
                media[item.medium], item, in_size=_feature_size(encoders[item.medium]), out_size=text.hidden_size
            )
            for item in items
            if item.num_tokens
        ),
        prefill=once + num_beams * first,
        decode=num_beams * later,
        kv_bytes=num_beams * kept * kv_bytes_per_token(text, dtype=dtype),
    )


def llm_flops(
    text: Any, *, num_tokens: int, past_tokens: int = 0, num_logits: int = 0, adapter: AdapterConfig | None = None
) -> int:
    """Counts the FLOPs of a forward pass of a dense decoder over `num_tokens` tokens behind `past_tokens` cached ones.

    Args:
        text: config of the LLM: attention with grouped keys and values and a gated feed-forward block.
        num_logits: positions the head runs at.
        adapter: an adapter that is not merged.

    Raises:
        ValueError: a mixture of experts, linear attention, or a config without the fields of such a decoder.
    """
    body = sum(rows * columns for rows, columns in _linears(text).values()) + _adapter_weights(text, adapter)
    attention = attention_flops(text, num_tokens=num_tokens, past_tokens=past_tokens)
    head = 2 * text.hidden_size * text.vocab_size * num_logits
    return text.num_hidden_layers * 2 * body * num_tokens + attention + head


def published_flops(text: Any, *, num_tokens: int, adapter: AdapterConfig | None = None) -> int:
    """Counts the FLOPs of a prompt as Llama-MTSK (arXiv 2503.06362) does: twice the parameters, times the tokens.

    The parameters are those of layers, norms and head, and of the adapter; the input embedding, which is only looked
    up, is left out, and the head counts even where it shares the embedding's weights. Biases are left out. Attention
    between tokens is not in it; `attention_flops` is.

    Raises:
        ValueError: as `llm_flops`.
    """
    size = text.hidden_size
    layer = sum(rows * columns for rows, columns in _linears(text).values()) + _adapter_weights(text, adapter)
    weights = text.num_hidden_layers * (layer + 2 * size) + size + text.vocab_size * size
    return 2 * weights * num_tokens


def attention_flops(text: Any, *, num_tokens: int, past_tokens: int = 0) -> int:
    """Counts the FLOPs of attention in all layers: scores and weighted sums over the pairs of a causal mask."""
    pairs = num_tokens * past_tokens + num_tokens * (num_tokens + 1) // 2
    return text.num_hidden_layers * 4 * text.num_attention_heads * _head_size(text) * pairs


def train_factor(*, llm_trains: bool = False, checkpointing: bool = False) -> int:
    """Tells how many forward passes of the LLM a training step costs: 2 if it is frozen, else 3; adapters are small."""
    return (3 if llm_trains else 2) + int(checkpointing)


def kv_bytes_per_token(text: Any, *, dtype: str = "float32") -> int:
    """Counts the bytes of key-value cache per token of context.

    Raises:
        ValueError: an unknown dtype.
    """
    if dtype not in BYTES_PER_VALUE:
        raise ValueError(f"dtype is {dtype!r}; allowed: {', '.join(BYTES_PER_VALUE)}")
    return 2 * text.num_hidden_layers * text.num_key_value_heads * _head_size(text) * BYTES_PER_VALUE[dtype]


def row_cost(
    model: Any,
    row: EncodedSample,
    counts: Sequence[TokenCount],
    *,
    frame_pixels: Sequence[Sequence[int]],
    num_prompt_tokens: int,
    num_new_tokens: int,
    num_beams: int = 1,
) -> RequestCost | None:
    """Computes the cost of one encoded row, asked alone; None for a model without a formula.

    Args:
        model: an `ElasticForConditionalGeneration`.
        counts: of the row's media at its budget.
        frame_pixels: per medium, height and width of the frames of a video that is read as a stream.
        num_prompt_tokens, num_new_tokens, num_beams: see `request_cost`.
    """
    if cost_problem(model.config) is not None:
        return None
    items = [
        item
        for span, count, pixels in zip(row.spans, counts, frame_pixels, strict=True)
        for item in items_of(span.extent, count, frame_pixels=pixels)
    ]
    return request_cost(
        model.config,
        items,
        num_prompt_tokens=num_prompt_tokens,
        num_new_tokens=num_new_tokens,
        num_beams=num_beams,
        dtype=str(model.get_input_embeddings().weight.dtype).removeprefix("torch."),
    )


def cost_problem(config: Any) -> str | None:
    """Says why the cost of this model cannot be computed, or returns None."""
    try:
        request_cost(
            config, [Item(medium, 64, 1) for medium in config.encoder_configs], num_prompt_tokens=1, num_new_tokens=1
        )
    except ValueError as error:
        return str(error)
    return None


def encoder_flops(config: Any, item: Item, block: EncoderBlock | None = None) -> int:
    """Counts the FLOPs of encoding one item.

    Args:
        config: of the encoder's backbone.
        block: the medium's `encoder` block; the default one when left out.

    Raises:
        ValueError: a backbone without a formula here.
    """
    if config.model_type in HOSTS:
        return host_flops(config, item)
    formula = _ENCODERS.get(config.model_type)
    if formula is None and config.model_type in ENCODERS:
        formula = ENCODERS[config.model_type].flops
    if formula is None:
        raise ValueError(f"no cost formula for encoder {config.model_type!r}; there are {', '.join(_ENCODERS)}")
    return formula(config, item, default_block(config) if block is None else block)


def host_flops(config: Any, item: Item) -> int:
    """Counts the FLOPs of the encoder and the projector of a host, for one tile or clip.

    Every weight matrix of the encoder is multiplied once per position, every one of the projector once per soft token;
    and attention over all positions, which some encoders of audio restrict to blocks.
    """
    family = HOSTS[config.model_type]
    positions = family.reads.num_positions(config, item.num_features)
    encoder_weights, projector_weights, num_layers, size = _host_weights(config.to_json_string(), config.model_type)
    attention = num_layers * 4 * positions * positions * size
    return 2 * encoder_weights * positions + attention + 2 * projector_weights * item.num_features


@lru_cache(maxsize=8)
def _host_weights(config_json: str, model_type: str) -> tuple[int, int, int, int]:
    """Count weights of encoder and projector, layers and width of the encoder, of a host made without values."""
    with torch.device("meta"):
        body = build_host(AutoConfig.for_model(**json.loads(config_json))).model
    encoder, projectors = reading_parts(body)
    merging = sum(_matrix_weights(getattr(encoder, name)) for name in HOSTS[model_type].merging)
    layers = next(part for part in encoder.modules() if isinstance(part, nn.ModuleList) and len(part))
    config = getattr(encoder, "config", None)
    size = 0 if config is None else getattr(config, "embed_dim", None) or _hidden_size(config)
    return _matrix_weights(encoder) - merging, sum(map(_matrix_weights, projectors)), len(layers), size


def _matrix_weights(part: nn.Module) -> int:
    tables = {id(table.weight) for table in part.modules() if isinstance(table, nn.Embedding)}
    return sum(weight.numel() for weight in part.parameters() if weight.dim() > 1 and id(weight) not in tables)


def compressor_flops(block: MediumConfig, item: Item, *, in_size: int, out_size: int) -> int:
    """Counts the FLOPs of compressing one item to `item.num_tokens` soft tokens, its projectors included.

    A batch computes up to the longest prompt's length instead and throws the rest away; that padding is not counted.
    Everything else is as it runs when answering: on streams `query` reads with all its queries whatever the budget; on
    an image with position keys it is folded (see `mllm.compressors.folded_attention`), and making the constants, once,
    is left out; with a projector per budget every one of them runs.

    Args:
        block: how the medium becomes soft tokens.
        in_size: size of a feature.
        out_size: the LLM's hidden size.
    """
    compressor, projector, budgets = block.compressor, block.projector, block.values
    if isinstance(compressor, QueryConfig):
        return _query(block, item, in_size, out_size)
    if isinstance(compressor, HybridConfig):
        return _hybrid(block, item, in_size, out_size)
    if isinstance(compressor, StackConfig):
        sizes = [item.num_features // n if item.medium == "image" else n for n in budgets]
        windows = [min(item.num_features // size, item.num_tokens) for size in sizes]
        return sum(n * _projector(projector, in_size * r, out_size) for n, r in zip(windows, sizes, strict=True))
    num_projectors = len(budgets) if projector.per_budget else 1
    first = getattr(projector, "before_pooling", False)
    projected, averaged_size = (item.num_features, out_size) if first else (item.num_tokens, in_size)
    if isinstance(projector, WordsConfig):
        projected = -(-item.num_features // projector.stretch_frames)
    average = 2 * item.num_tokens * item.num_features * averaged_size
    if getattr(compressor, "order", "raster") == "haar":
        average = 0  # sums and differences, no products
    return average + num_projectors * projected * _projector(projector, in_size, out_size)


def _projector(projector: ProjectorConfig, in_size: int, out_size: int) -> int:
    """Counts the FLOPs of the projector per token, or per stretch of features that words are heard in."""
    if isinstance(projector, NoProjectorConfig):
        return 0
    hidden_size = 0 if isinstance(projector, LinearConfig) else projector.hidden_size
    hidden_size = out_size if isinstance(hidden_size, str) else hidden_size
    if isinstance(projector, WordsConfig):
        heard = in_size * in_size + hidden_size * in_size * (projector.stretch_frames + 1)
        return 2 * (heard + (in_size + out_size) * (projector.num_words + 1))
    one = hidden_size * (in_size + out_size) if hidden_size else in_size * out_size
    if isinstance(projector, MoeConfig):  # every expert runs on every token
        return 2 * projector.num_experts * (one + in_size + out_size)
    return 2 * one


def _query(block: MediumConfig, item: Item, in_size: int, out_size: int) -> int:
    """Counts the cross-attention of all queries, over an image or every window of a stream, and the projection."""
    queries, size, compressor = block.num_queries, in_size, block.compressor
    window = item.num_features if item.medium == "image" else compressor.window_frames
    windows = -(-item.num_features // window)
    read = windows * window
    content = compressor.keys == "content"
    if item.medium == "image":
        queries = min(queries, item.num_tokens)
        if not content:
            return 2 * (_folded(compressor, read, queries, size) + queries * size * out_size)
    keys = read if content else window
    weights = (queries + keys + read + windows * queries) * size * size  # queries, keys, values, output
    return 2 * (weights + 2 * queries * read * size + item.num_tokens * size * out_size)


def _hybrid(block: MediumConfig, item: Item, size: int, out_size: int) -> int:
    """Counts the anchors, the most queries that any count up to this one has, and the projector."""
    sizes = block.anchors
    queries = max(num_queries(count, sizes) for count in range(1, item.num_tokens + 1))
    anchors, read = max(one for one in sizes if one <= item.num_tokens), item.num_features
    projected = item.num_tokens * _projector(block.projector, size, out_size)
    pooled = anchors * read * size
    if not queries:
        return 2 * pooled + projected
    pooled *= 2  # of features and of their positions
    # Queries, keys, values and output of both attentions; and what is read.
    weights = (4 * queries + 2 * anchors + 2 * read) * size * size
    return 2 * (pooled + weights + 2 * queries * (anchors + read) * size) + projected


def _folded(compressor: QueryConfig, length: int, num_tokens: int, size: int) -> int:
    """Counts multiply-adds of pooling a grid with folded attention, in the order of products that has fewer."""
    heads = count_heads(compressor.num_heads, size)
    values_first = length * size * size + num_tokens * length * size
    return min(values_first, num_tokens * heads * length * size + num_tokens * size * size)


def _linears(text: Any) -> dict[str, tuple[int, int]]:
    """Lists inputs and outputs of the linear layers of one decoder layer, by the last part of their names."""
    if any(getattr(text, key, None) for key in ("num_experts", "num_local_experts", "n_routed_experts")):
        raise ValueError(f"{text.model_type} is a mixture of experts; the cost formula covers dense decoders")
    if "linear_attention" in (getattr(text, "layer_types", None) or ()):
        raise ValueError(f"{text.model_type} has layers of linear attention; the cost formula covers full attention")
    for key in ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "num_hidden_layers"):
        if not isinstance(getattr(text, key, None), int):
            raise ValueError(f"no cost formula for LLM {text.model_type!r}: its config has no whole number {key}")
    size, inner = text.hidden_size, text.intermediate_size
    queries = text.num_attention_heads * _head_size(text)
    keys = text.num_key_value_heads * _head_size(text)
    return {
        "q_proj": (size, queries),
        "k_proj": (size, keys),
        "v_proj": (size, keys),
        "o_proj": (queries, size),
        "gate_proj": (size, inner),
        "up_proj": (size, inner),
        "down_proj": (inner, size),
    }


def _adapter_weights(text: Any, adapter: AdapterConfig | None) -> int:
    if adapter is None:
        return 0
    linears = _linears(text)
    if isinstance(adapter, MomeConfig):  # all experts are computed for every token, and all routers
        experts = adapter.num_shared + adapter.num_experts
        routers = max(len(adapter.scales), 1) * adapter.num_experts
        return text.hidden_size * (experts * (2 * adapter.bottleneck + 1) + routers)
    if (count_weights := getattr(adapter, "weights_per_layer", None)) is not None:
        return count_weights(linears)  # of one from outside, see `mllm.adapters.register_adapter`
    if not isinstance(adapter, LoraConfig | LoraBankConfig | GatedLoraConfig):
        raise ValueError(f"no cost formula for adapter {adapter.kind!r}, whose config has no weights_per_layer")
    # A bank computes all of its LoRAs for every token.
    count = num_experts(adapter) if isinstance(adapter, LoraBankConfig) else 1
    return sum(count * adapter.rank * sum(linears[target]) for target in adapter.targets)


def _head_size(text: Any) -> int:
    return getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads


def _hidden_size(config: Any) -> int:
    return getattr(config, "hidden_size", None) or getattr(config, "hidden_dim", None) or config.d_model


def _feature_size(config: Any) -> int:
    """Return the size of the features that a compressor reads."""
    return host_facts(config).hidden_size if config.model_type in HOSTS else _hidden_size(config)


def _transformer(num_layers: int, size: int, inner: int, length: int, *, gated: bool = False) -> int:
    """Counts encoder layers with full attention over `length` positions."""
    weights = 4 * size * size + (3 if gated else 2) * size * inner
    return num_layers * (2 * length * weights + 4 * length * length * size)


def _vision_encoder(config: Any, item: Item, block: Any) -> int:
    """Counts a ViT that is cut behind the layer that is read."""
    layer = block.feature_layer
    depth = layer if layer > 0 else config.num_hidden_layers + 1 + layer
    size, patch = config.hidden_size, config.patch_size
    extra = int(not config.model_type.startswith("siglip")) + getattr(config, "num_register_tokens", 0)
    stem = 2 * item.num_features * size * config.num_channels * patch * patch
    inner = int(size * config.mlp_ratio) if hasattr(config, "mlp_ratio") else config.intermediate_size
    gated = bool(getattr(config, "use_gated_mlp", False) or getattr(config, "use_swiglu_ffn", False))
    if getattr(config, "use_swiglu_ffn", False):  # DINOv2 shrinks it so that three matrices cost what two did
        inner = (int(inner * 2 / 3) + 7) // 8 * 8
    return stem + _transformer(depth, size, inner, item.num_features + extra, gated=gated)


def _whisper(config: Any, item: Item, block: Any) -> int:
    """Counts the whole window, whatever the clip, or the clip alone where it is not padded."""
    window, size = config.max_source_positions, config.d_model
    window = item.num_features if block.padding == "none" else window
    convolutions = 2 * 3 * size * (config.num_mel_bins * 2 * window + size * window)
    return convolutions + _transformer(config.encoder_layers, size, config.encoder_ffn_dim, window)


def _wave(config: Any, item: Item, block: Any) -> int:
    """Counts HuBERT, WavLM and wav2vec 2.0. The waveform is taken as the shortest that gives so many frames."""
    frames, convolutions = item.num_features, 0
    channels = [1, *config.conv_dim]
    for index in reversed(range(len(config.conv_dim))):
        kernel, stride = config.conv_kernel[index], config.conv_stride[index]
        convolutions += 2 * frames * kernel * channels[index] * channels[index + 1]
        frames = (frames - 1) * stride + kernel
    projection = 2 * item.num_features * config.conv_dim[-1] * config.hidden_size
    return convolutions + projection + _hubert_trunk(config, item.num_features)


def _av_hubert(config: Any, item: Item, block: Any) -> int:
    """Counts the video half: 3-D convolution, ResNet-18 on each frame, and the trunk over zeros and video."""
    frames, size, widths = item.num_features, config.hidden_size, config.resnet_channels
    height, width = _halved(item.height_pixels), _halved(item.width_pixels)
    per_frame = 2 * height * width * widths[0] * 5 * 7 * 7
    height, width = _halved(height), _halved(width)
    before = widths[0]
    for stage, channels in enumerate(widths):
        if stage:
            height, width = _halved(height), _halved(width)
        weights = 9 * before * channels + 27 * channels * channels
        weights += before * channels if stage or before != channels else 0
        per_frame += 2 * height * width * weights
        before = channels
    projections = 2 * widths[-1] * size + 2 * 2 * size * size
    return frames * (per_frame + projections) + _hubert_trunk(config, frames)


def _av_hubert_audio(config: Any, item: Item, block: Any) -> int:
    """Counts the audio half: one matrix on each frame, and the trunk over audio and zeros side by side."""
    size = config.hidden_size
    projections = 2 * config.audio_feature_size * size + 2 * 2 * size * size
    return item.num_features * projections + _hubert_trunk(config, item.num_features)


def _hubert_trunk(config: Any, frames: int) -> int:
    """Counts the positional convolution (an even kernel computes one frame that is dropped) and the layers."""
    size, kernel = config.hidden_size, config.num_conv_pos_embeddings
    outputs = frames + (1 if kernel % 2 == 0 else 0)
    positions = 2 * outputs * size * (size // config.num_conv_pos_embedding_groups) * kernel
    return positions + _transformer(config.num_hidden_layers, size, config.intermediate_size, frames)


def _halved(pixels: int) -> int:
    """Counts the pixels left by a convolution or pooling of stride 2 that is padded to its kernel."""
    return (pixels + 1) // 2


_ENCODERS: dict[str, Callable[[Any, Item, Any], int]] = {
    "clip_vision_model": _vision_encoder,
    "siglip_vision_model": _vision_encoder,
    "siglip2_vision_model": _vision_encoder,
    "dinov2": _vision_encoder,
    "dinov2_with_registers": _vision_encoder,
    "dinov3_vit": _vision_encoder,
    "whisper": _whisper,
    "hubert": _wave,
    "wav2vec2": _wave,
    "wavlm": _wave,
    "av_hubert": _av_hubert,
    "av_hubert_audio": _av_hubert_audio,
}
