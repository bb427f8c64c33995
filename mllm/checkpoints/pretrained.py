"""Load pretrained LLMs and encoders out of checkpoints as hubs hold them: by name and shape, whole, or not at all.

    folder or hub name ── config.json ──── llm_config, encoder_config    which part is wanted, and whether it can be had
                       └─ *.safetensors ── Layout ── load_llm, load_encoder    its tensors under the part's own names

transformers gives a tensor that a file lacks random values, leaves out one that it does not know, and says so in its
log alone. Here a first pass without values (on the meta device, and never in ZeRO-3's shards, where transformers knows
of no shapes) finds out what would be, and what does not fit is an error that names it.

Knows which names the checkpoints of a family give to a part. Does not know what a part computes or how it is trained.
"""

import copy
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_MAPPING,
    AutoConfig,
    AutoFeatureExtractor,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.integrations import deepspeed as hf_deepspeed
from transformers.utils.hub import cached_file

from mllm.checkpoints.families import ENCODER_LAYOUTS, WHOLE_VLMS, Layout
from mllm.checkpoints.gguf_files import GgufTensors, read_gguf_config, read_gguf_tokenizer
from mllm.checkpoints.part_files import Part, SafetensorsFile, TensorFile
from mllm.checkpoints.quantization import bits_options, quantization_device
from mllm.checkpoints.sources import (
    PICKLED_WEIGHTS,
    WEIGHTS,
    WEIGHTS_INDEX,
    gguf_file,
    resolve_source,
    shard_names,
    weight_files,
)
from mllm.config.model import QuantizationConfig
from mllm.encoders import ENCODERS, backbone_class, backbone_config, register_av_hubert
from mllm.hosts import build_host, find_family, host_class, read_tekken_tokenizer, reading_parts

logger = logging.getLogger(__name__)

MAX_LAYERS = 1_000


def read_config(reference: str) -> PreTrainedConfig:
    """Read the config of a folder, a hub name or a synthetic part.

    Raises:
        ValueError: what transformers refuses in it, a model that only code in the folder knows, or quantised weights.
        OSError: a source that is neither a folder nor to be had from the hub.
    """
    source = resolve_source(reference)
    if (gguf := gguf_file(source)) is not None:
        config = read_gguf_config(gguf)
        check_layer_counts(config.to_dict(), reference)
        return config
    values, _ = PreTrainedConfig.get_config_dict(source)
    model_type = values.get("model_type")
    if "auto_map" in values and model_type not in CONFIG_MAPPING and model_type not in ENCODERS:
        raise ValueError(
            f"{reference} is a {model_type}, which transformers knows by code in the folder alone (auto_map); foreign "
            "code is never run"
        )
    if refused := [key for key in ("quantization_config", "transformers_weights") if values.get(key)]:
        raise ValueError(
            f"the config of {reference} says {refused[0]}={values[refused[0]]!r}; only plain weights in {WEIGHTS}, or "
            f"in the files that {WEIGHTS_INDEX} names, are read"
        )
    check_layer_counts(values, reference)
    register_av_hubert()
    try:
        return AutoConfig.from_pretrained(source, trust_remote_code=False)
    except StrictDataclassError as error:
        raise ValueError(f"the config of {reference} is refused: {error}") from error


def check_layer_counts(values: Mapping[Any, Any], reference: str) -> None:
    """Refuse a config of more layers than any model has: making them, even without values, would not come to an end.

    Args:
        values: a config, with those of its parts inside.

    Raises:
        ValueError: the key and its value.
    """
    for key, value in values.items():
        if isinstance(value, Mapping):
            check_layer_counts(value, reference)
        elif str(key).endswith(("layers", "n_layer")) and isinstance(value, int) and value > MAX_LAYERS:
            raise ValueError(f"the config of {reference} says {key}={value}; more than {MAX_LAYERS:,} are never made")


def read_tokenizer(reference: str, **options: Any) -> Any:
    """Read the tokenizer of an LLM; `options` are those of `AutoTokenizer.from_pretrained`."""
    source = resolve_source(reference)
    if (gguf := gguf_file(source)) is not None:
        return read_gguf_tokenizer(gguf, **options)
    return AutoTokenizer.from_pretrained(source, trust_remote_code=False, **options)


def read_host_tokenizer(reference: str, config: PreTrainedConfig) -> Any:
    """Read the tokenizer of a host, a fast one.

    Args:
        config: of the host, as `host_config` reads it.

    Raises:
        OSError: there is none.
    """
    if find_family(config.model_type, reference=reference).is_tekken:
        return read_tekken_tokenizer(resolve_source(reference))
    return read_tokenizer(reference)


def read_feature_extractor(reference: str) -> Any:
    """Read what transformers brings audio into the form of an encoder with."""
    return AutoFeatureExtractor.from_pretrained(resolve_source(reference), trust_remote_code=False)


