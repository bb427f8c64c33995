"""AV-HuBERT as an audio encoder: from a folder that was written for lips to answers about audio."""

import dataclasses
from pathlib import Path

import pytest
import soundfile
import tiny
import torch

from mllm.budget import Budget
from mllm.checkpoints.build import build
from mllm.checkpoints.load import load, save_run
from mllm.config.medium import with_source
from mllm.config.model import ModelConfig
from mllm.data.manifest import Media, Message, Sample, Text
from mllm.encoders import AVHubertEncoder, backbone_config, wrap_encoder
from mllm.model.trainables import set_trainables
from mllm.transforms.filterbank import num_stacked_frames, stacked_filterbank

AV_HUBERT = tiny.encoder_configs()["video"]


@torch.no_grad()
def test_audio_in_a_batch_equals_the_audio_alone_and_the_network_itself() -> None:
    torch.manual_seed(0)
    network = AVHubertEncoder(AV_HUBERT).eval()
    clips = [torch.randn(length).numpy() * 0.1 for length in (9000, 5000, 401)]
    frames = [torch.from_numpy(stacked_filterbank(clip)) for clip in clips]
    expected = [network(audio=features_alone[None])[0] for features_alone in frames]
    listener = wrap_encoder(AVHubertEncoder(backbone_config(AV_HUBERT, "audio"))).eval()
    listener.backbone.load_state_dict(network.state_dict(), strict=False)
    batch = torch.nn.utils.rnn.pad_sequence(frames, batch_first=True, padding_value=7.0)
    features, counts = listener(batch, torch.tensor([len(clip) for clip in clips]))
    assert (
        counts.tolist()
        == [num_stacked_frames(len(clip)) for clip in clips]
        == [len(features_alone) for features_alone in expected]
    )
    for item, features_alone in enumerate(expected):
        torch.testing.assert_close(features[item, : len(features_alone)], features_alone, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="cut to read audio alone"):
        listener.backbone(video=torch.zeros(1, 2, 1, 32, 32))


def listening_settings(folder: Path) -> ModelConfig:
    parts = tiny.write_parts(folder)
    config = tiny.settings_on(parts, ("audio", "video"))
    assert config.audio is not None
    audio = with_source(config.audio, parts["video"])
    return dataclasses.replace(config, audio=dataclasses.replace(audio, budgets=["/2", "/4"]))


def test_one_folder_serves_lips_and_audio_and_a_run_is_the_same_after_loading(tmp_path: Path) -> None:
    model, processor = build(listening_settings(tmp_path / "parts"))
    set_trainables(model, ("compressors", "adapter"))
    names = tiny.write_media(tmp_path / "media", seconds=0.8)
    parts = (Media("audio", names["audio"]), Media("video", names["video"]), Text("transcribe."))
    sample = Sample("one", (Message("user", parts),), task="avsr", root=tmp_path / "media")
    inputs = processor([sample], Budget.parse("audio=/4,video=/2"))
    num_samples = soundfile.info(tmp_path / "media" / names["audio"]).frames
    assert inputs["num_audio_tokens"].tolist() == [num_stacked_frames(num_samples) // 4]
    with torch.no_grad():
        before = model.eval()(**inputs).logits
        save_run(model, processor, tmp_path / "run")
        again, processor = load(tmp_path / "run")
        after = again.eval()(**processor([sample], Budget.parse("audio=/4,video=/2"))).logits
    torch.testing.assert_close(after, before)


def test_normalised_twice_is_refused(tmp_path: Path) -> None:
    config = listening_settings(tmp_path)
    assert config.audio is not None
    encoder = dataclasses.replace(config.audio.encoder, normalize=True)
    twice = dataclasses.replace(config, audio=dataclasses.replace(config.audio, encoder=encoder))
    with pytest.raises(ValueError, match=r"model.audio.encoder.normalize is True .* it does not go with AV-HuBERT"):
        build(twice)
