"""Released Llama-AVSR, Llama-MTSK and Omni-AVSR at toy size: what is read from them, refused and written."""

import math
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from released_av_hubert import released
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models
from torch import Tensor
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from mllm.budget import Budget
from mllm.checkpoints.load import load, save_run
from mllm.cli import main
from mllm.convert.avsr import convert_file, read_tokenizer
from mllm.convert.avsr_layout import Loras, Projectors
from mllm.convert.avsr_options import Options
from mllm.convert.state_files import find_state, read_all
from mllm.encoders.av_hubert import AVHubertEncoder
from mllm.inference.answerer import Answerer, Decoding

WIDTH, FEATURES, INNER, HIDDEN = 32, 16, 4, 24
STATISTICS = "video_encoder.feature_extractor_video.resnet.frontend3D.1.running_mean"
EXPERTS = {"s": [""], "t": [".audio", ".video", ".audiovisual"]}
EXPERTS["st"] = ["_shared", *EXPERTS["t"]]


def frozen() -> dict[str, Tensor]:
    """LLM and encoders under released names."""
    configs: dict[str, Any] = tiny.encoder_configs()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        parts = {
            "llm.": LlamaForCausalLM(tiny.llm_config()).state_dict(),
            "audio_encoder.": WhisperEncoder(configs["audio"]).state_dict(),
            "video_encoder.": released(AVHubertEncoder(configs["video"])),
        }
    return {prefix + name: value.clone() for prefix, values in parts.items() for name, value in values.items()}


