"""pad_to_square is what LLaVA does to an image, and nothing is done without it."""

from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from blocks import medium
from PIL import Image
from transformers import CLIPImageProcessor

from mllm.checkpoints.build import build_config, build_processor
from mllm.config.model import ModelConfig
from mllm.config.reading import read

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Write tiny parts; the encoder's processor is CLIP's, which brings the shorter side to size and cuts the middle
    out.
    """
    folder = tmp_path_factory.mktemp("parts")
    parts = tiny.write_parts(folder)
    size = {"size": {"shortest_edge": 64}, "crop_size": {"height": 64, "width": 64}}
    CLIPImageProcessor(**size).save_pretrained(folder / "image")  # type: ignore[arg-type]
    return parts


def settings(parts: dict[str, str], **image: bool) -> ModelConfig:
    encoder = {"source": parts["image"], "feature_layer": -1, **image}
    block = medium("image", {"encoder": encoder, "budgets": [1, 4]})
    return ModelConfig(llm=parts["llm"], chat_format="plain", image=block)


def padded(image: Image.Image) -> torch.Tensor:
    """Pad in the released way, plainly: a square of the mean colour, the image in its middle, resized by PIL."""
    side = max(image.size)
    square = Image.new("RGB", (side, side), tuple(int(255 * value) for value in MEAN))
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    pixels = np.asarray(square.resize((64, 64), Image.Resampling.BICUBIC), dtype=np.float64) / 255
    return torch.from_numpy((pixels - MEAN) / STD).permute(2, 0, 1).float()


@pytest.mark.parametrize("size", [(90, 50), (50, 91), (64, 64), (20, 31), (300, 7)])
def test_images_are_padded_as_llava_pads_them(parts: dict[str, str], size: tuple[int, int]) -> None:
    values = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    image = Image.fromarray(values)
    pixels = build_processor(settings(parts, pad_to_square=True)).transform("image", image).values
    torch.testing.assert_close(pixels, padded(image), rtol=0, atol=1e-5)


def test_the_encoders_own_processor_decides_otherwise(parts: dict[str, str]) -> None:
    image = Image.new("RGB", (90, 50), "red")
    pixels = build_processor(settings(parts)).transform("image", image).values
    assert pixels.shape == (3, 64, 64)
    assert pixels.std(dim=(1, 2)).max() < 1e-5  # red all over, no margins


def test_it_is_kept_with_a_run(parts: dict[str, str], tmp_path: Path) -> None:
    from mllm.processing.processor import ElasticProcessor

    config = settings(parts, pad_to_square=True)
    processor = build_processor(config)
    processor.save_pretrained(tmp_path)
    build_config(config)[1].save_pretrained(tmp_path)
    image = Image.effect_noise((80, 40), 90).convert("RGB")
    loaded = ElasticProcessor.from_pretrained(tmp_path)
    assert torch.equal(loaded.transform("image", image).values, processor.transform("image", image).values)


def test_only_images_can_be_padded() -> None:
    audio = {"encoder": {"source": "a", "pad_to_square": True}, "budgets": ["/4"]}
    with pytest.raises(
        ValueError,
        match=r"unknown key model.audio.encoder.pad_to_square; did you mean model.image.encoder.pad_to_square",
    ):
        read(ModelConfig, {"llm": "l", "audio": audio}, "model")