def llm_config(reference: str) -> PreTrainedConfig:
    """Read the config of an LLM, taken out of a whole model where the source is one of `WHOLE_VLMS`.

    Raises:
        ValueError: a source that is no LLM and none is taken out of, by what it is.
    """
    whole = read_config(reference)
    text = whole.get_text_config()
    is_whole = whole.model_type in WHOLE_VLMS
    is_part = text is not whole
    if whole.is_encoder_decoder or is_part is not is_whole or type(text) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ValueError(
            f"{reference} is a {whole.model_type}, and no LLM is taken out of it; allowed: the decoders of "
            f"transformers' AutoModelForCausalLM, and out of a whole {', '.join(WHOLE_VLMS)} its own"
        )
    if is_whole:  # whether the head is the embeddings is said of the whole model
        text.tie_word_embeddings = whole.tie_word_embeddings
    return text


def host_config(reference: str) -> PreTrainedConfig:
    """Read the config of a pretrained model that is kept whole.

    Raises:
        ValueError: a family that is not supported; those that are, are named.
    """
    whole = read_config(reference)
    find_family(whole.model_type, reference=reference)
    return whole


def load_host(
    reference: str,
    config: PreTrainedConfig,
    *,
    dtype: torch.dtype,
    attention: str,
    quantization: QuantizationConfig | None = None,
) -> PreTrainedModel:
    """Load a host with its head, every tensor of its file.

    Args:
        config: of the host, as `host_config` reads it.
        quantization: of the linear layers of its LLM.

    Raises:
        ValueError: tensors that are missing, unexpected or of another shape, by name; a folder of another kind; or a
            quantisation that cannot be had here.
    """
    options: dict[str, Any] = {}
    if quantization is not None:
        with torch.device("meta"), unsharded():
            draft = build_host(config)
        encoder, projectors = reading_parts(draft.model)
        parts = {id(part) for part in (encoder, *projectors)}
        kept = [name for name, part in draft.named_modules() if id(part) in parts]
        options = bits_options(quantization, dtype=dtype, kept=kept, device=quantization_device())
    # Of the LLM alone; encoders have what transformers gives them.
    implementation = {"text_config": known_attention(config.get_text_config(), attention)}
    return load_checked(
        host_class(config), reference, config, dtype=dtype, attn_implementation=implementation, **options
    )


def known_attention(text: Any, attention: str) -> str:
    """Return what is to compute the attention of an LLM: eager for sdpa where that cannot, which it logs.

    Some LLMs, such as Gemma 2, cap attention logits. transformers 5.24 refuses sdpa for their classes, and
    5.19 takes it and caps nothing.
    """
    llm_class: Any = MODEL_MAPPING.get(type(text), None)
    can = llm_class is None or llm_class._supports_sdpa
    if attention != "sdpa" or (can and getattr(text, "attn_logit_softcapping", None) is None):
        return attention
    logger.warning("attention is computed as eager: the LLM is a %s, which does not go with sdpa", text.model_type)
    return "eager"


def encoder_config(reference: str, medium: str) -> PreTrainedConfig:
    """Read the config of the encoder of a medium, taken out of a whole model where the source is one.

    Raises:
        ValueError: a source that no encoder is taken out of, by what it is.
    """
    whole = read_config(reference)
    _encoder_layout(reference, whole)
    return backbone_config(whole, medium)


def _encoder_layout(reference: str, whole: PreTrainedConfig) -> Layout:
    if whole.model_type in ENCODERS and whole.model_type not in ENCODER_LAYOUTS:
        return Layout()  # of a package outside, whose checkpoints hold the encoder alone
    if whole.model_type not in ENCODER_LAYOUTS:
        raise ValueError(
            f"{reference} is a {whole.model_type}, and no encoder is taken out of it; allowed: "
            f"{', '.join(ENCODER_LAYOUTS)}"
        )
    return ENCODER_LAYOUTS[whole.model_type]


def load_llm(
    reference: str,
    config: PreTrainedConfig,
    *,
    dtype: torch.dtype,
    attention: str,
    quantization: QuantizationConfig | None = None,
) -> PreTrainedModel:
    """Load an LLM with its head; in shards where ZeRO-3 is on.

    Args:
        config: of the LLM, as `llm_config` reads it.
        quantization: of its linear layers.

    Raises:
        ValueError: tensors that are missing, unexpected or of another shape, by name; a folder of another kind; or a
            quantisation that cannot be had here.
    """
    whole = read_config(reference)
    layout = WHOLE_VLMS.get(whole.model_type, Layout())
    model_class: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    options: dict[str, Any] = {"attn_implementation": known_attention(config, attention)}
    if quantization is not None:
        options |= bits_options(quantization, dtype=dtype, device=quantization_device())
    return load_checked(model_class, reference, config, layout, dtype=dtype, **options)


def load_encoder(reference: str, config: PreTrainedConfig, *, dtype: torch.dtype) -> PreTrainedModel:
    """Load the backbone of an encoder, whole on every process.

    Args:
        config: of the encoder, as `encoder_config` reads it.

    Raises:
        ValueError: tensors that are missing, unexpected or of another shape, by name; or a folder of another kind.
    """
    layout = _encoder_layout(reference, read_config(reference))
    with unsharded():
        return load_checked(backbone_class(config), reference, config, layout, dtype=dtype)


