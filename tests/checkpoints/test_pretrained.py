"""Parts come whole out of checkpoints as hubs hold them, or loading fails and says which tensor does not fit.

Checkpoints are what `save_pretrained` of the whole transformers class writes, in one file and in several.
"""

import ast
import json
import logging
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from blocks import medium, merged
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    CLIPVisionModelWithProjection,
    Dinov2Config,
    Dinov2ForImageClassification,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersForImageClassification,
    Dinov2WithRegistersModel,
    DINOv3ViTConfig,
    DINOv3ViTModel,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3Config,
    Gemma3ForCausalLM,
    Gemma3ForConditionalGeneration,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    HubertConfig,
    HubertForCTC,
    HubertModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2VLConfig,
    Siglip2Config,
    Siglip2Model,
    Siglip2VisionConfig,
    Siglip2VisionModel,
    SiglipConfig,
    SiglipModel,
    SiglipVisionConfig,
    SiglipVisionModel,
    Wav2Vec2Config,
    Wav2Vec2ForCTC,
    Wav2Vec2ForPreTraining,
    WavLMConfig,
    WavLMForCTC,
    WavLMForXVector,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
    WhisperModel,
)
from transformers.models.whisper.modeling_whisper import WhisperEncoder

import mllm
from mllm.checkpoints.build import build
from mllm.checkpoints.export import export
from mllm.checkpoints.families import ENCODER_LAYOUTS, WHOLE_VLMS
from mllm.checkpoints.load import load, save_run
from mllm.checkpoints.pretrained import encoder_config, llm_config, load_encoder, load_llm
from mllm.checkpoints.sources import WEIGHTS, WEIGHTS_INDEX, digest_of
from mllm.config.model import ModelConfig
from mllm.encoders import AVHubertEncoder
from mllm.model.trainables import set_trainables

