"""Trains the synthetic lip encoder: the AV-HuBERT architecture, small, on drawn mouths.

Knows the drawn lips and what the encoder wants to be fed. Does not know audio, LLMs, compressors or corpora on disk.

    pretrain_lips(Path("out"), recipe=LIP_RECIPE)

writes a folder that `AVHubertEncoder.from_pretrained` reads, and the log of the run beside it. Images are 48 x 48
gray, of which the encoder sees 44 x 44 (the middle at use, anywhere in training). The batch norms learn here and never
again. Faces, voices and sentences of the validation and test splits are not those of training; the test split is seen
once, at the end.

Shapes: N clips, T frames of the longest clip, H x W pixels.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from mllm.encoders.av_hubert import AVHubertConfig, AVHubertEncoder
from mllm.synthetic.pretrain.frame_training import (
    IGNORED,
    FrameBatch,
    PhoneClassifier,
    Recipe,
    RunLog,
    frame_phones,
    train_and_measure,
)
from mllm.synthetic.speech.lips import LIP_FRAMES_PER_SECOND, draw_lips
from mllm.synthetic.speech.sentences import sample_sentences
from mllm.synthetic.speech.synthesis import say
from mllm.synthetic.speech.voices import random_speaker
from mllm.transforms.encoder_inputs import LIP_MEAN, LIP_STD

LIP_RECIPE = Recipe(steps=1400, seed=0, batch_clips=12, learning_rate=2e-3, warmup_steps=100, validate_every_steps=250)
CROP_PIXELS = 44


@dataclass(frozen=True)
class Clip:
    """One clip: lip images (T, H, W) uint8 and the phone class of each (T,) int64."""

    frames: np.ndarray
    labels: np.ndarray


def pretrain_lips(
    out: Path, *, recipe: Recipe = LIP_RECIPE, num_utterances: int = 4000, num_test_utterances: int = 150
) -> dict[str, float]:
    """Train, measure on held-out faces and voices and write `out/lips` and `out/log_lips.jsonl`.

    Args:
        out: folder to write into.
        recipe: steps, seed and rates of the training.
        num_utterances: how many different films are seen in training.
        num_test_utterances: how many the accuracy is measured on; half as many of the validation split.

    Returns:
        {"frame_accuracy": percent of the spoken frames of the test split whose phone is named}.
    """
    torch.manual_seed(recipe.seed)
    log = RunLog(out / "log_lips.jsonl")
    model = PhoneClassifier(build_lip_encoder())
    train = film("train", num_utterances, seed=recipe.seed)

    def training_batch(generator: np.random.Generator) -> FrameBatch:
        return to_batch([_augment(clip, generator) for clip in _clips_of_like_length(train, recipe, generator)])

    def held_out(split: str) -> dict[str, list[FrameBatch]]:
        count = num_test_utterances if split == "test" else num_test_utterances // 2
        return measured_lips(split, count, seed=recipe.seed)

    return train_and_measure(model, training_batch, held_out, out / "lips", recipe=recipe, log=log)


def build_lip_encoder() -> AVHubertEncoder:
    """Make an untrained AV-HuBERT of 0.7 M parameters."""
    config = AVHubertConfig(
        hidden_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=256,
        resnet_channels=(8, 16, 32, 64),
        num_conv_pos_embeddings=32,
        num_conv_pos_embedding_groups=8,
        hidden_dropout=0.05,
        attention_dropout=0.05,
        activation_dropout=0.05,
        frames_per_second=LIP_FRAMES_PER_SECOND,
    )
    return AVHubertEncoder(config)


def film(split: str, count: int, *, seed: int) -> list[Clip]:
    """Film `count` sentences of a split, each by a random speaker of it, as labelled lip images, shortest first."""
    generator = np.random.default_rng([seed, count])
    clips = []
    for sentence in sample_sentences(count, split=split, seed=seed):
        speaker = random_speaker(split, generator)
        utterance = say(sentence, speaker)
        frames = draw_lips(utterance.phones, face_seed=speaker.face_seed)
        labels = frame_phones(utterance.phones, len(frames), frames_per_second=LIP_FRAMES_PER_SECOND, centre=0.5)
        clips.append(Clip(frames, labels))
    return sorted(clips, key=lambda clip: len(clip.frames))


def measured_lips(split: str, count: int, *, seed: int) -> dict[str, list[FrameBatch]]:
    """Film a held-out split, the middle of every image, under the name "frame_accuracy"."""
    cut = []
    for clip in film(split, count, seed=seed):
        edge = (clip.frames.shape[1] - CROP_PIXELS) // 2
        middle = slice(edge, edge + CROP_PIXELS)
        cut.append(Clip(clip.frames[:, middle, middle], clip.labels))
    return {"frame_accuracy": [to_batch(cut[start : start + 25]) for start in range(0, count, 25)]}


def to_batch(clips: Sequence[Clip]) -> FrameBatch:
    """Make clips already cut to `CROP_PIXELS` the encoder's input, padded to the longest."""
    longest = max(len(clip.frames) for clip in clips)
    video = torch.zeros(len(clips), longest, 1, CROP_PIXELS, CROP_PIXELS)
    labels = torch.full((len(clips), longest), IGNORED)
    for row, clip in enumerate(clips):
        pixels = torch.from_numpy(np.ascontiguousarray(clip.frames)).float() / 255
        video[row, : len(clip.frames), 0] = (pixels - LIP_MEAN) / LIP_STD
        labels[row, : len(clip.labels)] = torch.from_numpy(clip.labels)
    return FrameBatch({"video": video, "lengths": torch.tensor([len(clip.frames) for clip in clips])}, labels)


def _clips_of_like_length(train: Sequence[Clip], recipe: Recipe, generator: np.random.Generator) -> list[Clip]:
    """Pick random clips out of a random eighth of the sorted ones, so that little of a batch is padding."""
    span = max(recipe.batch_clips, len(train) // 8)
    start = int(generator.integers(len(train) - span + 1))
    return [train[index] for index in start + generator.choice(span, recipe.batch_clips, replace=False)]


def _augment(clip: Clip, generator: np.random.Generator) -> Clip:
    """Crop at random, mirror half of the time, and change brightness, contrast and a little noise."""
    slack = clip.frames.shape[1] - CROP_PIXELS
    top, left = generator.integers(0, slack + 1, 2)
    frames = clip.frames[:, top : top + CROP_PIXELS, left : left + CROP_PIXELS].astype(np.float32)
    if generator.random() < 0.5:
        frames = frames[:, :, ::-1]
    frames = (frames - 128) * generator.uniform(0.8, 1.25) + 128 + generator.uniform(-20, 20)
    frames = frames + generator.normal(0, generator.uniform(0, 4), (1, *frames.shape[1:]))
    return Clip(frames.astype(np.float32), clip.labels)