def load_checked(
    model_class: type[PreTrainedModel],
    reference: str,
    config: PreTrainedConfig,
    layout: Layout | None = None,
    *,
    dtype: torch.dtype,
    **options: Any,
) -> PreTrainedModel:
    """Load a model every tensor of which is in its file, by name and shape, in eval mode.

    Args:
        layout: where the file holds it; as a whole by default.
        options: of `from_pretrained`.

    Raises:
        ValueError: tensors that are missing, unexpected or of another shape, by name; or a folder of another kind.
        OSError: a source that is neither a folder nor to be had from the hub.
    """
    layout = layout or Layout()
    source = resolve_source(reference)
    folder = Path(source) if gguf_file(source) is not None else _local_folder(reference)
    part = Part(reference, _opened(folder, model_class, config, dtype), layout)
    options = {**options, "dtype": dtype, "trust_remote_code": False, "output_loading_info": True}
    # Names and shapes are those of the plain model; quantised layers have others.
    plain = {key: value for key, value in options.items() if key not in ("quantization_config", "device_map")}
    draft, report = _draft(model_class, config, part, **plain)
    part.check(report)
    part.check_ties(draft)
    model, report = _load_state(model_class, config, part.tensors(), **options)
    part.check(report)
    model.name_or_path = model.config.name_or_path = reference
    if model.can_generate() and (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    return model


def _load_state(
    model_class: type[PreTrainedModel], config: PreTrainedConfig, state: Mapping[str, Any], **options: Any
) -> tuple[Any, dict[str, Any]]:
    """Let transformers rename, convert and place tensors that were read here; it also says what does not fit."""
    loaded: Any = model_class.from_pretrained(None, config=config, state_dict=dict(state), **options)
    return loaded


def _draft(
    model_class: type[PreTrainedModel], config: PreTrainedConfig, part: Part, **options: Any
) -> tuple[Any, dict[str, Any]]:
    """Load shapes without values, of which only what transformers says is of use.

    Raises:
        ValueError: tensors of several of which one is made, such as experts, that do not go together.
    """
    try:
        with unsharded():
            # Sizes that differ are let through here alone, so that all of them can be named.
            return _load_state(
                model_class, config, part.shapes(), device_map="meta", ignore_mismatched_sizes=True, **options
            )
    except RuntimeError as error:
        raise ValueError(
            f"the weights in {part.reference} are not those of its config: some that are put together, such as "
            f"experts, do not fit each other; transformers' report, logged above, names them ({error})"
        ) from error


def _local_folder(reference: str) -> Path:
    """Return the folder of a source; of a hub name the one in the cache, with its weights in it.

    Raises:
        ValueError: there are no weights that are read without unpickling, or an adapter that belongs on top of them.
    """
    source = resolve_source(reference)
    folder = Path(source)
    if not folder.is_dir():
        names = (WEIGHTS, WEIGHTS_INDEX, "generation_config.json", "adapter_config.json")
        files = [cached_file(source, name, _raise_exceptions_for_missing_entries=False) for name in names]
        weights = files[0] or files[1]
        if weights is None:
            raise ValueError(f"{reference} holds no {WEIGHTS} and no {WEIGHTS_INDEX}; nothing else is read")
        folder = Path(weights).parent
        for name in [] if files[0] else shard_names(Path(weights)):
            cached_file(source, name)
    if not weight_files(folder):
        pickled = [name for name in PICKLED_WEIGHTS if (folder / name).is_file()]
        why = f"; {pickled[0]} would have to be unpickled, which can run code" if pickled else ""
        raise ValueError(f"{reference} holds no {WEIGHTS} and no {WEIGHTS_INDEX}{why}")
    if (folder / "adapter_config.json").is_file():
        raise ValueError(f"{reference} holds an adapter of PEFT (adapter_config.json); merge it into its model first")
    return folder


def _opened(
    folder: Path, model_class: type[PreTrainedModel], config: PreTrainedConfig, dtype: torch.dtype
) -> list[TensorFile]:
    """Open the files of a part.

    Raises:
        ValueError: a file that is no safetensors file, or a GGUF file that is not read.
    """
    if (gguf := gguf_file(folder)) is None:
        return [SafetensorsFile(file) for file in weight_files(folder)]
    with torch.device("meta"), unsharded():
        draft = model_class(copy.deepcopy(config))
    return [GgufTensors(gguf, draft, dtype)]


@contextmanager
def unsharded() -> Iterator[None]:
    """Make models whole, inside, on every process, also where ZeRO-3 shards the LLM while it loads.

    Encoders are small beside the LLM, and transformers' Whisper cannot be made in shards. What is whole now is sharded
    when training starts.
    """
    sharding = hf_deepspeed._hf_deepspeed_config_weak_ref
    hf_deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        hf_deepspeed._hf_deepspeed_config_weak_ref = sharding