SIZES: dict[str, Any] = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
}
IMAGE: dict[str, Any] = {**SIZES, "image_size": 32, "patch_size": 8}
WORDS: dict[str, Any] = {
    **SIZES,
    "vocab_size": 20,
    "max_position_embeddings": 8,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
CONVS: dict[str, Any] = {"conv_dim": (8, 8), "conv_kernel": (10, 3), "conv_stride": (5, 2)}
WAVE: dict[str, Any] = {
    **SIZES,
    **CONVS,
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 8,
    "num_conv_pos_embedding_groups": 4,
    "vocab_size": 20,
}
NAFLEX: dict[str, Any] = {**SIZES, "patch_size": 8, "num_patches": 16}
DINO = {key: value for key, value in IMAGE.items() if key != "intermediate_size"}
LLM: dict[str, Any] = {
    **SIZES,
    "num_key_value_heads": 1,
    "vocab_size": len(tiny.TOKENIZER),
    "max_position_embeddings": 64,
}
WHISPER = WhisperConfig(
    d_model=16,
    encoder_layers=2,
    encoder_attention_heads=2,
    encoder_ffn_dim=24,
    decoder_layers=2,
    decoder_attention_heads=2,
    decoder_ffn_dim=24,
    num_mel_bins=80,
    max_source_positions=50,
    vocab_size=20,
    bos_token_id=0,
    eos_token_id=0,
    pad_token_id=0,
    decoder_start_token_id=0,
)
GEMMA: dict[str, Any] = {**LLM, "head_dim": 8}


def two_towers(config: Any, encoder: dict[str, Any]) -> Any:
    return config(text_config=WORDS, vision_config=encoder)


def llava(config: Any = LlavaConfig, **changes: Any) -> Any:
    """A LLaVA on a CLIP and an untied Llama; `changes` are the Llama's."""
    return config(vision_config=CLIPVisionConfig(**IMAGE), text_config=LlamaConfig(**{**LLM, **changes}))


def gemma3() -> Any:
    """A Gemma 3 with a SigLIP, its head tied."""
    encoders = {"vision_config": {**IMAGE, "vision_use_head": False}, "text_config": GEMMA}
    return Gemma3Config(**encoders, mm_tokens_per_image=4)


# By name: the class that is saved, its config, the medium, and where the part is in the module and in the file.
ENCODERS: dict[str, tuple[type[PreTrainedModel], Callable[[], Any], str, str, str]] = {
    "whisper": (WhisperForConditionalGeneration, lambda: WHISPER, "audio", "model.encoder", "model.encoder."),
    "whisper-model": (WhisperModel, lambda: WHISPER, "audio", "encoder", "encoder."),
    "whisper-encoder": (WhisperEncoder, lambda: WHISPER, "audio", "", ""),
    "hubert-ctc": (HubertForCTC, lambda: HubertConfig(**WAVE), "audio", "hubert", "hubert."),
    "hubert": (HubertModel, lambda: HubertConfig(**WAVE), "audio", "", ""),
    "wav2vec2-ctc": (Wav2Vec2ForCTC, lambda: Wav2Vec2Config(**WAVE), "audio", "wav2vec2", "wav2vec2."),
    "wav2vec2-pre": (Wav2Vec2ForPreTraining, lambda: Wav2Vec2Config(**WAVE), "audio", "wav2vec2", "wav2vec2."),
    "wavlm-ctc": (WavLMForCTC, lambda: WavLMConfig(**WAVE), "audio", "wavlm", "wavlm."),
    "wavlm-xvector": (WavLMForXVector, lambda: WavLMConfig(**WAVE), "audio", "wavlm", "wavlm."),
    "clip": (CLIPModel, lambda: two_towers(CLIPConfig, IMAGE), "image", "vision_model", "vision_model."),
    "clip-vision": (CLIPVisionModel, lambda: CLIPVisionConfig(**IMAGE), "image", "", ""),
    "clip-projection": (
        *(CLIPVisionModelWithProjection, lambda: CLIPVisionConfig(**IMAGE)),
        *("image", "vision_model", "vision_model."),
    ),
    "siglip": (SiglipModel, lambda: two_towers(SiglipConfig, IMAGE), "image", "vision_model", "vision_model."),
    "siglip-vision": (SiglipVisionModel, lambda: SiglipVisionConfig(**IMAGE), "image", "", ""),
    "siglip2": (Siglip2Model, lambda: two_towers(Siglip2Config, NAFLEX), "image", "vision_model", "vision_model."),
    "siglip2-vision": (Siglip2VisionModel, lambda: Siglip2VisionConfig(**NAFLEX), "image", "", ""),
    "dinov2": (Dinov2Model, lambda: Dinov2Config(**DINO), "image", "", ""),
    "dinov2-giant": (Dinov2Model, lambda: Dinov2Config(**DINO, use_swiglu_ffn=True), "image", "", ""),
    "dinov2-classes": (Dinov2ForImageClassification, lambda: Dinov2Config(**DINO), "image", "dinov2", "dinov2."),
    "registers": (Dinov2WithRegistersModel, lambda: Dinov2WithRegistersConfig(**DINO), "image", "", ""),
    "registers-classes": (
        *(Dinov2WithRegistersForImageClassification, lambda: Dinov2WithRegistersConfig(**DINO)),
        *("image", "dinov2_with_registers", "dinov2_with_registers."),
    ),
    "dinov3": (DINOv3ViTModel, lambda: DINOv3ViTConfig(**IMAGE, num_register_tokens=2), "image", "", ""),
    "av-hubert": (AVHubertEncoder, lambda: tiny.encoder_configs()["video"], "video", "", ""),
    "llava": (LlavaForConditionalGeneration, llava, "image", "model.vision_tower", "vision_tower."),
    "llava-next": (
        *(LlavaNextForConditionalGeneration, lambda: llava(LlavaNextConfig)),
        *("image", "model.vision_tower", "vision_tower."),
    ),
    "gemma3": (Gemma3ForConditionalGeneration, gemma3, "image", "model.vision_tower", "vision_tower."),
}
# The decoder and the head in the module; where the decoder is in the file.
LLMS: dict[str, tuple[type[PreTrainedModel], Callable[[], Any], str, str]] = {
    "llama": (LlamaForCausalLM, lambda: LlamaConfig(**LLM), "model", "model."),
    "llama-tied": (LlamaForCausalLM, lambda: LlamaConfig(**LLM, tie_word_embeddings=True), "model", "model."),
    "llama-bare-tied": (LlamaModel, lambda: LlamaConfig(**LLM, tie_word_embeddings=True), "", ""),
    "qwen2": (Qwen2ForCausalLM, lambda: Qwen2Config(**LLM), "model", "model."),
    "mixtral": (MixtralForCausalLM, lambda: MixtralConfig(**LLM, num_local_experts=3), "model", "model."),
    "gemma3-text": (Gemma3ForCausalLM, lambda: Gemma3TextConfig(**GEMMA), "model", "model."),
    "gpt2": (
        *(GPT2LMHeadModel, lambda: GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=30, n_positions=8)),
        *("transformer", "transformer."),
    ),
    "llava": (LlavaForConditionalGeneration, llava, "model.language_model", "language_model.model."),
    "llava-tied": (
        *(LlavaForConditionalGeneration, lambda: llava(tie_word_embeddings=True)),
        *("model.language_model", "language_model.model."),
    ),
    "llava-next": (
        *(LlavaNextForConditionalGeneration, lambda: llava(LlavaNextConfig)),
        *("model.language_model", "language_model.model."),
    ),
    "gemma3": (Gemma3ForConditionalGeneration, gemma3, "model.language_model", "language_model.model."),
}
# What the lists of reviewed names say of tensors that nothing reads.
UNREAD = ("masked_spec_embed", "mask_token")


