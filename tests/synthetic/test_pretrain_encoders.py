"""What the training of the speech encoders promises: labels in step with features, a start that looks sideways, files
that transformers loads, and (slow) the accuracy that the shipped log states."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import WhisperFeatureExtractor
from transformers.models.whisper.modeling_whisper import WhisperEncoder

import mllm.synthetic
from mllm.encoders.av_hubert import AVHubertEncoder
from mllm.synthetic.pretrain.audio import build_audio_encoder, measured_audio, pretrain_audio
from mllm.synthetic.pretrain.frame_training import (
    PHONE_HEAD_FILE,
    PhoneClassifier,
    Recipe,
    frame_accuracy,
    frame_phones,
)
from mllm.synthetic.pretrain.lips import build_lip_encoder, measured_lips, pretrain_lips
from mllm.synthetic.speech.phones import PHONE_IDS

ASSETS = Path(mllm.synthetic.__file__).parent / "assets"
QUICK = Recipe(steps=2, seed=3, batch_clips=2, warmup_steps=1, log_every_steps=1, validate_every_steps=10)


def test_a_frame_is_named_by_the_phone_spoken_at_its_time() -> None:
    phones = [("sil", 0.0, 0.1), ("aa", 0.1, 0.2), ("b", 0.2, 0.24)]
    named = frame_phones(phones, 6, frames_per_second=25, centre=0.5)  # at 0.02, 0.06, 0.10, 0.14, 0.18, 0.22
    assert named.tolist() == [PHONE_IDS[symbol] for symbol in ("sil", "sil", "aa", "aa", "aa", "b")]
    beyond = frame_phones(phones, 9, frames_per_second=25, centre=0.5)
    assert beyond[6:].tolist() == [PHONE_IDS["b"]] * 3


def test_the_audio_encoder_starts_by_looking_a_few_frames_aside() -> None:
    encoder = build_audio_encoder()
    places = encoder.embed_positions.weight
    for depth, layer in enumerate(encoder.layers, start=1):
        queries, keys = (projection(places) for projection in (layer.self_attn.q_proj, layer.self_attn.k_proj))
        scores = torch.einsum("qhd,khd->hqk", queries.unflatten(1, (4, 36)), keys.unflatten(1, (4, 36)))
        looked_at = scores.argmax(dim=-1) - torch.arange(250)
        assert looked_at[:, 20:-20].unique(dim=1).flatten().tolist() == [-2 * depth, -depth, depth, 2 * depth]


@pytest.mark.slow
def test_a_run_writes_what_transformers_loads_and_the_same_again(tmp_path: Path) -> None:
    for name in ("first", "second"):
        pretrain_audio(tmp_path / name, recipe=QUICK, num_utterances=3, num_test_utterances=2, babble_seconds=3)
        pretrain_lips(tmp_path / name, recipe=QUICK, num_utterances=4, num_test_utterances=2)
    audio = WhisperEncoder.from_pretrained(tmp_path / "first/audio", dtype="auto")
    lips = AVHubertEncoder.from_pretrained(tmp_path / "first/lips", dtype="auto")
    assert audio.dtype == lips.dtype == torch.float32
    assert WhisperFeatureExtractor.from_pretrained(tmp_path / "first/audio").n_samples == 5 * 16_000
    for part in ("audio", "lips"):
        weights = [(tmp_path / name / part / "model.safetensors").read_bytes() for name in ("first", "second")]
        assert weights[0] == weights[1], "a run is a function of its seed"
        rows = [json.loads(line) for line in (tmp_path / f"first/log_{part}.jsonl").read_text().splitlines()]
        assert [row["event"] for row in rows] == ["start", "train", "train", "validation", "test"]
        assert rows[0]["recipe"]["seed"] == 3


@pytest.mark.parametrize("part", ["audio", "lips"])
def test_shipped_weights_are_small(part: str) -> None:
    assert sum(file.stat().st_size for file in (ASSETS / part).iterdir()) <= 1.65e6


@pytest.mark.slow
@pytest.mark.parametrize("part", ["audio", "lips"])
def test_shipped_encoders_are_as_good_as_their_log_says(part: str) -> None:
    stated = json.loads((ASSETS / f"log_{part}.jsonl").read_text().splitlines()[-1])
    model = PhoneClassifier(build_audio_encoder() if part == "audio" else build_lip_encoder())
    model.encoder = type(model.encoder).from_pretrained(ASSETS / part, dtype=torch.float32)
    model.head.load_state_dict({k: v.float() for k, v in load_file(ASSETS / part / PHONE_HEAD_FILE).items()})
    measured = measured_audio("test", 40, seed=0) if part == "audio" else measured_lips("test", 40, seed=0)
    for level, batches in measured.items():
        assert frame_accuracy(model, batches) == pytest.approx(stated[level], abs=5), level
