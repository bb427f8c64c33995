"""Converts a released Llama-AVSR, Llama-MTSK or Omni-AVSR to a run folder: what trained, and the frozen parts beside
it.

    released file ── split_state ── LLM, encoders ──────────── DIR/llm, DIR/audio, DIR/video   (`run:llm`, ... )
                                 └─ projectors, LoRAs ──────── DIR/trainables.safetensors

Knows options and the parts of a checkpoint. Everything is checked before anything is written.
Does not know how the entries are named; that is `avsr_layout.py`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedConfig

from mllm.checkpoints import pretrained
from mllm.checkpoints.build import build_config, processor_of, put_adapters
from mllm.checkpoints.load import save_run
from mllm.checkpoints.pretrained import encoder_config, llm_config, read_feature_extractor, unsharded
from mllm.checkpoints.sources import inside_run
from mllm.config.medium import (
    AudioConfig,
    AudioEncoderConfig,
    EncoderAdapterConfig,
    LipsConfig,
    MlpConfig,
    PoolConfig,
    StackConfig,
    VideoConfig,
    with_source,
)
from mllm.config.model import LoraBankConfig, LoraConfig, ModelConfig
from mllm.convert import av_hubert
from mllm.convert.avsr_layout import (
    TASKS,
    Loras,
    Projectors,
    Split,
    read_llm_loras,
    read_projectors,
    read_video_loras,
    split_state,
)
from mllm.convert.avsr_options import SYSTEMS, Options, System
from mllm.convert.state_files import StoredWeight, check_layout, find_state, read_all, write_stored
from mllm.encoders import backbone_class
from mllm.model.modeling import ElasticForConditionalGeneration
from mllm.model.trainables import set_trainables
from mllm.processing.processor import ElasticProcessor
from mllm.utils.files import new_folder

PAD_TOKEN = "<pad>"
SPANS = {"audio": ["<audio>", "</audio>"], "video": ["<video>", "</video>"]}
PROMPT_MEDIA = {"audio": ("audio",), "video": ("video",), "audiovisual": ("audio", "video")}
_EMBEDDINGS = "llm.model.embed_tokens.weight"
_HEAD = "llm.lm_head.weight"


@dataclass(frozen=True)
class Parts:
    """Holds everything a run folder is made of.

    Args:
        weights: of the frozen LLM and Whisper, by part and by the names transformers gives them; they stay in the
            checkpoint's file until they are written.
        configs: the same parts' configs. helpers: their tokenizer and feature extractor.
        lips: the lip encoder, or None.
        trained: what a checkpoint of ours holds, by its names.
        facts: what was found, in words.
    """

    weights: dict[str, dict[str, StoredWeight]]
    configs: dict[str, PreTrainedConfig]
    helpers: dict[str, Any]
    lips: av_hubert.Converted | None
    media: dict[str, AudioConfig | VideoConfig]
    adapter: LoraConfig | LoraBankConfig | None
    trained: dict[str, Tensor]
    facts: list[str]


def convert_file(path: str | Path, out: str | Path, *, system: str, options: Options) -> list[str]:
    """Convert a released file; `mllm.load(out)` loads what is written.

    Args:
        system: one of `SYSTEMS`.

    Returns:
        What was found, in words.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a file that does not hold such a checkpoint, options that contradict it, or a folder in use.
    """
    with new_folder(out) as folder:
        parts = read_parts(split_state(find_state(path)), SYSTEMS[system], options)
        write_parts(parts, folder)
        write_run(parts, folder, options)
    return parts.facts


def read_parts(split: Split, system: System, options: Options) -> Parts:
    """Read and check everything in a checkpoint.

    Raises:
        ValueError: entries that are missing, unknown or misshapen, or options that contradict them.
    """
    tokenizer = read_tokenizer(options.llm, rows=split.llm[_EMBEDDINGS].shape[0])
    text = llm_config(options.llm)
    text.vocab_size = split.llm[_EMBEDDINGS].shape[0]
    weights = {"llm": _llm_weights(split.llm, text)}
    configs, helpers, lips = {"llm": text}, {"llm": tokenizer}, None
    if "audio" in split.encoders:
        weights["audio"], configs["audio"] = _whisper(split.encoders["audio"], options.whisper)
        helpers["audio"] = read_feature_extractor(options.whisper)
    if "video" in split.encoders:
        lips = _lips(split.encoders["video"], options)
    sizes = {
        "audio": getattr(configs.get("audio"), "d_model", 0),
        "video": lips.encoder.config.hidden_size if lips else 0,
    }
    media, facts, trained = {}, [], {}
    for medium in split.media:
        projectors = read_projectors(medium, split.projectors[medium], feature_size=sizes[medium])
        check_layout(split.projectors[medium], projectors.layout(sizes[medium], text.hidden_size))
        rates = _rates(projectors, system, options, split.media)
        media[medium] = _medium_config(projectors, rates, options)
        trained.update(_projector_entries(projectors, rates, split.projectors[medium]))
        facts.append(_projector_facts(projectors, rates))
    if split.video_lora:
        media["video"], entries = _video_lora(split.video_lora, lips, media.get("video"), options)
        trained.update(entries)
    adapter, entries = _llm_lora(split, text, system, options)
    trained.update(entries)
    _check_prompts(split, system, options, tokenizer)
    return Parts(weights, configs, helpers, lips, media, adapter, trained, [*facts, _adapter_facts(adapter, media)])


def read_tokenizer(source: str, *, rows: int) -> Any:
    """Read the LLM's tokenizer and add the tokens that the released training added to it.

    Args:
        rows: of the checkpoint's embeddings.

    Raises:
        ValueError: a number of rows that this tokenizer does not give.
    """
    tokenizer = pretrained.read_tokenizer(source)
    known = tokenizer.get_vocab()
    spans = [token for pair in SPANS.values() for token in pair if token not in known]
    pads = [] if PAD_TOKEN in known else [PAD_TOKEN]
    base = len(tokenizer)
    if rows not in (base + len(spans), base + len(spans) + len(pads)):
        raise ValueError(
            f"the checkpoint embeds {rows} tokens, but the tokenizer of {source} holds {base} and the released "
            f"training adds {', '.join([*pads, *spans]) or 'nothing'}; was it trained on another LLM? (option llm)"
        )
    if pads and rows > base + len(spans):  # Qwen keeps the padding token it has
        tokenizer.add_special_tokens({"pad_token": PAD_TOKEN})
    if spans:
        tokenizer.add_special_tokens({"additional_special_tokens": spans}, replace_extra_special_tokens=False)
    return tokenizer


def _llm_weights(state: Mapping[str, StoredWeight], config: PreTrainedConfig) -> dict[str, StoredWeight]:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    expected = {f"llm.{name}": tuple(value.shape) for name, value in model.state_dict().items()}
    weights = {name: value for name, value in state.items() if not name.endswith("rotary_emb.inv_freq")}
    if config.tie_word_embeddings and _HEAD not in weights:
        expected.pop(_HEAD)
    check_layout(weights, expected)
    head = weights.pop(_HEAD, None) if config.tie_word_embeddings else None
    if head is not None and not head.read().equal(weights[_EMBEDDINGS].read()):
        raise ValueError(f"{_HEAD} differs from {_EMBEDDINGS}, but the config of this LLM ties them (option llm)")
    return {name.removeprefix("llm."): value for name, value in weights.items()}


def _whisper(state: Mapping[str, StoredWeight], source: str) -> tuple[dict[str, StoredWeight], PreTrainedConfig]:
    config = encoder_config(source, "audio")
    if config.model_type != "whisper":
        raise ValueError(f"{source} is a {config.model_type}; only checkpoints with Whisper can be converted")
    with torch.device("meta"):
        expected = backbone_class(config)._from_config(config).state_dict()
    check_layout(state, {f"audio_encoder.{name}": tuple(value.shape) for name, value in expected.items()})
    return {name.removeprefix("audio_encoder."): value for name, value in state.items()}, config


def _lips(state: Mapping[str, StoredWeight], options: Options) -> av_hubert.Converted:
    entries = {name.removeprefix("video_encoder."): value.float() for name, value in read_all(state).items()}
    matrix = entries.get("post_extract_proj.weight")
    width = len(matrix) if matrix is not None and matrix.dim() else 0  # what is wrong with it is said below
    heads = options.video_heads or max(width // 64, 1)
    settings = {"encoder_attention_heads": heads, "layer_norm_first": options.video_norms_first}
    try:
        return av_hubert.convert_state(entries, settings)
    except ValueError as error:
        raise ValueError(f"video_encoder: {error}") from error


def _rates(projectors: Projectors, system: System, options: Options, media: list[str]) -> tuple[int, ...]:
    """Read the frames per token of each projector (of the single one, all that it served).

    Raises:
        ValueError: rates that the shapes contradict, or a kind of projector this system does not have.
    """
    medium = projectors.medium
    if projectors.is_list not in system.lists:
        kind = "a list, one per rate" if projectors.is_list else "a single one"
        raise ValueError(f"the {medium} projector is {kind}; {system.title} has none such (see `mllm convert`)")
    named = tuple(options.audio_rates if medium == "audio" else options.video_rates)
    if projectors.is_stack:
        if named and named != projectors.multiples:
            shown = ", ".join(map(str, projectors.multiples))
            raise ValueError(f"{medium}_rates is {list(named)}, but the projectors stack {shown} frames")
        named = projectors.multiples
    rates = named or system.published_rates(medium, media)
    if min(rates) < 1 or len(set(rates)) < len(rates):
        raise ValueError(f"{medium}_rates is {list(rates)}; rates are whole numbers from 1, each once")
    if projectors.is_list and len(rates) != len(projectors.multiples):
        raise ValueError(
            f"{medium}_rates is {list(rates)}, but the checkpoint holds {len(projectors.multiples)} projectors; name "
            "one rate each, in their order"
        )
    return rates


def _medium_config(projectors: Projectors, rates: tuple[int, ...], options: Options) -> AudioConfig | VideoConfig:
    """How a medium becomes soft tokens; where its encoder lies is filled in when that is written."""
    per_budget = projectors.is_list and not projectors.is_stack
    projector = MlpConfig(
        hidden_size=projectors.hidden_size, activation="relu", norm=projectors.has_norm, per_budget=per_budget
    )
    budgets: list[str | int] = [f"/{rate}" for rate in sorted(rates)]
    compressor = StackConfig() if projectors.is_stack else PoolConfig()
    if projectors.medium == "audio":
        encoder = AudioEncoderConfig(source="", normalize=options.normalize_audio)
        return AudioConfig(
            encoder=encoder, compressor=compressor, projector=projector, budgets=budgets, span=SPANS["audio"]
        )
    return VideoConfig(
        encoder=LipsConfig(source=""), compressor=compressor, projector=projector, budgets=budgets, span=SPANS["video"]
    )


def _projector_entries(
    projectors: Projectors, rates: tuple[int, ...], state: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Name our projectors, which stand in the order of their rates, whatever the order was there."""
    order = sorted(rates)
    ranks = {index: order.index(rate) if projectors.is_list else 0 for index, rate in enumerate(rates)}
    prefix = f"model.compressors.{projectors.medium}.projectors"
    return {f"{prefix}.{ranks[index]}.{ours}": state[name].float() for index, name, ours in projectors.names()}