def make(model_class: type[PreTrainedModel], config: Any, seed: int = 0) -> Any:
    """A model every tensor of which has values of its own."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model: Any = model_class._from_config(config).eval()
        for value in model.state_dict().values():
            if value.is_floating_point():
                value.normal_()
    return model


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[Any, Path]]:
    """Saves a model whole, once per kind and size of files; returns it and its folder, which is not to be changed."""
    made: dict[tuple[str, str], tuple[Any, Path]] = {}

    def save(name: str, model_class: Any, config: Callable[[], Any], shard_size: str = "50GB") -> tuple[Any, Path]:
        if (name, shard_size) not in made:
            model, folder = make(model_class, config()), tmp_path_factory.mktemp("whole")
            model.save_pretrained(folder, max_shard_size=shard_size)
            made[name, shard_size] = model, folder
        return made[name, shard_size]

    return save


def assert_equal(loaded: nn.Module, expected: nn.Module, *, besides: tuple[str, ...] = ()) -> None:
    values, theirs = loaded.state_dict(), expected.state_dict()
    assert values.keys() - set(besides) == theirs.keys() - set(besides)
    assert len(theirs) > 10
    wrong = [name for name, value in theirs.items() if name not in besides and not torch.equal(values[name], value)]
    assert not wrong


def copy_with(folder: Path, out: Path, change: Callable[[dict[str, Tensor]], Any]) -> str:
    """Copy a folder with its single file of weights changed."""
    shutil.copytree(folder, out)
    state = load_file(folder / WEIGHTS)  # a copy: what was loaded before may still read its file
    change(state)
    (out / WEIGHTS).unlink()
    save_file({name: value.contiguous() for name, value in state.items()}, out / WEIGHTS, metadata={"format": "pt"})
    return str(out)


@pytest.mark.parametrize("shard_size", ["50GB", "8KB"])
@pytest.mark.parametrize("name", ENCODERS)
def test_an_encoder_is_taken_whole_out_of_a_whole_checkpoint(name: str, shard_size: str, saved: Any) -> None:
    model_class, config, medium, prefix, _ = ENCODERS[name]
    model, folder = saved(name, model_class, config, shard_size)
    assert (folder / WEIGHTS_INDEX).is_file() == (shard_size == "8KB")
    read_config = encoder_config(str(folder), medium)
    encoder = load_encoder(str(folder), read_config, dtype=torch.float32)
    assert_equal(encoder, model.get_submodule(prefix))
    assert not encoder.training


@pytest.mark.parametrize("shard_size", ["50GB", "8KB"])
@pytest.mark.parametrize("name", LLMS)
def test_an_llm_is_taken_whole_out_of_a_whole_checkpoint(name: str, shard_size: str, saved: Any) -> None:
    model_class, config, prefix, _ = LLMS[name]
    model, folder = saved(name, model_class, config, shard_size)
    assert (folder / WEIGHTS_INDEX).is_file() == (shard_size == "8KB")
    llm: Any = load_llm(str(folder), llm_config(str(folder)), dtype=torch.float32, attention="eager")
    assert_equal(getattr(llm, llm.base_model_prefix), model.get_submodule(prefix))
    head = model.get_output_embeddings() or model.get_input_embeddings()  # a bare model's are tied
    assert torch.equal(llm.get_output_embeddings().weight, head.weight)
    is_tied = llm.get_output_embeddings().weight is llm.get_input_embeddings().weight
    assert (
        is_tied
        == llm_config(str(folder)).tie_word_embeddings
        == ("tied" in name or name in ("gemma3", "gemma3-text", "gpt2"))
    )
    assert llm.generation_config.eos_token_id == llm_config(str(folder)).eos_token_id


def loads(name: str) -> tuple[tuple[Any, Callable[[], Any]], str, Callable[[str], Any]]:
    """What is saved, how the part's names begin in the file, and what loads it."""
    kind, _, name = name.partition(" ")
    if kind == "encoder":
        model_class, config, medium, _, start = ENCODERS[name]
        return (
            (model_class, config),
            start,
            lambda path: load_encoder(path, encoder_config(path, medium), dtype=torch.float32),
        )
    model_class, config, _, start = LLMS[name]
    return (
        (model_class, config),
        start,
        lambda path: load_llm(path, llm_config(path), dtype=torch.float32, attention="eager"),
    )


