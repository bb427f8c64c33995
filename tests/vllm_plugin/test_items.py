"""An engine's items, each for itself, give the very soft tokens that a batch of prompts has at its placeholders."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from blocks import medium
from PIL import Image

from mllm.budget import Budget
from mllm.config.model import ModelConfig
from mllm.data.manifest import Media, Message, Sample, Text
from mllm.media import write_video
from mllm.model.modeling import ElasticForConditionalGeneration
from mllm.processing.processor import ElasticProcessor
from mllm.vllm_plugin.items import EngineItem
from mllm.vllm_plugin.prompts import engine_prompt
from mllm.vllm_plugin.soft_tokens import soft_tokens_of

TILING = {"tiling": {"kind": "pinpoints"}}
FLAT = {"compressor": "query", "budgets": [2, 4, 16], "tiling": {"kind": "free", "max_tiles": 4, "merge": "flat"}}
FRAMES = {"encoder": {"kind": "frames", "count": 4, "trained_counts": [4, 2, 1]}, "budgets": [1, 4, 16]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Media of different sizes and lengths."""
    made = tmp_path_factory.mktemp("items")
    rng = np.random.default_rng(0)
    for number, (height, width) in enumerate(((90, 130), (60, 200))):
        Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(made / f"image{number}.png")
    for number, seconds in enumerate((0.8, 0.5)):
        tiny.write_media(made, seconds=seconds, seed=number)
    write_video(made / "frames.mp4", rng.integers(0, 255, (24, 48, 48, 3), dtype=np.uint8))
    return made


def build(settings: ModelConfig) -> tuple[ElasticForConditionalGeneration, ElasticProcessor]:
    return tiny.model(settings), tiny.processor(settings)


def framed(**image: Any) -> ModelConfig:
    """Images, and videos of frames."""
    made = tiny.settings(("image",), image=image)
    return ModelConfig(
        llm="none", chat_format="plain", adapter=made.adapter, image=made.image, video=medium("video", FRAMES)
    )


STREAMS = [("image", "image0.png"), ("audio", "0.wav"), ("video", "0.mp4"), ("audio", "1.wav"), ("video", "1.mp4")]
IMAGES = [("image", "image0.png"), ("video", "frames.mp4"), ("image", "image1.png")]


@pytest.mark.parametrize(
    ("settings", "files", "budget"),
    [
        (tiny.settings(), STREAMS, ""),
        (tiny.settings(), STREAMS, "image=5,audio=3,video=/5"),
        (tiny.settings(), STREAMS, "total<=40"),
        (framed(**TILING), IMAGES, "image=16"),
        (framed(**TILING), IMAGES, "image=4,tiles<=2,video=16,frames=2"),
        (framed(**FLAT), IMAGES, "image=4,video=1,frames=1"),
        (framed(), IMAGES, "total<=60"),
    ],
)
def test_items_give_the_soft_tokens_of_a_batch(
    folder: Path, settings: ModelConfig, files: list[tuple[str, str]], budget: str
) -> None:
    model, processor = build(settings)
    parts = tuple(Media(medium, name) for medium, name in files)  # type: ignore[arg-type]
    sample = Sample("a", (Message("user", (*parts, Text("what?"))),), task="", root=folder)
    prompt = engine_prompt(processor, sample, budget)
    amounts = Budget.parse(budget)
    batch = processor.batch([sample], [processor.load_media(sample, budgets=[amounts])], for_training=False)
    inputs = processor.expand(batch, [[amounts]], left_padding=True).inputs
    assert prompt["prompt_token_ids"] == list(batch.rows[0].ids)
    with torch.no_grad():
        embeds = model.model.embed(inputs["input_ids"], inputs)
        for encoder, items in prompt["multi_modal_data"].items():
            expected = embeds[inputs["input_ids"] == processor.placeholder_ids[encoder]]
            soft = soft_tokens_of(model.model, encoder, together(items))
            assert [len(tokens) for tokens in soft] == [item.num_tokens for item in items]
            torch.testing.assert_close(torch.cat(soft), expected, rtol=1e-5, atol=1e-5)


def together(items: list[EngineItem]) -> dict[str, Any]:
    """Tensors of several items as vLLM hands them over: stacked, where they are of one shape."""
    names = items[0].tensors
    tensors = {name: [item.tensors[name] for item in items] for name in names}
    return {
        name: torch.stack(each) if len({tensor.shape for tensor in each}) == 1 else each
        for name, each in tensors.items()
    }


def test_a_prompt_of_text_has_no_media() -> None:
    processor = tiny.processor(tiny.settings())
    sample = Sample("a", (Message("user", (Text("<|image_token|> what?"),)),), task="")
    prompt = engine_prompt(processor, sample)
    assert set(prompt) == {"prompt_token_ids"}
    assert set(processor.placeholder_ids.values()).isdisjoint(prompt["prompt_token_ids"])


def test_a_budget_that_cannot_be_met_is_refused(folder: Path) -> None:
    sample = Sample("a", (Message("user", (Media("image", "image0.png"), Text("what?"))),), task="", root=folder)
    with pytest.raises(ValueError, match=r"image=65 cannot be met: allowed are counts 1\.\.64"):
        engine_prompt(tiny.processor(tiny.settings()), sample, "image=65")
