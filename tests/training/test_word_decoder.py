"""What a speech model's decoder says of features: equal to its own cross-attention, and a word that nobody taught."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor
from transformers import WhisperConfig, WhisperForConditionalGeneration, WhisperModel
from transformers.models.whisper.modeling_whisper import WhisperEncoder
from word_lessons import NAMES, Planted, counted, teach

from mllm.config.run import RunConfig, read_run_config
from mllm.training.initialization.word_choice import choose_words, spoken
from mllm.training.initialization.word_decoder import WordDecoder, read_word_decoder


def whisper(folder: Path, model_class: Any) -> Any:
    """A small whole Whisper with random weights, saved with a tokenizer of its own size."""
    torch.manual_seed(0)
    config = WhisperConfig(
        **{
            **tiny.encoder_configs()["audio"].to_dict(),
            "decoder_layers": 3,
            "vocab_size": len(tiny.TOKENIZER),
            "pad_token_id": 0,
            "bos_token_id": 0,
            "eos_token_id": 0,
            "decoder_start_token_id": 0,
        }
    )
    model = model_class(config).eval()
    for name, value in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(value)
    model.save_pretrained(folder)
    tiny.TOKENIZER.save_pretrained(folder)
    return model


@pytest.mark.parametrize("model_class", [WhisperForConditionalGeneration, WhisperModel])
def test_a_decoder_reads_one_feature_as_its_own_cross_attention_does(tmp_path: Path, model_class: Any) -> None:
    """Where there is one feature to attend to, attention is that feature whatever asks for it."""
    model = whisper(tmp_path, model_class)
    read = read_word_decoder(str(tmp_path))
    decoder = model.get_decoder()
    feature, question = torch.randn(1, 1, 16), torch.randn(1, 1, 16)
    with torch.no_grad():
        written = sum(layer.encoder_attn(question, key_value_states=feature)[0] for layer in decoder.layers)
        assert isinstance(written, Tensor)
        torch.testing.assert_close(feature @ read.weight.T + read.bias, written)
    for mine, own in zip(read.norm, (decoder.layer_norm.weight, decoder.layer_norm.bias), strict=True):
        assert mine.equal(own)
    [red] = tiny.TOKENIZER(" red", add_special_tokens=False)["input_ids"]
    assert read.rows[" red"] == red
    assert read.embeddings[red].equal(decoder.embed_tokens.weight[red])
    assert not set(tiny.TOKENIZER.all_special_tokens) & read.rows.keys()


def test_what_is_no_whole_whisper_is_refused(tmp_path: Path) -> None:
    tiny.encoder_configs()["image"].save_pretrained(tmp_path / "image")
    with pytest.raises(
        ValueError, match=r"train.word_decoder .*image is a clip_vision_model; allowed: a whole Whisper"
    ):
        read_word_decoder(str(tmp_path / "image"))
    WhisperEncoder(WhisperConfig(**tiny.encoder_configs()["audio"].to_dict())).save_pretrained(tmp_path / "encoder")
    tiny.TOKENIZER.save_pretrained(tmp_path / "encoder")
    with pytest.raises(ValueError, match=r"embed_tokens.weight"):
        read_word_decoder(str(tmp_path / "encoder"))


def decoder_of(words: list[str]) -> WordDecoder:
    """A decoder of the planted encoder, which says each word by a vector of its own; the last one is never planted."""
    planted = Planted().said.detach()
    other = torch.randn(len(words) - len(planted), 16, generator=torch.Generator().manual_seed(1)) * 2
    said = torch.cat([planted, other])
    norm = (torch.ones(16), torch.zeros(16))
    return WordDecoder(torch.eye(16), torch.zeros(16), norm, said, {f" {word}": row for row, word in enumerate(words)})


def test_a_word_that_no_caption_holds_is_heard(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, "mllm")
    decoder = decoder_of([*NAMES, "bird"])
    model, processor = teach(num_steps=30, decoder=decoder, num_words=21)
    projector = model.model.compressors["audio"].projectors[0]
    counts = counted(processor, range(60))
    spelled = choose_words(
        counts, processor.tokenizer, projector.num_words, known=lambda word: spoken(word, "Ġ") in decoder.rows
    )
    [bird] = processor.tokenizer(" bird", add_special_tokens=False)["input_ids"]
    assert bird not in counts
    number = spelled.words.index(bird) + 1
    silence = torch.full((4, 16), 0.1)
    clip = torch.cat([silence, decoder.embeddings[4].expand(4, 16), silence])
    assert projector.scores(clip[None]).argmax(-1)[0].tolist() == [0, 0, number, number, 0, 0]
    assert "audio: train.word_decoder does not know" in caplog.text  # single characters
    heard = projector.word_table.heard
    assert heard.weight[number - 1].equal(decoder.embeddings[4])
    assert not any(value.requires_grad for value in projector.word_table.parameters())


def test_a_decoder_of_other_features_and_too_many_words_are_refused() -> None:
    decoder = decoder_of(NAMES)
    wide = WordDecoder(torch.eye(8), torch.zeros(8), decoder.norm, decoder.embeddings, decoder.rows)
    with pytest.raises(
        ValueError, match=r"train.word_decoder reads features of 8 numbers, and those of model.audio.encoder have 16"
    ):
        teach(num_steps=1, decoder=wide, num_words=19)
    with pytest.raises(
        ValueError,
        match=r"num_words is 99; the LLM and train.word_decoder share \d+ tokens of the captions' characters",
    ):
        teach(num_steps=1, decoder=decoder, num_words=99)


def test_what_is_said_of_words_needs_words_and_captions() -> None:
    mlp, words = {"projector": "mlp"}, {"projector": "words"}
    assert tiny_run(words, word_decoder="w").train.word_decoder == "w"
    for key, value in {"word_decoder": "w", "word_steps": 5, "word_learning_rate": 0.1}.items():
        with pytest.raises(ValueError, match=rf"train.{key} is {value}, but no model.audio or model.video has a proj"):
            tiny_run(mlp, **{key: value})
        with pytest.raises(ValueError, match=rf"train.{key} is {value}, but data.captions names no manifest"):
            tiny_run(words, captions=[], start_from="r", **{key: value})
    with pytest.raises(ValueError, match=r"train.word_learning_rate is 0.0; it must be above 0"):
        tiny_run(words, word_learning_rate=0)
    lips = {"encoder": "v", "projector": "words", "budgets": ["/2"]}
    assert tiny_run(mlp, video=lips, word_steps=5).train.word_steps == 5
    with pytest.raises(ValueError, match=r"train.word_decoder is w, but model.audio has no projector of kind words"):
        tiny_run(mlp, video=lips, word_decoder="w")


def tiny_run(
    audio: dict[str, Any], *, video: dict[str, Any] | None = None, captions: Sequence[str] = ("t",), **train: Any
) -> RunConfig:
    """A run config of audio, and of lips where they are given."""
    media = {"audio": {"encoder": "w", "budgets": ["/4"], **audio}} | ({} if video is None else {"video": video})
    data = {"train": ["t"], "captions": list(captions)}
    return read_run_config(
        {"model": {"llm": "l", **media}, "data": data, "train": {"out": "o", "max_steps": 1, **train}}
    )