# Layers whose tensors are made of several of the file, or the reverse.
PUT_TOGETHER = ("dinov2-giant", "mixtral")
BOTH = [
    *(f"encoder {name}" for name in ENCODERS if name not in PUT_TOGETHER),
    *(f"llm {name}" for name in LLMS if name not in PUT_TOGETHER),
]


@pytest.mark.parametrize("name", BOTH)
def test_a_tensor_that_does_not_fit_is_named(name: str, saved: Any, tmp_path: Path) -> None:
    what, start, load = loads(name)
    _, folder = saved(name.partition(" ")[2], *what)
    # A matrix of the last layer: transformers converts names of some, which are then told as the model calls them.
    names = [
        tensor
        for tensor in sorted(load_file(folder / WEIGHTS))
        if tensor.startswith(start) and not tensor.endswith(UNREAD)
    ]
    victim = next(
        tensor
        for tensor in names
        if tensor.endswith(("fc2.weight", "down_proj.weight", "output_dense.weight", "c_proj.weight"))
    )
    path = copy_with(folder, tmp_path / "missing", lambda state: state.pop(victim))
    with pytest.raises(ValueError, match=rf"{path} are not those of its config: missing [\w.]*{victim}$"):
        load(path)
    path = copy_with(folder, tmp_path / "renamed", lambda state: state.update({f"{victim}_x": state.pop(victim)}))
    with pytest.raises(ValueError, match=rf"missing [\w.]*{victim}; unexpected [\w.]*{victim}_x$"):
        load(path)
    path = copy_with(folder, tmp_path / "shape", lambda state: state.update({victim: torch.zeros(3, 5)}))
    with pytest.raises(ValueError, match=rf"config: [\w.]*{victim} has shape \(3, 5\), the model has \(\d+, \d+\)$"):
        load(path)


EXPERT = "model.layers.0.block_sparse_moe.experts.1.w1.weight"
LOST: dict[str, Callable[[dict[str, Tensor]], Any]] = {
    "missing": lambda state: state.pop(EXPERT),
    "misshapen": lambda state: state.update({EXPERT: torch.zeros(3, 5)}),
    "all missing": lambda state: [state.pop(name) for name in list(state) if "layers.1.block_sparse_moe.exp" in name],
}


@pytest.mark.parametrize("change", LOST)
def test_experts_are_all_there_or_refused(
    change: str, saved: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)  # the report is in the library's own log
    what, _, load = loads("llm mixtral")
    _, folder = saved("mixtral", *what)
    path = copy_with(folder, tmp_path / "x", LOST[change])
    message = r"missing .*layers\.1\.mlp\.experts\.down_proj" if change == "all missing" else "do not fit each other"
    with pytest.raises(ValueError, match=message):
        load(path)
    assert change == "all missing" or "model.layers.0.mlp.experts.gate_up_proj" in caplog.text


@pytest.mark.parametrize("name", ["whisper", "llava", "wavlm-ctc", "clip"])
def test_a_tensor_of_no_known_part_is_named(name: str, saved: Any, tmp_path: Path) -> None:
    what, _, load = loads(f"encoder {name}")
    _, folder = saved(name, *what)
    path = copy_with(folder, tmp_path / "x", lambda state: state.update({"third_tower.weight": torch.zeros(1)}))
    with pytest.raises(ValueError, match=r"unexpected third_tower\.weight$"):
        load(path)


def test_many_tensors_are_counted(saved: Any, tmp_path: Path) -> None:
    what, _, load = loads("encoder whisper")
    _, folder = saved("whisper", *what)

    def forget(state: dict[str, Tensor]) -> None:
        for name in [name for name in state if name.startswith("model.encoder.layers.1.")]:
            del state[name]

    with pytest.raises(ValueError, match=r"missing (model\.encoder\.layers\.1\.[\w.]+, ){4}and 11 more$"):
        load(copy_with(folder, tmp_path / "x", forget))