def _video_lora(
    state: Mapping[str, Tensor],
    lips: av_hubert.Converted | None,
    video: AudioConfig | VideoConfig | None,
    options: Options,
) -> tuple[VideoConfig, dict[str, Tensor]]:
    if lips is None or not isinstance(video, VideoConfig):
        raise ValueError(f"the checkpoint holds {min(state)}, but no lip encoder")
    config = lips.encoder.config
    loras = read_video_loras(state, config.num_hidden_layers)
    assert loras is not None
    check_layout(state, loras.layout(config.hidden_size, dict.fromkeys("QV", config.hidden_size)))
    adapter = EncoderAdapterConfig(rank=loras.inner_size, alpha=options.video_scaling * loras.inner_size)
    entries = loras.matrices(state, prefix="model.video_tower.backbone.encoder.layers.{}.attention")
    return replace(video, encoder=replace(video.encoder, adapter=adapter)), entries


def _llm_lora(
    split: Split, text: Any, system: System, options: Options
) -> tuple[LoraConfig | LoraBankConfig | None, dict[str, Tensor]]:
    loras, variant = read_llm_loras(split.llm_lora, text.num_hidden_layers)
    if variant not in system.variants:
        raise ValueError(f"the LLM has a LoRA per task, which {system.title} has not; is it an Omni-AVSR?")
    if loras is None:
        return None, {}
    weights = {letter: split.llm[f"llm.model.layers.0.self_attn.{letter.lower()}_proj.weight"] for letter in "QV"}
    outs = {letter: weight.shape[0] for letter, weight in weights.items()}
    check_layout(split.llm_lora, loras.layout(text.hidden_size, outs))
    rank, alpha = loras.inner_size, _scaling(loras, text.hidden_size, options) * loras.inner_size
    adapter: LoraConfig | LoraBankConfig = LoraConfig(rank=rank, alpha=alpha)
    if variant != "s":
        adapter = LoraBankConfig(variant=cast(Any, variant), rank=rank, alpha=alpha, tasks=list(TASKS.values()))
    return adapter, loras.matrices(split.llm_lora, prefix="model.language_model.layers.{}.self_attn")


