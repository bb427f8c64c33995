"""Teaches the word projector of a toy model with planted words."""

from collections import Counter
from typing import Any

import numpy as np
import tiny
import torch
from blocks import merged

from mllm.config.model import ModelConfig
from mllm.data.manifest import Media, Message, Sample, Text
from mllm.training.initialization.word_decoder import WordDecoder
from mllm.training.initialization.word_start import WordLessons, teach_words

NAMES = ["red", "blue", "square", "circle"]
WORDS = {"kind": "words", "num_words": 20, "stretch_frames": 2, "hidden_size": 32}


def settings(**words: Any) -> ModelConfig:
    """Settings of a model that hears words; `words` are of the projector."""
    audio = merged(tiny.MEDIA["audio"], {"projector": {**WORDS, **words}, "budgets": ["/2", "/4", "/8"]})
    return tiny.settings(("audio",), audio=audio)


def caption(row: int) -> str:
    """Some words in random order."""
    rng = np.random.default_rng(row)
    return " ".join(NAMES[word] for word in rng.integers(4, size=1 + row % 3))


class Planted(torch.nn.Module):
    """An encoder whose features say the words of a caption, each in two stretches with two of nothing behind."""

    hidden_size = 16

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.said = torch.nn.Parameter(torch.randn(len(NAMES), 16, generator=generator) * 2)

    def forward(self, values: torch.Tensor, lengths: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        features = torch.full((len(values), 50, 16), 0.1)
        for item, row in enumerate(values[:, 0, 0].round().long().tolist()):
            for place, name in enumerate(caption(row).split()):
                features[item, 2 + 8 * place : 6 + 8 * place] = self.said[NAMES.index(name)].detach()
        return features, lengths // 320


def planted(rows: range) -> tuple[list[Sample], list[tuple[list[Any], str]]]:
    """Captions as a manifest has them and as loaded rows."""
    samples = [
        Sample(
            f"row{row}",
            (Message("user", (Media("audio", "x"),)), Message("assistant", (Text(caption(row)),))),
            task="test",
        )
        for row in rows
    ]
    loaded = [tiny.LoadedMedia("audio", torch.full((80, 100), float(row)), 32 * 320) for row in rows]
    return samples, [([one], caption(row)) for one, row in zip(loaded, rows, strict=True)]


def teach(
    *,
    num_steps: int,
    batch_size: int = 10,
    rank: int = 0,
    world: int = 1,
    decoder: WordDecoder | None = None,
    **words: Any,
) -> tuple[Any, Any]:
    """A model whose projector was taught by captions 0 to 59; `words` are of the projector."""
    model, processor = tiny.model(settings(**words)), tiny.processor(settings(**words))
    model.model.audio_tower = Planted()
    samples, rows = planted(range(60))
    media = [parts for parts, _ in rows]
    batches = [
        processor.batch(samples[start : start + batch_size], media[start : start + batch_size], for_training=True)
        for start in range(0, 60, batch_size)
    ]
    of_process = [(step * world + rank) % len(batches) for step in range(num_steps + 4)]
    endless = ({"batch": batches[index]} for index in of_process)
    teach_words(
        model,
        processor,
        samples,
        endless,
        lessons=WordLessons(num_steps=num_steps, learning_rate=1e-2, seed=0, decoder=decoder),
    )
    return model, processor


def counted(processor: Any, rows: range) -> Counter[int]:
    """The tokens of captions."""
    samples, _ = planted(rows)
    prompts = processor.chat.encode_all([sample.messages for sample in samples])
    return Counter(label for prompt in prompts for label in prompt.labels if label >= 0)
