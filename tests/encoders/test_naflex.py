"""Images in their own shape: each is encoded as alone, whatever its batch mates, and as the backbone does it."""

import pytest
import torch
from blocks import encoder_block
from torch import Tensor
from transformers import Siglip2Config, Siglip2VisionConfig, Siglip2VisionModel

from mllm.encoders import backbone_class, backbone_config, build_encoder, encoder_facts, wrap_encoder
from mllm.encoders.naflex import NaFlexEncoder

CONFIG = Siglip2VisionConfig(
    hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=48, patch_size=8, num_patches=16
)
GRIDS = [(2, 7), (4, 4), (1, 3), (5, 3)]


def backbone() -> Siglip2VisionModel:
    torch.manual_seed(0)
    return Siglip2VisionModel(CONFIG).eval()


def images(padding: float = 0.0) -> tuple[Tensor, Tensor]:
    """Random patches of images of every grid, padded to the largest."""
    generator = torch.Generator().manual_seed(0)
    values = torch.full((len(GRIDS), 16, 192), padding)
    for row, (rows, columns) in zip(values, GRIDS, strict=True):
        row[: rows * columns] = torch.randn(rows * columns, 192, generator=generator)
    return values, torch.tensor(GRIDS)


@torch.no_grad()
def test_a_image_in_a_batch_is_the_image_alone_whatever_the_padding() -> None:
    encoder = wrap_encoder(backbone()).eval()
    values, grids = images(padding=7.0)
    features, lengths = encoder(values, grids)
    assert lengths.tolist() == [rows * columns for rows, columns in GRIDS]
    for row, length in enumerate(lengths.tolist()):
        alone, _ = encoder(values[row : row + 1, :length], grids[row : row + 1])
        torch.testing.assert_close(features[row, :length], alone[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("layer", "final_norm"), [(-2, False), (-1, False), (-1, True)])
@torch.no_grad()
def test_it_is_the_layer_of_the_backbone_that_was_asked_for(layer: int, final_norm: bool) -> None:
    whole = backbone()
    values, grids = images()
    mask = torch.arange(16) < grids.prod(1)[:, None]
    shapes = {"pixel_attention_mask": mask.int(), "spatial_shapes": grids}
    output = whole(values, output_hidden_states=True, **shapes)
    expected = output.last_hidden_state if final_norm else output.hidden_states[layer]
    encoder = wrap_encoder(whole, encoder_block(CONFIG, {"feature_layer": layer, "final_norm": final_norm})).eval()
    features, _ = encoder(values, grids)
    torch.testing.assert_close(features[mask], expected[mask])
    assert not hasattr(whole, "head")


def test_the_setting_bounds_the_patches_and_the_size_is_no_setting() -> None:
    assert encoder_facts(CONFIG).max_patches == 16
    facts = encoder_facts(CONFIG, encoder_block(CONFIG, {"max_num_patches": 40}))
    encoder = build_encoder("image", CONFIG, encoder_block(CONFIG, {"max_num_patches": 40}))
    assert isinstance(encoder, NaFlexEncoder)
    assert (facts.max_patches, facts.grid) == (encoder.max_patches, encoder.grid) == (40, (6, 6))
    assert backbone_config(Siglip2Config(vision_config=CONFIG.to_dict())).model_type == "siglip2_vision_model"
    assert backbone_class(CONFIG) is Siglip2VisionModel
    for settings, words in [
        ({"max_num_patches": 0}, "at least 1"),
        ({"image_size": [64, 64]}, "allowed: max_num_patches"),
    ]:
        with pytest.raises(ValueError, match=words):
            build_encoder("image", CONFIG, encoder_block(CONFIG, settings))
    with pytest.raises(ValueError, match="without image_grids"):
        encoder(torch.zeros(1, 4, 192))