# How checkpoints of LLaVA were and are spelled, from what is written today.
SPELLINGS = {
    "hubs": {"vision_tower.": "vision_tower.vision_model."},
    "modules": {
        "language_model.lm_head.": "lm_head.",
        "language_model.model.": "model.language_model.",
        "vision_tower.": "model.vision_tower.",
        "multi_modal_projector.": "model.multi_modal_projector.",
    },
    "5.10 to 5.23": {
        "language_model.lm_head.": "lm_head.",
        "language_model.model.": "model.language_model.model.",
        "vision_tower.": "model.vision_tower.vision_model.",
        "multi_modal_projector.": "model.multi_modal_projector.",
    },
}


def respell(state: dict[str, Tensor], starts: Mapping[str, str]) -> None:
    for name in list(state):
        for start, other in starts.items():
            if name.startswith(start):
                state[other + name.removeprefix(start)] = state.pop(name)
                break


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_every_spelling_of_a_llava_is_read(spelling: str, saved: Any, tmp_path: Path) -> None:
    model, folder = saved("llava", LlavaForConditionalGeneration, llava)
    path = copy_with(folder, tmp_path / "x", lambda state: respell(state, SPELLINGS[spelling]))
    llm: Any = load_llm(path, llm_config(path), dtype=torch.float32, attention="sdpa")
    assert_equal(llm.model, model.model.language_model)
    assert torch.equal(llm.lm_head.weight, model.lm_head.weight)
    assert_equal(load_encoder(path, encoder_config(path, "image"), dtype=torch.float32), model.model.vision_tower)


def test_old_spellings_of_one_tensor_are_read(saved: Any, tmp_path: Path) -> None:
    """Weight norm before torch 2.1, position ids and rotary frequencies as buffers that were saved."""
    old = {"parametrizations.weight.original0": "weight_g", "parametrizations.weight.original1": "weight_v"}
    model, folder = saved("hubert-ctc", HubertForCTC, lambda: HubertConfig(**WAVE))

    def respell_norm(state: dict[str, Tensor]) -> None:
        for name in [name for name in state if name.endswith(tuple(old))]:
            start, _, end = name.partition("parametrizations")
            state[start + old["parametrizations" + end]] = state.pop(name)

    path = copy_with(folder, tmp_path / "hubert", respell_norm)
    assert_equal(load_encoder(path, encoder_config(path, "audio"), dtype=torch.float32), model.hubert)

    positions = {"vision_model.embeddings.position_ids": torch.arange(17)[None]}
    model, folder = saved("clip", *ENCODERS["clip"][:2])
    path = copy_with(folder, tmp_path / "clip", lambda state: state.update(positions))
    assert_equal(load_encoder(path, encoder_config(path, "image"), dtype=torch.float32), model.vision_model)

    rotary = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    model, folder = saved("llama", *LLMS["llama"][:2])
    path = copy_with(folder, tmp_path / "llama", lambda state: state.update(rotary))
    assert_equal(load_llm(path, llm_config(path), dtype=torch.float32, attention="sdpa"), model)


@pytest.mark.parametrize("name", ["hubert-ctc", "dinov2"])
def test_what_nothing_reads_may_be_missing(name: str, saved: Any, tmp_path: Path) -> None:
    model_class, config, medium, prefix, start = ENCODERS[name]
    model, folder = saved(name, model_class, config)
    unread = {"hubert-ctc": "masked_spec_embed", "dinov2": "embeddings.mask_token"}[name]
    path = copy_with(folder, tmp_path / "x", lambda state: state.pop(start + unread))
    encoder = load_encoder(path, encoder_config(path, medium), dtype=torch.float32)
    assert_equal(encoder, model.get_submodule(prefix), besides=(unread,))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("stored", ["float16", "bfloat16"])
def test_weights_of_any_type_are_read_in_the_type_that_is_asked(stored: str, dtype: str, tmp_path: Path) -> None:
    stored_dtype, wanted_dtype = getattr(torch, stored), getattr(torch, dtype)
    model = make(LlavaForConditionalGeneration, llava()).to(stored_dtype)
    model.save_pretrained(tmp_path)
    llm: Any = load_llm(str(tmp_path), llm_config(str(tmp_path)), dtype=wanted_dtype, attention="sdpa")
    assert {value.dtype for value in llm.state_dict().values()} == {wanted_dtype}
    assert_equal(llm.model, model.model.language_model.to(wanted_dtype))
    encoder = load_encoder(str(tmp_path), encoder_config(str(tmp_path), "image"), dtype=wanted_dtype)
    assert_equal(encoder, model.model.vision_tower.to(wanted_dtype))


