"""Whisper without padding: a clip gives what the library's encoder gives with as many positions as it has frames."""

from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, WhisperConfig, WhisperFeatureExtractor
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from mllm.checkpoints.audio_padding import set_audio_padding
from mllm.checkpoints.build import build
from mllm.checkpoints.load import load, load_for, save_run
from mllm.config.medium import AudioEncoderConfig
from mllm.config.model_options import ModelOptions
from mllm.config.reading import ConfigError, read
from mllm.config.run import RunConfig
from mllm.encoders import build_encoder, encoder_facts
from mllm.evaluation.flops import Item, encoder_flops
from mllm.inference.answerer import Answerer, Decoding
from mllm.media import Audio
from mllm.model.trainables import set_trainables
from mllm.testing.encoders import EncoderCase, check_encoder
from mllm.transforms.encoder_inputs import WhisperMel

UNPADDED = AudioEncoderConfig(source="", padding="none", untrained_padding=True)
CONFIG = WhisperConfig(
    d_model=32,
    encoder_layers=2,
    encoder_attention_heads=4,
    encoder_ffn_dim=64,
    num_mel_bins=80,
    max_source_positions=50,
    initializer_range=0.3,
)
EXTRACTOR = WhisperFeatureExtractor(feature_size=80, chunk_length=1)


def random_audio(num_samples: int, seed: int = 0) -> Audio:
    rng = np.random.default_rng(seed)
    return Audio((0.1 * rng.standard_normal(num_samples)).astype(np.float32), 16_000)


def cut_library_encoder(whole: WhisperEncoder, num_positions: int) -> WhisperEncoder:
    """Whisper's encoder of the library with fewer positions, as a checkpoint that was cut has them."""
    cut = WhisperEncoder(WhisperConfig(**{**CONFIG.to_dict(), "max_source_positions": num_positions}))
    weights = dict(whole.state_dict())
    weights["embed_positions.weight"] = weights["embed_positions.weight"][:num_positions]
    cut.load_state_dict(weights)
    return cut.eval()


def encoder() -> torch.nn.Module:
    torch.manual_seed(0)
    return build_encoder("audio", CONFIG, UNPADDED).eval()


