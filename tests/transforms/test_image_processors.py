"""Images are read by Pillow's image processors, with or without torchvision, and what needs torchvision says so."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from transformers import AutoConfig, CLIPImageProcessorPil, CLIPVisionConfig
from transformers.utils import is_torchvision_available

from mllm.transforms.encoder_inputs import build_transform
from mllm.transforms.image_processors import image_processor_class, read_image_processor

SIZE = {"size": {"height": 24, "width": 24}, "do_center_crop": False}
DINOV3 = '{"image_processor_type": "DINOv3ViTImageProcessor", "size": {"height": 32, "width": 32}}'


@pytest.mark.parametrize("name", ["CLIPImageProcessor", "CLIPImageProcessorFast", "CLIPImageProcessorPil"])
def test_whatever_a_checkpoint_was_saved_with_pillow_reads_its_images(name: str, tmp_path: Path) -> None:
    assert image_processor_class(name) is CLIPImageProcessorPil
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 57, 3), dtype=np.uint8))
    shrunk = np.asarray(image.resize((24, 24), Image.Resampling.BICUBIC), dtype=np.float64) / 255
    expected = (shrunk - CLIPImageProcessorPil.image_mean) / CLIPImageProcessorPil.image_std
    made, _ = build_transform("image", CLIPVisionConfig(), {"image_processor_type": name, **SIZE})(image)
    np.testing.assert_allclose(made.numpy(), expected.transpose(2, 0, 1), atol=1e-5)


def test_a_folder_is_read_by_pillow_too(tmp_path: Path) -> None:
    (tmp_path / "preprocessor_config.json").write_text('{"image_processor_type": "CLIPImageProcessor"}')
    assert type(read_image_processor(str(tmp_path))) is CLIPImageProcessorPil


def test_a_folder_that_does_not_name_its_processor_is_read_by_its_model(tmp_path: Path) -> None:
    (tmp_path / "preprocessor_config.json").write_text('{"do_resize": true}')
    AutoConfig.for_model("clip").save_pretrained(tmp_path)
    assert type(read_image_processor(str(tmp_path))) is CLIPImageProcessorPil


def test_an_unknown_processor_is_refused() -> None:
    with pytest.raises(ValueError, match=r"no image processor 'AbsentProcessor' \(key image_processor_type\)"):
        image_processor_class("AbsentProcessor")
    with pytest.raises(ValueError, match="no image processor ''"):
        image_processor_class("")


@pytest.mark.skipif(is_torchvision_available(), reason="torchvision is there")
def test_what_is_written_on_torchvision_alone_names_its_extra(tmp_path: Path) -> None:
    (tmp_path / "preprocessor_config.json").write_text(DINOV3)
    for read in (lambda: image_processor_class("DINOv3ViTImageProcessor"), lambda: read_image_processor(str(tmp_path))):
        with pytest.raises(ValueError, match=r"DINOv3ViTImageProcessor on torchvision alone: .*'\.\[torchvision\]'"):
            read()


@pytest.mark.skipif(not is_torchvision_available(), reason="needs the extra torchvision; run by make test-newest")
def test_what_is_written_on_torchvision_alone_is_read_where_it_is(tmp_path: Path) -> None:
    (tmp_path / "preprocessor_config.json").write_text(DINOV3)
    assert type(read_image_processor(str(tmp_path))).__name__ == "DINOv3ViTImageProcessor"
