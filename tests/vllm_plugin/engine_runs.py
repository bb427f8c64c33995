"""Exports of tiny models for vLLM, samples about real files of every medium, and the ids that are to be answered."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tiny
import torch
from PIL import Image
from toy_server import write_run

from mllm.budget import Budget
from mllm.checkpoints.load import export, load
from mllm.data.manifest import Media, Message, Sample, Text
from mllm.inference.answerer import Answerer, Decoding
from mllm.inference.decoding import generate_options, up_to_end

NUM_FILES = 16
MAX_NEW_TOKENS = 16
LLM_SIZES = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
}
"""vLLM's attention on CPUs has no heads as narrow as those of `tiny.llm_config`."""
TILED: dict[str, Any] = {
    "media": ("image", "video"),
    "chat_format": "vicuna_v1",
    "image": {"tiling": {"kind": "pinpoints"}, "span": ["<picture>", "</picture>"]},
    "video": {
        "encoder": {"kind": "frames", "count": 4, "trained_counts": [4, 2, 1]},
        "compressor": None,
        "budgets": [1, 4, 16],
    },
}
"""Images in tiles between marks, videos of frames, and a chat format with text around what people write."""


def write_export(folder: Path, **options: Any) -> Path:
    """Export a tiny model; the options are those of `write_run`."""
    export(write_run(folder / "run", text=LLM_SIZES, **options), folder / "exported")
    return folder / "exported"


def samples_of(folder: Path, kinds: Sequence[Sequence[str]]) -> list[Sample]:
    """Questions about files, for each kind of media together as many as there are files; no two images are alike."""
    samples = []
    rng = np.random.default_rng(0)
    for number in range(NUM_FILES):
        files = tiny.write_media(folder, seconds=0.4 + 0.03 * number, seed=number)
        small = Image.fromarray(rng.integers(0, 256, (9, 9, 3), dtype=np.uint8))
        small.resize((60 + 10 * number, 180 - 8 * number)).save(folder / files["image"])
        for media in kinds:
            parts = tuple(Media(medium, files[medium]) for medium in media)  # type: ignore[arg-type]
            text = Text(f"what is said about number {number}?")
            name = f"{number} {'+'.join(media)}"
            samples.append(Sample(name, (Message("user", (*parts, text)),), task="", root=folder))
    return samples


def answerer_of(folder: Path) -> Answerer:
    """Answers as the engine should."""
    return Answerer(*load(folder, device="cpu"), Decoding(max_new_tokens=MAX_NEW_TOKENS))


def expected_ids(answerer: Answerer, samples: Sequence[Sample], budget: str) -> list[list[int]]:
    """The ids that transformers' `generate` answers with, as `Answerer` asks it, up to the end of each answer."""
    processor, options = answerer.processor, generate_options(answerer.model, answerer.processor, answerer.decoding)
    asked = Budget.parse(budget)
    found: list[list[int]] = []
    for start in range(0, len(samples), 16):
        rows = samples[start : start + 16]
        batch = processor.batch(rows, [processor.load_media(row, budgets=[asked]) for row in rows], for_training=False)
        inputs = processor.expand(batch, [[asked] * len(rows)], left_padding=True).inputs
        with torch.no_grad():
            ids = answerer.model.generate(**inputs, **options)
        found += [up_to_end(row, options["eos_token_id"]) for row in ids[:, inputs["input_ids"].shape[1] :].tolist()]
    return found