def matrices(shapes: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {name: torch.randn(shape, generator=generator) / 8 for name, shape in shapes.items()}


def projectors(medium: str, multiples: list[int], *, is_list: bool, has_norm: bool) -> dict[str, Tensor]:
    shapes: dict[str, tuple[int, ...]] = {}
    for index, multiple in enumerate(multiples):
        prefix = f"{medium}_proj." + (f"{index}." if is_list else "")
        shapes |= {f"{prefix}0.weight": (HIDDEN, FEATURES * multiple), f"{prefix}0.bias": (HIDDEN,)}
        shapes |= {f"{prefix}2.weight": (WIDTH, HIDDEN), f"{prefix}2.bias": (WIDTH,)}
        shapes |= {f"{prefix}3.weight": (WIDTH,), f"{prefix}3.bias": (WIDTH,)} if has_norm else {}
    return matrices(shapes)


def loras(variant: str) -> dict[str, Tensor]:
    shapes: dict[str, tuple[int, ...]] = {}
    for layer in range(2):
        for letter, out in (("Q", 32), ("V", 16)):
            for expert in EXPERTS[variant]:
                prefix = f"llm.model.layers.{layer}.self_attn.lora_"
                shapes[f"{prefix}down_{letter}{expert}.weight"] = (INNER, WIDTH)
                shapes[f"{prefix}up_{letter}{expert}.weight"] = (out, INNER)
    for letter in "QV":
        prefix = "video_encoder.encoder.layers.0.self_attn.lora_"
        shapes[f"{prefix}down_{letter}.weight"], shapes[f"{prefix}up_{letter}.weight"] = (2, FEATURES), (FEATURES, 2)
    return matrices(shapes)


def prompts(table: Tensor) -> dict[str, Tensor]:
    words = Options().prompts
    ids = {name: tiny.TOKENIZER(values, add_special_tokens=False)["input_ids"] for name, values in words.items()}
    return {f"prompt_{name}": table[values][None] for name, values in ids.items()}  # pyright: ignore


def omni(variant: str = "st", audio: tuple[int, ...] = (1, 1), video: tuple[int, ...] = (1, 1)) -> dict[str, Tensor]:
    """An Omni-AVSR: lists of projectors without norms, and the prompts."""
    state = frozen() | loras(variant)
    for medium, multiples in (("audio", audio), ("video", video)):
        state |= projectors(medium, list(multiples), is_list=True, has_norm=False)
    return state | prompts(state["llm.model.embed_tokens.weight"])


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return tiny.write_parts(tmp_path_factory.mktemp("parts"))


def options(parts: dict[str, str], **changes: Any) -> Options:
    return Options(**{"llm": parts["llm"], "whisper": parts["audio"], "video_heads": 2, **changes})


@pytest.fixture(scope="module")
def st_run(tmp_path_factory: pytest.TempPathFactory, parts: dict[str, str]) -> tuple[dict[str, Tensor], Any, Any]:
    """A released Omni-AVSR-ST whose batch norms have drifted, and the model and processor of its run folder."""
    state = omni()
    state[STATISTICS] = torch.full_like(state[STATISTICS], 0.25)
    return state, *converted(tmp_path_factory.mktemp("st"), state, parts, "omni-avsr")[:2]


def converted(folder: Path, state: dict[str, Tensor], parts: dict[str, str], system: str, **changes: Any) -> Any:
    """The model, the processor, and what the command tells."""
    torch.save(state, folder / "released.pt")
    facts = convert_file(folder / "released.pt", folder / "run", system=system, options=options(parts, **changes))
    model, processor = load(folder / "run")
    return model, processor, facts


def test_the_command_writes_a_run_folder_that_can_be_moved_and_asked(
    tmp_path: Path, parts: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save(omni(), tmp_path / "omni.ckpt")
    where = ["--llm", parts["llm"], "--whisper", parts["audio"], "--video-heads", "2"]
    out = str(tmp_path / "made")
    assert main(["convert", "omni-avsr", str(tmp_path / "omni.ckpt"), "--out", out, *where]) == 0
    shown = capsys.readouterr().out
    assert "audio: frames averaged, 4, 16 per token, 2 projectors without LayerNorm" in shown
    assert "LoRA in the LLM: variant st, rank 4, scaled by 0.125; in AV-HuBERT: rank 2, scaled by 2" in shown
    moved = shutil.move(out, tmp_path / "elsewhere")
    media = tiny.write_media(tmp_path / "media")
    audio = str(tmp_path / "media" / media["audio"])
    words = ["--audio", audio, "--budget", "audio=/16", "--max-new-tokens", "2", "--use-cpu"]
    assert main(["generate", "--model", str(moved), *words]) == 0
    assert main(["convert", "omni-avsr", str(tmp_path / "omni.ckpt"), "--out", str(moved), *where]) == 2
    assert "is in use; name a new or an empty folder" in capsys.readouterr().err


def test_what_was_trained_and_what_was_frozen_come_from_the_checkpoint(st_run: Any) -> None:
    state, model, processor = st_run
    weights = model.state_dict()
    assert weights["model.language_model.embed_tokens.weight"].equal(state["llm.model.embed_tokens.weight"])
    assert weights["model.audio_tower.backbone.conv1.weight"].equal(state["audio_encoder.conv1.weight"])
    lips = "model.video_tower.backbone."
    assert weights[STATISTICS.replace("video_encoder.", lips)].equal(state[STATISTICS])
    for index in range(2):
        name = f"model.compressors.video.projectors.{index}.2.weight"
        assert weights[name].equal(state[f"video_proj.{index}.2.weight"])
    bank = weights["model.language_model.layers.1.self_attn.v_proj.lora_B"]
    up = "llm.model.layers.1.self_attn.lora_up_V"
    for expert, suffix in zip(bank, EXPERTS["st"], strict=True):
        assert expert.equal(state[f"{up}{suffix}.weight"])
    down = weights[f"{lips}encoder.layers.0.attention.q_proj.lora_A.default.weight"]
    assert down.equal(state["video_encoder.encoder.layers.0.self_attn.lora_down_Q.weight"])
    layer = model.model.video_tower.backbone.encoder.layers[0].attention.q_proj
    assert layer.scaling == {"default": 2.0}
    assert model.model.language_model.layers[0].self_attn.q_proj.scaling == 0.125
    assert processor.expert_names.tasks == ("asr", "vsr", "avsr")
    assert processor.prompts["audio", "video"] == "Transcribe speech and video to text."


def test_the_prompt_of_the_checkpoint_is_what_is_asked_when_nothing_is(tmp_path: Path, st_run: Any) -> None:
    media = tiny.write_media(tmp_path / "media")
    _, model, processor = st_run
    answerer = Answerer(model, processor, Decoding(max_new_tokens=3))
    audio = tmp_path / "media" / media["audio"]
    answer = answerer(audio=audio, budget="audio=/4")
    assert answer.text == answerer("Transcribe speech to text.", audio=audio, budget="audio=/4").text
    spans, bos = 2, 1
    words = tiny.TOKENIZER("Transcribe speech to text.", add_special_tokens=False)["input_ids"]
    assert answer.num_prompt_tokens == bos + spans + answer.tokens["audio"] + len(words)  # pyright: ignore


def test_a_converted_run_that_is_saved_and_loaded_is_the_same(tmp_path: Path, st_run: Any) -> None:
    _, model, processor = st_run
    save_run(model, processor, tmp_path / "again")
    again, _ = load(tmp_path / "again")
    rows = [([tiny.random_media("audio", 32), "a"], "x"), ([tiny.random_media("video", 10), "a"], "y")]
    batch = tiny.batch(processor, rows, for_training=True)
    expanded = processor.expand(batch, [[Budget.parse("audio=/4,video=/5")] * 2], left_padding=False)
    assert again(**expanded.inputs).logits.equal(model(**expanded.inputs).logits)


def test_every_kind_of_file_gives_the_same_state(tmp_path: Path) -> None:
    state = matrices({"llm.model.norm.weight": (3,), "model.x": (2, 2)})
    torch.save(state, tmp_path / "plain.pth")
    named = {f"model.{name}": value for name, value in state.items()}
    torch.save({"state_dict": named, "hyper_parameters": {"rank": 32}}, tmp_path / "lightning.ckpt")
    save_file(state, tmp_path / "other.safetensors")
    for name in ("plain.pth", "lightning.ckpt", "other.safetensors"):
        stored = read_all(find_state(tmp_path / name))
        assert stored.keys() == state.keys()
        assert all(stored[key].equal(state[key]) for key in state)


def test_a_large_llm_is_written_in_several_files_and_stays_in_its_own_until_then(
    tmp_path: Path, parts: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    state = omni("s")
    largest = max(value.nbytes for name, value in state.items() if name.startswith("llm.model.layers."))
    monkeypatch.setattr("mllm.checkpoints.tensor_files.SHARD_BYTES", 2 * largest)
    model, _, _ = converted(tmp_path, state, parts, "omni-avsr")
    files = sorted((tmp_path / "run" / "llm").glob("*.safetensors"))
    assert len(files) > 2
    written = {name: value for file in files for name, value in load_file(file).items()}
    assert all(value.equal(state[f"llm.{name}"]) for name, value in written.items())
    assert model.model.language_model.norm.weight.equal(state["llm.model.norm.weight"])


def test_llama_avsr_has_one_projector_per_medium_with_or_without_a_norm(tmp_path: Path, parts: dict[str, str]) -> None:
    state = frozen() | loras("s")
    state |= projectors("audio", [4], is_list=False, has_norm=True)
    state |= projectors("video", [2], is_list=False, has_norm=False)
    model, processor, facts = converted(tmp_path, state, parts, "llama-avsr", alpha=4)
    assert facts[:2] == [
        "audio: frames stacked, 4 per token, one projector with LayerNorm",
        "video: frames stacked, 2 per token, one projector without LayerNorm",
    ]
    assert model.state_dict()["model.compressors.audio.projectors.0.3.weight"].equal(state["audio_proj.3.weight"])
    assert [str(amount) for amount in processor.space.media["video"].trained] == ["/2"]
    layer = model.model.language_model.layers[0].self_attn.q_proj
    assert layer.scaling == {"default": 0.5}  # alpha 4 over the reduction of 8 that the shapes tell


def test_llama_avsr_may_take_audio_alone(tmp_path: Path, parts: dict[str, str]) -> None:
    state = {n: v for n, v in (frozen() | loras("s")).items() if not n.startswith("video_encoder.")}
    state |= projectors("audio", [1], is_list=False, has_norm=False)
    _, processor, facts = converted(tmp_path, state, parts, "llama-avsr")
    assert facts[0] == "audio: frames averaged, 3 per token, one projector without LayerNorm"
    assert set(processor.prompts) == {("audio",)}


def test_a_checkpoint_in_bfloat16_gives_the_values_it_holds(tmp_path: Path, parts: dict[str, str]) -> None:
    """As the released ones are. Its LLM is kept as it is; what trains here is float32."""
    state = {name: value.bfloat16() if value.is_floating_point() else value for name, value in omni("s").items()}
    model, _, _ = converted(tmp_path, state, parts, "omni-avsr")
    weights = model.state_dict()
    assert weights["model.compressors.audio.projectors.1.0.weight"].equal(state["audio_proj.1.0.weight"].float())
    assert weights["lm_head.weight"].equal(state["llm.model.embed_tokens.weight"].float())
    with safe_open(tmp_path / "run" / "llm" / "model.safetensors", framework="pt") as file:
        assert file.get_tensor("model.norm.weight").dtype == torch.bfloat16


def test_mtsk_projectors_go_to_their_rates_whatever_their_order(tmp_path: Path, parts: dict[str, str]) -> None:
    state = frozen() | loras("s")
    state |= projectors("audio", [1, 1, 1], is_list=True, has_norm=True)
    state |= projectors("video", [5, 2], is_list=True, has_norm=True)
    model, processor, _ = converted(tmp_path, state, parts, "llama-mtsk", audio_rates=[16, 4, 8])
    weights = model.state_dict()
    assert [str(amount) for amount in processor.space.media["audio"].trained] == ["/4", "/8", "/16"]
    for index, released_index in enumerate((1, 2, 0)):
        name = f"model.compressors.audio.projectors.{index}.3.bias"
        assert weights[name].equal(state[f"audio_proj.{released_index}.3.bias"])
    assert weights["model.compressors.video.projectors.1.0.weight"].equal(state["video_proj.0.0.weight"])


class Harmful:
    """Runs a command when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.mark}",)


def test_code_in_a_checkpoint_is_refused_and_not_run(
    tmp_path: Path, parts: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    mark = tmp_path / "was_run"
    torch.save({"prompt_audio": Harmful(mark)}, tmp_path / "x.pt")
    assert main(["convert", "omni-avsr", str(tmp_path / "x.pt"), "--out", str(tmp_path / "made")]) == 2
    refused = "holds posix.system() at 'prompt_audio' where a tensor is expected; nothing of it was run"
    assert refused in capsys.readouterr().err
    assert not mark.exists()
    assert not (tmp_path / "made").exists()


Q_DOWN = "llm.model.layers.1.self_attn.lora_down_Q.audio.weight"
CHANGES = [
    ({"epoch": torch.zeros(1)}, {}, r"holds unknown epoch \(1 in all\)"),
    ({"llm.model.norm.weight": None}, {}, r"misses llm.model.norm.weight \(1 in all\)"),
    ({"llm.model.norm.weight": torch.ones(3)}, {}, r"norm.weight has the shape \(3,\) in the checkpoint; expected"),
    ({"audio_encoder.conv1.bias": None}, {}, r"misses audio_encoder.conv1.bias"),
    ({"video_encoder.encoder.layers.0.fc1.bias": torch.ones(2)}, {}, r"video_encoder: .* has the shape \(2,\)"),
    ({"video_encoder.encoder.layers.0.self_attn.lora_up_Q.weight": None}, {}, "misses .*lora_up_Q.weight"),
    ({"video_encoder.post_extract_proj.weight": torch.tensor(1.0)}, {}, r"post_extract_proj.weight has the shape \(\)"),
    ({}, {"video_heads": 3}, "num_attention_heads=3 must divide hidden_size=16"),
    ({"prompt_audio": torch.tensor(1.0)}, {}, r"prompt_audio has the shape \(\); expected \(1, tokens, 32\)"),
    ({"audio_proj.1.0.weight": torch.ones(HIDDEN, 17)}, {}, "audio_proj.1.0.weight takes 17 values, no multiple"),
    ({"audio_proj.1.2.bias": torch.ones(3)}, {}, r"audio_proj.1.2.bias has the shape \(3,\)"),
    ({"audio_proj.0.3.weight": torch.ones(WIDTH)}, {}, "misses audio_proj.0.3.bias, audio_proj.1.3"),
    ({"audio_proj.gate.weight": torch.ones(2, 2)}, {}, "holds unknown audio_proj.gate.weight"),
    ({Q_DOWN: None}, {}, "misses llm.model.layers.1.self_attn.lora_down_Q.audio.weight"),
    ({Q_DOWN: torch.ones(INNER, 3)}, {}, r"lora_down_Q.audio.weight has the shape \(4, 3\)"),
    ({Q_DOWN.replace("audio", "smell"): torch.ones(1)}, {}, "LLM's LoRAs end in .*'.smell'"),
    ({"prompt_video": None}, {}, "misses prompt_video"),
    ({"prompt_smell": torch.ones(1, 1, WIDTH)}, {}, "holds unknown prompt_smell"),
    ({"llm.lm_head.weight": torch.ones(865, WIDTH)}, {}, "lm_head.weight differs from .* ties them"),
    ({"llm.model.embed_tokens.weight": torch.ones(870, WIDTH)}, {}, "embeds 870 tokens, but the tokenizer of .* 865"),
    ({}, {"audio_rates": [4]}, r"audio_rates is \[4\], but the checkpoint holds 2 projectors"),
    ({}, {"audio_rates": [4, 4]}, r"audio_rates is \[4, 4\]; rates are whole numbers from 1, each once"),
    ({}, {"reduction": 3}, "reduction is 3, so the LoRAs would be 11 inside, but in the checkpoint they are 4"),
    (
        {},
        {"prompt_audio": "What?"},
        r"prompt_audio in the checkpoint is not 'What\?'; .* '.*text\.' \(option prompt_audio",
    ),
]


@pytest.mark.parametrize(("changed", "chosen", "message"), CHANGES, ids=[change[2][:40] for change in CHANGES])
def test_what_does_not_fit_is_refused_by_name_and_nothing_is_written(
    tmp_path: Path, parts: dict[str, str], changed: dict[str, Any], chosen: dict[str, Any], message: str
) -> None:
    state: dict[str, Any] = {**omni(), **changed}
    save_file({n: v.clone() for n, v in state.items() if v is not None}, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match=message):
        convert_file(tmp_path / "x.safetensors", tmp_path / "run", system="omni-avsr", options=options(parts, **chosen))
    assert not (tmp_path / "run").exists()


def test_stacked_frames_and_the_kind_of_projectors_must_be_those_of_the_system(
    tmp_path: Path, parts: dict[str, str]
) -> None:
    with pytest.raises(ValueError, match=r"audio_rates is \[4, 8\], but the projectors stack 4, 16 frames"):
        converted(tmp_path, omni("s", audio=(4, 16)), parts, "omni-avsr", audio_rates=[4, 8])
    state = {name: value for name, value in omni("s").items() if not name.startswith("prompt_")}
    with pytest.raises(ValueError, match="the audio projector is a list, one per rate; Llama-AVSR has none such"):
        converted(tmp_path, state, parts, "llama-avsr")
    state = {name: value for name, value in omni("t").items() if not name.startswith("prompt_")}
    with pytest.raises(ValueError, match="a LoRA per task, which Llama-MTSK has not"):
        converted(tmp_path, state, parts, "llama-mtsk")


def test_a_file_of_another_kind_is_refused(tmp_path: Path, parts: dict[str, str]) -> None:
    (tmp_path / "x.onnx").write_bytes(b"x")
    (tmp_path / "x.safetensors").write_bytes(b"x" * 100)
    torch.save([1, 2], tmp_path / "x.pt")
    for name, message in (
        ("x.onnx", r"ends in \.onnx; checkpoints end in \.pt"),
        ("x.safetensors", "is no safetensors file, or is cut"),
        ("x.pt", "holds a list where a state dict is expected"),
    ):
        with pytest.raises(ValueError, match=message):
            convert_file(tmp_path / name, tmp_path / "run", system="omni-avsr", options=options(parts))
    with pytest.raises(FileNotFoundError, match=r"there is no checkpoint .*none\.pt"):
        convert_file(tmp_path / "none.pt", tmp_path / "run", system="omni-avsr", options=options(parts))


@pytest.mark.parametrize(("rows", "added"), [(8, True), (7, False)], ids=["llama", "qwen"])
def test_the_tokens_of_the_released_training_get_the_ids_they_had(tmp_path: Path, rows: int, added: bool) -> None:
    """Llama gets a padding token before the four around the media; Qwen has one."""
    vocabulary = {"<s>": 0, "</s>": 1, "a": 2}
    other = Tokenizer(models.WordLevel(vocabulary))  # pyright: ignore[reportCallIssue]
    pad = {} if added else {"pad_token": "</s>"}
    PreTrainedTokenizerFast(tokenizer_object=other, bos_token="<s>", eos_token="</s>", **pad).save_pretrained(tmp_path)
    tokenizer = read_tokenizer(str(tmp_path), rows=rows)
    new = [*(["<pad>"] if added else []), "<audio>", "</audio>", "<video>", "</video>"]
    assert tokenizer.convert_tokens_to_ids(new) == list(range(3, rows))
    assert tokenizer.pad_token == ("<pad>" if added else "</s>")
    with pytest.raises(ValueError, match=r"embeds 6 tokens, but the tokenizer of .* holds 3 and the released"):
        read_tokenizer(str(tmp_path), rows=6)


@pytest.mark.parametrize(("variant", "millions"), [("s", 38.29), ("t", 51.92), ("st", 58.74)])
def test_the_released_layout_has_the_published_number_of_trained_parameters(variant: str, millions: float) -> None:
    """Llama-3.2-1B, Whisper-medium and AV-HuBERT Large."""
    shapes: dict[str, tuple[int, ...]] = {}
    for medium in ("audio", "video"):
        shapes |= Projectors(medium, True, (1, 1), hidden_size=2048, has_norm=False).layout(1024, 2048)
    shapes |= Loras("llm.model.layers.", 16, 64, tuple(EXPERTS[variant])).layout(2048, {"Q": 2048, "V": 512})
    shapes |= Loras("video_encoder.encoder.layers.", 24, 64, ("",)).layout(1024, {"Q": 1024, "V": 1024})
    assert round(sum(math.prod(shape) for shape in shapes.values()) / 1e6, 2) == millions
