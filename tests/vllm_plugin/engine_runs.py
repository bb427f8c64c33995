"""Exports of tiny models for vLLM, samples about real files of every medium, and the ids that are to be answered.

Where vLLM is not installed its tests are skipped, or fail if `REQUIRE_VLLM=1` says that they must run.
"""

import gc
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from PIL import Image
from toy_server import write_run

from mllm.budget import Budget
from mllm.checkpoints.export import export
from mllm.checkpoints.load import load
from mllm.data.manifest import Media, Message, Sample, Text
from mllm.inference.answerer import Answerer, Decoding
from mllm.inference.decoding import generate_options, up_to_end
from mllm.vllm_plugin.engine_options import ENVIRONMENT

IS_SKIPPED = find_spec("vllm") is None and os.environ.get("REQUIRE_VLLM") != "1"
needs_vllm = pytest.mark.skipif(IS_SKIPPED, reason="needs vLLM, which holds other libraries back: make test-vllm")
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


@contextmanager
def engine(folder: Path, **options: Any) -> Iterator[Any]:
    """`vllm.LLM` on an export, in this process where it takes one alone, and ended behind the block."""
    os.environ |= {**ENVIRONMENT, "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory

    usual = {"dtype": "float32", "enforce_eager": True, "max_model_len": 1024, "block_size": 32}
    usual |= {"enable_prefix_caching": True, "distributed_executor_backend": "uni"}
    llm = LLM(str(folder), **{**usual, **options})  # type: ignore[arg-type]
    try:
        yield llm
    finally:
        del llm
        gc.collect()
        cleanup_dist_env_and_memory()


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


@dataclass(frozen=True)
class Expected:
    """An answer that transformers' `generate` gives: its ids, and the logarithms of their probabilities."""

    ids: list[int]
    logprobs: list[float]


def expected_of(answerer: Answerer, samples: Sequence[Sample], budget: str) -> list[Expected]:
    """What `Answerer` answers, asked as it asks, up to the end of each answer."""
    processor, options = answerer.processor, generate_options(answerer.model, answerer.processor, answerer.decoding)
    amounts = Budget.parse(budget)
    answers = []
    for start in range(0, len(samples), 16):
        rows = samples[start : start + 16]
        media = [processor.load_media(row, budgets=[amounts]) for row in rows]
        batch = processor.batch(rows, media, for_training=False)
        inputs = processor.expand(batch, [[amounts] * len(rows)], left_padding=True).inputs
        with torch.no_grad():
            out = answerer.model.generate(**inputs, **options, return_dict_in_generate=True, output_scores=True)
        scores = torch.stack(out.scores, dim=1).log_softmax(dim=-1)
        ids = out.sequences[:, inputs["input_ids"].shape[1] :]
        logprobs = scores.gather(-1, ids[..., None])[..., 0].tolist()
        for row, row_logprobs in zip(ids.tolist(), logprobs, strict=True):
            kept = up_to_end(row, options["eos_token_id"])
            answers.append(Expected(kept, row_logprobs[: len(kept)]))
    return answers


def expected_ids(answerer: Answerer, samples: Sequence[Sample], budget: str) -> list[list[int]]:
    """The ids alone."""
    return [answer.ids for answer in expected_of(answerer, samples, budget)]