@torch.no_grad()
def test_clips_of_a_batch_give_what_the_library_gives_each_alone() -> None:
    made, mel = encoder(), WhisperMel(EXTRACTOR, pads=False)
    lengths = [16_000, 9_700, 320, 6_399]
    values: list[Tensor] = [mel(random_audio(length, seed))[0] for seed, length in enumerate(lengths)]
    padded = torch.nn.utils.rnn.pad_sequence(values, batch_first=True, padding_value=3.0)
    features, num_frames = made(padded, torch.tensor(lengths))
    assert num_frames.tolist() == [50, 30, 1, 19] == [encoder_facts(CONFIG, UNPADDED).num_frames(n) for n in lengths]
    for row, (length, frames) in enumerate(zip(lengths, num_frames.tolist(), strict=True)):
        library = cut_library_encoder(made.backbone, frames)
        window = EXTRACTOR(random_audio(length, row).samples, sampling_rate=16_000, return_tensors="pt").input_features
        expected = library(window[:, :, : 2 * frames]).last_hidden_state[0]
        torch.testing.assert_close(features[row, :frames], expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_a_full_window_is_that_of_the_padded_encoder() -> None:
    made = encoder()
    padded = build_encoder("audio", CONFIG, AudioEncoderConfig(source="")).eval()
    padded.load_state_dict(made.state_dict())
    audio = random_audio(16_000)
    without, with_padding = WhisperMel(EXTRACTOR, pads=False)(audio)[0], WhisperMel(EXTRACTOR)(audio)[0]
    length = torch.tensor([16_000])
    torch.testing.assert_close(made(without[None], length)[0], padded(with_padding[None], length)[0])


def test_it_keeps_the_contract_of_encoders() -> None:
    inputs = [torch.randn(2 * frames, 80) for frames in (7, 20)]
    case = EncoderCase(encoder(), encoder_facts(CONFIG, UNPADDED), inputs, [7 * 320, 20 * 320 + 5])  # type: ignore[arg-type]
    check_encoder(case)


def test_what_is_not_padded_is_not_counted() -> None:
    whole = encoder_flops(CONFIG, Item("audio", 10, 4), AudioEncoderConfig(source=""))
    assert encoder_flops(CONFIG, Item("audio", 50, 4), UNPADDED) == whole
    assert encoder_flops(CONFIG, Item("audio", 10, 4), UNPADDED) < whole / 5


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was trained with whole windows, an audio of 0.6 seconds, and the parts it stands on."""
    made = tmp_path_factory.mktemp("padding")
    parts = tiny.write_parts(made / "parts", initializer_range=0.3)
    model, processor = build(tiny.settings_on(parts, ("audio",)))
    set_trainables(model)
    save_run(model, processor, made / "run")
    tiny.write_media(made, seconds=0.6)
    return made / "run"


@torch.no_grad()
def test_a_cut_checkpoint_hears_padded_what_the_whole_one_hears_unpadded(run: Path, tmp_path: Path) -> None:
    """A checkpoint of 50 positions has a window of one second, as long as the clip; the whole one has 100."""
    parts = {name: str(run.parent / "parts" / name) for name in ("llm", "audio")}
    weights = load_file(run.parent / "parts" / "audio" / "model.safetensors")
    name = next(key for key in weights if key.endswith("embed_positions.weight"))
    more = torch.randn(50, weights[name].shape[1], generator=torch.Generator().manual_seed(0))
    whole = tmp_path / "audio"
    whole.mkdir()
    save_file(
        {**weights, name: torch.cat([weights[name], more])}, whole / "model.safetensors", metadata={"format": "pt"}
    )
    config = AutoConfig.from_pretrained(parts["audio"])
    config.max_source_positions = 100
    config.save_pretrained(whole)
    WhisperFeatureExtractor(feature_size=80, chunk_length=2).save_pretrained(whole)
    audio = tiny.write_media(tmp_path, seconds=1.0)["audio"]
    unpadded = {"audio": {"encoder": {"padding": "none", "untrained_padding": True}}}
    answers = []
    for sources, changes in ((parts, {}), ({**parts, "audio": str(whole)}, unpadded)):
        model, processor = build(tiny.settings_on(sources, ("audio",), **changes))
        answerer = Answerer(model.eval(), processor, Decoding(max_new_tokens=8))
        answers.append(answerer("what is said?", audio=str(tmp_path / audio), budget="audio=/4"))
    cut_answer, answer = answers
    assert (answer.text, answer.tokens) == (cut_answer.text, cut_answer.tokens)
    assert answer.mean_log_probability == pytest.approx(cut_answer.mean_log_probability, rel=1e-4)


def test_a_loaded_model_pads_as_it_was_trained_unless_asked(run: Path, tmp_path: Path) -> None:
    options = ModelOptions(model=str(run), audio_padding="none")
    with pytest.raises(ValueError, match=r"was trained with window.*untrained_padding true does it nevertheless"):
        load_for(options)
    with pytest.raises(ValueError, match="untrained_padding is true; it goes with an audio_padding"):
        load_for(ModelOptions(model=str(run), untrained_padding=True))
    asked = load_for(ModelOptions(model=str(run), audio_padding="none", untrained_padding=True))
    model, processor = load(run)
    heard = {"audio": str(run.parent / "0.wav"), "budget": "audio=/4"}
    few = Decoding(max_new_tokens=4)
    answers = [Answerer(*loaded, few)("what?", **heard) for loaded in ((model, processor), asked)]
    assert answers[0].tokens == answers[1].tokens
    assert answers[0].mean_log_probability != answers[1].mean_log_probability
    set_trainables(asked[0])
    save_run(*asked, tmp_path / "again")  # a run that was trained without padding goes on without
    again = Answerer(*load_for(ModelOptions(model=str(tmp_path / "again"), audio_padding="none")), few)
    assert again("what?", **heard).mean_log_probability == pytest.approx(answers[1].mean_log_probability)
    set_audio_padding(*asked, "window", untrained_padding=True)
    back = Answerer(*asked, few)("what?", **heard)
    assert back.mean_log_probability == pytest.approx(answers[0].mean_log_probability)


def test_models_that_do_not_pad_are_told() -> None:
    images = tiny.settings(("image",))
    with pytest.raises(ValueError, match="audio_padding is none, but this model takes no audio"):
        set_audio_padding(tiny.model(images), tiny.processor(images), "none", untrained_padding=True)


def run_config(encoder: dict[str, object], parts: list[str] | None = None) -> RunConfig:
    audio = {"encoder": {"source": "whisper", **encoder}, "compressor": "pool", "budgets": ["/4"]}
    train = {"out": "runs/x", "max_steps": 1, **({} if parts is None else {"parts": parts})}
    return read(RunConfig, {"model": {"llm": "llm", "audio": audio}, "data": {"train": ["t.jsonl"]}, "train": train})


def test_training_without_padding_wants_an_encoder_that_learns() -> None:
    with pytest.raises(ValueError, match=r"padding is none, and the encoder stays frozen.*untrained_padding"):
        run_config({"padding": "none"})
    run_config({"padding": "none", "untrained_padding": True})
    run_config({"padding": "none"}, ["audio", "compressors"])
    run_config({"padding": "none", "adapter": {"rank": 2}}, ["adapter", "compressors"])
    with pytest.raises(ConfigError, match="untrained_padding is true; it goes with padding none"):
        run_config({"untrained_padding": True})
    with pytest.raises(ConfigError, match="padding is none, and released_cut counts frames of silence"):
        run_config({"padding": "none", "released_cut": True, "untrained_padding": True})