def test_a_head_is_neither_made_up_nor_dropped(saved: Any, tmp_path: Path) -> None:
    bare = make(LlamaModel, LlamaConfig(**LLM, tie_word_embeddings=False))
    bare.save_pretrained(tmp_path / "bare")
    path = str(tmp_path / "bare")
    with pytest.raises(ValueError, match=r"missing lm_head\.weight$"):
        load_llm(path, llm_config(path), dtype=torch.float32, attention="sdpa")

    _, folder = saved("llama-tied", *LLMS["llama-tied"][:2])
    head = {"lm_head.weight": torch.randn(len(tiny.TOKENIZER), 16)}
    path = copy_with(folder, tmp_path / "differs", lambda state: state.update(head))
    with pytest.raises(
        ValueError, match=r"lm_head\.weight and model\.embed_tokens\.weight with different values, but its"
    ):
        load_llm(path, llm_config(path), dtype=torch.float32, attention="sdpa")

    def repeat(state: dict[str, Tensor]) -> None:
        state["lm_head.weight"] = state["model.embed_tokens.weight"].clone()

    path = copy_with(folder, tmp_path / "same", repeat)
    llm: Any = load_llm(path, llm_config(path), dtype=torch.float32, attention="sdpa")
    assert llm.lm_head.weight is llm.model.embed_tokens.weight


def test_a_tensor_under_two_names_is_refused(saved: Any, tmp_path: Path) -> None:
    _, folder = saved("llava", LlavaForConditionalGeneration, llava)
    other = {"lm_head.weight": torch.zeros(len(tiny.TOKENIZER), 16)}
    path = copy_with(folder, tmp_path / "x", lambda state: state.update(other))
    with pytest.raises(ValueError, match=r"holds lm_head\.weight twice: as .*lm_head\.weight and as "):
        load_llm(path, llm_config(path), dtype=torch.float32, attention="sdpa")


def test_what_no_part_is_taken_out_of_is_refused_by_name(saved: Any, tmp_path: Path) -> None:
    Qwen2VLConfig().save_pretrained(tmp_path)
    path = str(tmp_path)
    with pytest.raises(
        ValueError, match=r"is a qwen2_vl, and no LLM is taken out of it; allowed: .* llava, llava_next, gemma3"
    ):
        llm_config(path)
    with pytest.raises(
        ValueError, match=r"is a qwen2_vl, and no encoder is taken out of it; allowed: whisper, .*, gemma3"
    ):
        encoder_config(path, "image")
    for name, kind in (("whisper", "whisper"), ("clip", "clip"), ("clip-vision", "clip_vision_model")):
        _, folder = saved(name, *ENCODERS[name][:2])
        with pytest.raises(ValueError, match=rf"is a {kind}, and no LLM is taken out of it"):
            llm_config(str(folder))
    _, folder = saved("llama", *LLMS["llama"][:2])
    with pytest.raises(ValueError, match="is a llama, and no encoder is taken out of it"):
        encoder_config(str(folder), "audio")


def test_the_lists_know_the_encoders_of_this_project() -> None:
    saved_types = {config().model_type for _, config, *_ in ENCODERS.values()}
    assert saved_types == set(ENCODER_LAYOUTS)
    assert set(WHOLE_VLMS) == {config().model_type for _, config, _, start in LLMS.values() if "language" in start}