def _scaling(loras: Loras, hidden_size: int, options: Options) -> float:
    """Compute what the LLM's LoRAs are multiplied by.

    Raises:
        ValueError: a reduction that does not give the inner size of the checkpoint, or sizes that do not tell one.
    """
    quotient, rest = divmod(hidden_size, loras.inner_size)
    if options.reduction is None and rest:
        raise ValueError(
            f"the LoRAs are {loras.inner_size} inside and the LLM is {hidden_size} wide, which does not tell what it "
            "was divided by; give reduction"
        )
    reduction = options.reduction or quotient
    if round(hidden_size / reduction) != loras.inner_size:
        raise ValueError(
            f"reduction is {reduction}, so the LoRAs would be {round(hidden_size / reduction)} inside, but in the "
            f"checkpoint they are {loras.inner_size}"
        )
    return (reduction / 8 if options.alpha is None else options.alpha) / reduction


def _check_prompts(split: Split, system: System, options: Options, tokenizer: Any) -> None:
    """Check that the prompts' embeddings in the checkpoint are those of the words that ours will ask with.

    Raises:
        ValueError: prompts that are missing, unknown, or other words than those of the options; both are named.
    """
    expected = set(PROMPT_MEDIA) if system.has_prompts else set()
    for problem, names in (("misses", expected - set(split.prompts)), ("holds unknown", set(split.prompts) - expected)):
        if names:
            raise ValueError(f"the checkpoint {problem} {', '.join(f'prompt_{name}' for name in sorted(names))}")
    table = split.llm[_EMBEDDINGS].read() if split.prompts else torch.empty(0, 0)
    for name, stored in split.prompts.items():
        words = options.prompts[name]
        ids = tokenizer(words, add_special_tokens=False)["input_ids"]
        if stored.dim() != 3 or len(stored) != 1 or stored.shape[2] != table.shape[1]:
            raise ValueError(
                f"prompt_{name} has the shape {tuple(stored.shape)}; expected (1, tokens, {table.shape[1]})"
            )
        embedded = stored[0].float()
        if embedded.shape[0] != len(ids) or not torch.allclose(embedded, table[ids].float(), rtol=1e-2, atol=1e-5):
            nearest = torch.cdist(embedded, table.float()).argmin(dim=1).tolist()
            raise ValueError(
                f"prompt_{name} in the checkpoint is not {words!r}; its embeddings are those of "
                f"{tokenizer.decode(nearest)!r} (option prompt_{name})"
            )


