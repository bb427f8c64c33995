"""Trains the synthetic audio encoder: transformers' own Whisper encoder, tiny, on self-made speech.

Knows the synthesiser's voices, babble and the Whisper front end. Does not know LLMs, compressors or corpora on disk.

    pretrain_audio(Path("out"), recipe=AUDIO_RECIPE)

writes a folder that `WhisperEncoder.from_pretrained` and `WhisperFeatureExtractor.from_pretrained` read, and the log of
the run beside it. Windows are 5 s (250 frames at 50 Hz) where Whisper's are 30 s; everything else is Whisper's.
Clips are scaled to zero mean and unit variance before the log-mel (`normalize` of a model's audio encoder).
Training hears the train voices only, validation the validation voices; the test voices are heard once, at the end.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import WhisperConfig, WhisperFeatureExtractor
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from mllm.media import Audio
from mllm.synthetic.pretrain.frame_training import (
    IGNORED,
    FrameBatch,
    PhoneClassifier,
    Recipe,
    RunLog,
    frame_phones,
    train_and_measure,
)
from mllm.synthetic.speech.babble import make_babble
from mllm.synthetic.speech.sentences import sample_sentences
from mllm.synthetic.speech.synthesis import SAMPLE_RATE_HZ, Utterance, say
from mllm.synthetic.speech.voices import random_speaker
from mllm.transforms.encoder_inputs import standardize
from mllm.transforms.noise import MixNoise

AUDIO_RECIPE = Recipe(
    steps=2000, seed=0, batch_clips=16, learning_rate=3e-3, warmup_steps=100, validate_every_steps=250
)
WINDOW_SECONDS = 5
FRAMES_PER_SECOND = 50
TRAIN_SNRS_DB: tuple[float | None, ...] = (None, None, 10.0, 5.0, 0.0, -5.0)
TEST_SNRS_DB: tuple[float | None, ...] = (None, 10.0, 5.0, 0.0, -5.0)
_WINDOW_SAMPLES = WINDOW_SECONDS * SAMPLE_RATE_HZ
_WINDOW_FRAMES = WINDOW_SECONDS * FRAMES_PER_SECOND


def pretrain_audio(
    out: Path,
    *,
    recipe: Recipe = AUDIO_RECIPE,
    num_utterances: int = 5000,
    num_test_utterances: int = 150,
    babble_seconds: float = 300,
) -> dict[str, float]:
    """Train, measure on held-out voices and write `out/audio` and `out/log_audio.jsonl`.

    Args:
        out: folder to write into.
        recipe: steps, seed and rates of the training.
        num_utterances: how many different utterances are heard in training.
        num_test_utterances: how many the accuracy is measured on; half as many of the validation split.
        babble_seconds: length of the training noise; a fifth of it of the noise of the other splits.

    Returns:
        frame accuracy in percent on the test voices per noise level ("clean", "10 dB", ...).
    """
    torch.manual_seed(recipe.seed)
    log = RunLog(out / "log_audio.jsonl")
    extractor = build_extractor()
    model = PhoneClassifier(build_audio_encoder())
    train = speak("train", num_utterances, seed=recipe.seed)
    babble = make_babble("train", seconds=babble_seconds, seed=recipe.seed)
    mix = MixNoise(Audio(babble, SAMPLE_RATE_HZ), TRAIN_SNRS_DB)

    def training_batch(generator: np.random.Generator) -> FrameBatch:
        windows = [_training_window(train, mix, generator) for _ in range(recipe.batch_clips)]
        return _to_batch(windows, extractor)

    def held_out(split: str) -> dict[str, list[FrameBatch]]:
        count = num_test_utterances if split == "test" else num_test_utterances // 2
        return measured_audio(split, count, seed=recipe.seed, babble_seconds=babble_seconds / 5)

    result = train_and_measure(model, training_batch, held_out, out / "audio", recipe=recipe, log=log)
    extractor.save_pretrained(out / "audio")
    return result


def build_audio_encoder() -> WhisperEncoder:
    """Make an untrained tiny Whisper encoder whose attention starts local, see `_start_local`."""
    config = WhisperConfig(
        d_model=144,
        encoder_layers=4,
        encoder_attention_heads=4,
        encoder_ffn_dim=256,
        num_mel_bins=80,
        max_source_positions=_WINDOW_FRAMES,
        # The decoder is never built; its sizes are small so that the config describes no giant.
        decoder_layers=1,
        decoder_attention_heads=4,
        decoder_ffn_dim=256,
        vocab_size=64,
        max_target_positions=32,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
        suppress_tokens=None,
        begin_suppress_tokens=None,
    )
    encoder = WhisperEncoder(config)
    _start_local(encoder)
    return encoder


def speak(split: str, count: int, *, seed: int) -> list[Utterance]:
    """Speak `count` sentences of a split, each by a random speaker of it."""
    generator = np.random.default_rng([seed, count])
    sentences = sample_sentences(count, split=split, seed=seed)
    return [say(sentence, random_speaker(split, generator)) for sentence in sentences]


def build_extractor() -> WhisperFeatureExtractor:
    """Make Whisper's log-mel extractor for windows of 5 s."""
    return WhisperFeatureExtractor(feature_size=80, sampling_rate=SAMPLE_RATE_HZ, chunk_length=WINDOW_SECONDS)