class Evil:
    """Leaves a file where it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return Path.touch, (self.marker,)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "pytorch_model.bin.index.json"])
def test_pickled_weights_are_refused_and_not_opened(name: str, saved: Any, tmp_path: Path) -> None:
    _, folder = saved("whisper", *ENCODERS["whisper"][:2])
    shutil.copytree(folder, tmp_path / "x")
    (tmp_path / "x" / WEIGHTS).unlink()
    torch.save({"model.encoder.conv1.weight": Evil(tmp_path / "marker")}, tmp_path / "x" / "pytorch_model.bin")
    if name.endswith("json"):
        (tmp_path / "x" / "pytorch_model.bin").rename(tmp_path / "x" / "one.bin")
        (tmp_path / "x" / name).write_text(json.dumps({"weight_map": {"model.encoder.conv1.weight": "one.bin"}}))
    path = str(tmp_path / "x")
    with pytest.raises(ValueError, match=rf"holds no {WEIGHTS} and .*; {name} would have to be unpickled"):
        load_encoder(path, encoder_config(path, "audio"), dtype=torch.float32)
    assert not (tmp_path / "marker").exists()


def test_files_that_are_cut_or_absent_are_named(saved: Any, tmp_path: Path) -> None:
    what, _, load = loads("encoder whisper")
    _, folder = saved("whisper", *what)
    shutil.copytree(folder, tmp_path / "cut")
    (tmp_path / "cut" / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"model\.safetensors is no safetensors file, or is cut"):
        load(str(tmp_path / "cut"))
    _, folder = saved("whisper", *what, "8KB")
    shutil.copytree(folder, tmp_path / "absent")
    shard = sorted((tmp_path / "absent").glob("model-*"))[1]
    shard.unlink()
    with pytest.raises(ValueError, match=rf"names {shard.name}, which is not there \(1 of \d+ files are not\)"):
        load(str(tmp_path / "absent"))
    index = tmp_path / "absent" / WEIGHTS_INDEX
    index.write_text(json.dumps({"weight_map": {"a": "../secret.safetensors"}}))
    with pytest.raises(ValueError, match=r"names '\.\./secret\.safetensors', which is no file beside it"):
        load(str(tmp_path / "absent"))
    index.write_text("[]")
    with pytest.raises(ValueError, match="holds no weight_map"):
        load(str(tmp_path / "absent"))


def test_adapters_and_quantised_weights_are_refused(saved: Any, tmp_path: Path) -> None:
    _, folder = saved("llama", *LLMS["llama"][:2])
    shutil.copytree(folder, tmp_path / "peft")
    (tmp_path / "peft" / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "someone/else"}))
    path = str(tmp_path / "peft")
    with pytest.raises(ValueError, match="holds an adapter of PEFT"):
        load_llm(path, llm_config(path), dtype=torch.float32, attention="sdpa")
    for key, value in (
        ("quantization_config", {"quant_method": "gptq", "bits": 4}),
        ("transformers_weights", "a.safetensors"),
    ):
        shutil.copytree(folder, tmp_path / key)
        config = tmp_path / key / "config.json"
        config.write_text(json.dumps(json.loads(config.read_text()) | {key: value}))
        with pytest.raises(ValueError, match=rf"{key}.* says {key}=.*; only plain weights in model.safetensors"):
            llm_config(str(tmp_path / key))


def test_digests_are_of_what_is_read_and_of_every_shard(saved: Any, tmp_path: Path) -> None:
    _, folder = saved("whisper", *ENCODERS["whisper"][:2], "8KB")
    shutil.copytree(folder, tmp_path / "x")
    before = digest_of(folder)
    assert len(before) == 64
    assert digest_of(tmp_path / "x") == before
    save_file({"a": torch.zeros(1)}, tmp_path / "x" / "other.safetensors")
    assert digest_of(tmp_path / "x") == before, "nothing reads that file"
    for shard in sorted(folder.glob("model-*")):
        content = shard.read_bytes()
        (tmp_path / "x" / shard.name).write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        assert digest_of(tmp_path / "x") != before
        (tmp_path / "x" / shard.name).write_bytes(content)
    _, single = saved("whisper", *ENCODERS["whisper"][:2])
    shutil.copy(single / WEIGHTS, tmp_path / "x")
    assert digest_of(tmp_path / "x") == digest_of(single), "where both are, the single file is read"


@pytest.fixture(scope="module")
def whole_parts(tmp_path_factory: pytest.TempPathFactory, saved: Any) -> dict[str, str]:
    """A whole Whisper, a whole LLaVA with its tokenizer, and a whole CLIP, with what prepares their inputs."""
    folder = tmp_path_factory.mktemp("parts")
    image_processor = CLIPImageProcessor(size={"height": 32, "width": 32}, do_center_crop=False)
    for name, helpers in {
        "whisper": (WhisperFeatureExtractor(feature_size=80, chunk_length=1),),
        "llava": (tiny.TOKENIZER, image_processor),
        "clip": (image_processor,),
    }.items():
        shutil.copytree(saved(name, *ENCODERS[name][:2])[1], folder / name)
        for helper in helpers:
            helper.save_pretrained(folder / name)
    return {name: str(folder / name) for name in ("whisper", "llava", "clip")}


def settings_of(parts: Mapping[str, str], image: str) -> ModelConfig:
    config = tiny.settings(("image", "audio"))
    media = {
        "image": (image, {"encoder": {"feature_layer": -1}, "budgets": [1, 4]}),
        "audio": (parts["whisper"], {"budgets": ["/4"]}),
    }
    blocks: dict[str, Any] = {m: medium(m, merged({"encoder": source}, more)) for m, (source, more) in media.items()}
    return replace(config, llm=parts["llava"], **blocks)


@pytest.mark.parametrize("image", ["clip", "llava"])
def test_a_model_is_built_on_whole_checkpoints_saved_and_loaded(
    image: str, whole_parts: dict[str, str], saved: Any, tmp_path: Path
) -> None:
    model, processor = build(settings_of(whole_parts, whole_parts[image]))
    whisper, _ = saved("whisper", *ENCODERS["whisper"][:2])
    vlm, _ = saved("llava", *ENCODERS["llava"][:2])
    images, _ = saved(image, *ENCODERS[image][:2])
    encoder = images.vision_model if image == "clip" else images.model.vision_tower
    set_trainables(model)
    save_run(model, processor, tmp_path / "run")
    for one in (model, load(tmp_path / "run")[0]):
        assert_equal(one.model.audio_tower.backbone, whisper.model.encoder)
        kept = one.model.vision_tower.backbone.state_dict()
        assert len(kept) > 30
        assert all(torch.equal(value, encoder.state_dict()[name]) for name, value in kept.items())
        frozen = {name: value for name, value in one.model.language_model.state_dict().items() if ".lora_" not in name}
        assert {name.replace(".base_layer", "") for name in frozen} == set(vlm.model.language_model.state_dict())
        for name, value in frozen.items():
            assert torch.equal(value, vlm.model.language_model.state_dict()[name.replace(".base_layer", "")])
        assert torch.equal(one.lm_head.weight, vlm.lm_head.weight)


def test_an_llm_that_sdpa_cannot_compute_is_computed_as_eager_in_every_form_and_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    llm = make(Gemma2ForCausalLM, Gemma2Config(**LLM, head_dim=8, hidden_activation="gelu_pytorch_tanh"))
    llm.save_pretrained(tmp_path / "llm")
    tiny.TOKENIZER.save_pretrained(tmp_path / "llm")
    audio = medium("audio", {"encoder": {"source": "synthetic:audio"}, "budgets": ["/4"]})
    model, processor = build(ModelConfig(llm=str(tmp_path / "llm"), chat_format="plain", audio=audio))
    set_trainables(model)
    save_run(model, processor, tmp_path / "run")
    export(tmp_path / "run", tmp_path / "export")
    caplog.clear()
    for one in (model, load(tmp_path / "run")[0], load(tmp_path / "export")[0]):
        assert one.model.language_model.config._attn_implementation == "eager"
    assert (
        caplog.messages.count("attention is computed as eager: the LLM is a gemma2, which does not go with sdpa") == 2
    )


def test_every_reader_of_foreign_files_is_told_to_run_no_code() -> None:
    """And no class of transformers loads weights but through `mllm.checkpoints.pretrained`."""
    readers = {("pretrained.py", name) for name in ("model_class", "GenerationConfig")}
    readers |= {("load.py", "ElasticProcessor"), ("load.py", "ElasticConfig"), ("start_from.py", "ElasticConfig")}
    readers |= {("processor.py", "ElasticConfig"), ("export.py", "ElasticConfig")}
    readers |= {(f"{name}.py", "ElasticProcessor") for name in ("processing", "renderer", "engine_options")}
    readers |= {("engine_options.py", "ElasticConfig"), ("engine_options.py", "GenerationConfig")}
    problems = []
    for path in sorted(Path(mllm.__file__).parent.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
                continue
            owner = ast.unparse(node.func.value)
            arguments = {word.arg: ast.unparse(word.value) for word in node.keywords}
            where = f"{path.name}:{node.lineno} {owner}.{node.func.attr}"
            if owner.startswith("Auto") and node.func.attr in ("from_pretrained", "from_config"):
                if arguments.get("trust_remote_code") != "False":
                    problems.append(f"{where} without trust_remote_code=False")
            elif node.func.attr == "from_pretrained" and (path.name, owner) not in readers:
                problems.append(where)
    assert not problems


@pytest.mark.parametrize("values", [{"num_hidden_layers": 10**6}, {"text_config": {"num_hidden_layers": 10**6}}])
def test_a_config_of_a_million_layers_is_refused_before_one_is_made(values: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", **values}))
    with pytest.raises(ValueError, match=r"says num_hidden_layers=1000000; more than 1,000 are never made"):
        llm_config(str(tmp_path))