def write_parts(parts: Parts, folder: Path) -> None:
    """Write the frozen parts as folders that transformers reads."""
    for part, weights in parts.weights.items():
        part_folder = folder / part
        part_folder.mkdir(parents=True)
        parts.configs[part].save_pretrained(part_folder)
        parts.helpers[part].save_pretrained(part_folder)
        write_stored(weights, part_folder)
    if parts.lips is not None:
        av_hubert.save(parts.lips, folder / "video")


def write_run(parts: Parts, folder: Path, options: Options) -> None:
    """Write config, processor and what trained; the frozen parts must lie in the folder already."""
    media: dict[str, Any] = {m: with_source(block, str(folder / m)) for m, block in parts.media.items()}
    model_config = ModelConfig(
        llm=str(folder / "llm"),
        chat_format="avsr",
        adapter=parts.adapter,
        released_behaviour=options.released_behaviour,
        **media,
    )
    tokenizer, config = build_config(model_config)
    config.sources = {part: inside_run(part, source) for part, source in (config.sources or {}).items()}
    prompts = {"+".join(names): options.prompts[task] for task, names in PROMPT_MEDIA.items() if {*names} <= {*media}}
    settings = replace(processor_of(model_config, tokenizer, config).settings, prompts=prompts)
    processor = ElasticProcessor(tokenizer, config, settings)
    with torch.device("meta"), unsharded():
        model = ElasticForConditionalGeneration(config)
    put_adapters(model)
    names = set_trainables(model)
    check_layout(parts.trained, {name: tuple(model.get_parameter(name).shape) for name in names})
    # What trains takes the place of its stand-ins; the frozen parts are not needed.
    model.load_state_dict(
        {name: value.contiguous() for name, value in parts.trained.items()}, strict=False, assign=True
    )
    save_run(model, processor, folder)


def _projector_facts(projectors: Projectors, rates: tuple[int, ...]) -> str:
    how = "stacked" if projectors.is_stack else "averaged"
    count = f"{len(projectors.multiples)} projectors" if projectors.is_list else "one projector"
    norm = "with" if projectors.has_norm else "without"
    return f"{projectors.medium}: frames {how}, {', '.join(map(str, rates))} per token, {count} {norm} LayerNorm"


def _adapter_facts(adapter: LoraConfig | LoraBankConfig | None, media: Mapping[str, AudioConfig | VideoConfig]) -> str:
    if adapter is None:
        llm = "no LoRA in the LLM"
    else:
        kind = f"variant {adapter.variant}" if isinstance(adapter, LoraBankConfig) else "shared"
        llm = f"LoRA in the LLM: {kind}, rank {adapter.rank}, scaled by {adapter.alpha / adapter.rank:g}"
    lips = cast(Any, media["video"]).encoder.adapter if "video" in media else None
    return llm + (f"; in AV-HuBERT: rank {lips.rank}, scaled by {lips.alpha / lips.rank:g}" if lips else "")