def measured_audio(split: str, count: int, *, seed: int, babble_seconds: float = 60) -> dict[str, list[FrameBatch]]:
    """Make the utterances of a held-out split, alone in their windows, by noise level ("clean", "10 dB", ...)."""
    extractor = build_extractor()
    utterances = speak(split, count, seed=seed)
    babble = Audio(make_babble(split, seconds=babble_seconds, seed=seed), SAMPLE_RATE_HZ)
    levels: dict[str, list[FrameBatch]] = {}
    for snr_db in TEST_SNRS_DB:
        mix, generator = MixNoise(babble, (snr_db,)), np.random.default_rng(seed)
        windows: list[Window] = []
        for utterance in utterances:
            labels = np.full(_WINDOW_FRAMES, IGNORED)
            named = _labels(utterance)
            labels[: len(named)] = named
            noisy = mix(Audio(utterance.samples, SAMPLE_RATE_HZ), generator)
            windows.append((standardize(noisy.samples, epsilon=1e-8), labels))
        batches = [_to_batch(windows[start : start + 50], extractor) for start in range(0, count, 50)]
        levels["clean" if snr_db is None else f"{snr_db:g} dB"] = batches
    return levels


@torch.no_grad()
def _start_local(encoder: WhisperEncoder) -> None:
    """Let every head start by looking a few frames to one side: a speech frame is named by its neighbours.

    Whisper has no relative positions, but sines and cosines of one position turn into those of another by a rotation,
    so queries that copy the fast (sine, cosine) pairs and keys that copy them rotated attend at a fixed distance.
    """
    size, heads = encoder.config.d_model, encoder.config.encoder_attention_heads
    pairs = size // heads // 2
    speeds = torch.exp(-math.log(10_000) / (size // 2 - 1) * torch.arange(pairs))
    layers: list[Any] = list(encoder.layers)
    for depth, layer in enumerate(layers, start=1):
        distances = (-2 * depth, -depth, depth, 2 * depth)
        still = torch.zeros(pairs)
        layer.self_attn.q_proj.weight.copy_(torch.cat([_rotation(still, size) for _ in distances]))
        layer.self_attn.k_proj.weight.copy_(torch.cat([_rotation(-far * speeds, size) for far in distances]))


def _rotation(angles: Tensor, size: int) -> Tensor:
    """Make weights (2 * pairs, size) that take the first (sine, cosine) pairs of a Whisper position and turn each."""
    pairs, first_cosine = len(angles), size // 2
    pair = torch.arange(pairs)
    weight = torch.zeros(2 * pairs, size)
    weight[pair, pair], weight[pair, first_cosine + pair] = angles.cos(), angles.sin()
    weight[pairs + pair, pair], weight[pairs + pair, first_cosine + pair] = -angles.sin(), angles.cos()
    return weight


Window = tuple[np.ndarray, np.ndarray]  # samples (L,) of at most one window, labels (_WINDOW_FRAMES,)


def _training_window(train: Sequence[Utterance], mix: MixNoise, generator: np.random.Generator) -> Window:
    """Make one utterance, or as many as fill the window (so that late positions are trained too), with noise, level and
    tilt."""
    fills_window = generator.random() < 0.65
    pieces: list[np.ndarray] = []
    labels = np.full(_WINDOW_FRAMES, IGNORED)
    used_samples = 0
    while used_samples < _WINDOW_SAMPLES and (fills_window or not pieces):
        utterance = train[int(generator.integers(len(train)))]
        start_frame = round(used_samples / SAMPLE_RATE_HZ * FRAMES_PER_SECOND)
        named = _labels(utterance)[: _WINDOW_FRAMES - start_frame]
        labels[start_frame : start_frame + len(named)] = named
        pieces.append(utterance.samples)
        used_samples += len(utterance.samples)
    speech = np.concatenate(pieces)[:_WINDOW_SAMPLES]
    noisy = mix(Audio(speech, SAMPLE_RATE_HZ), generator).samples
    tilted = noisy - generator.uniform(-0.3, 0.5) * np.concatenate([[0], noisy[:-1]])
    gain = 10 ** (generator.uniform(-6, 6) / 20)
    return (gain * standardize(tilted, epsilon=1e-8)).astype(np.float32), labels


def _labels(utterance: Utterance) -> np.ndarray:
    num_frames = int(utterance.seconds * FRAMES_PER_SECOND)
    return frame_phones(utterance.phones, num_frames, frames_per_second=FRAMES_PER_SECOND, centre=0.0)


def _to_batch(windows: Sequence[Window], extractor: WhisperFeatureExtractor) -> FrameBatch:
    mel = extractor([samples for samples, _ in windows], sampling_rate=SAMPLE_RATE_HZ, return_tensors="pt")
    labels = torch.from_numpy(np.stack([labels for _, labels in windows]))
    return FrameBatch({"input_features": mel.input_features}, labels)
