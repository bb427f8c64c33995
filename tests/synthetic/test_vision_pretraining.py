"""The labels of the synthetic vision encoder, and what the shipped encoder sees."""

import json
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoImageProcessor, CLIPVisionModel

import mllm.synthetic
from mllm.synthetic.images.questions import object_words
from mllm.synthetic.images.scenes import random_scenes, render_scene
from mllm.synthetic.pretrain.blurred_text import SCENE_WORDS, scene_bags
from mllm.synthetic.pretrain.vision import (
    FIELDS,
    NUM_BACKGROUNDS,
    NUM_OBJECT_WORDS,
    PatchReader,
    patch_features,
    patch_loss,
    pretrain_vision,
    render_images,
)

ASSETS = Path(mllm.synthetic.__file__).parent / "assets" / "vision"


@pytest.fixture(scope="module")
def scenes():
    return list(islice(random_scenes("test", 9), 60))


def test_fields_hold_the_words_of_an_object(scenes) -> None:
    bags = render_images(scenes[:1]).bags[0]
    for thing in scenes[0].objects:
        bag = bags[thing.row * 8 + thing.column]
        words = [SCENE_WORDS[first + int(bag.narrow(0, first, number).argmax())] for first, number in FIELDS.values()]
        assert words == list(object_words(thing))
    assert NUM_OBJECT_WORDS + NUM_BACKGROUNDS == len(SCENE_WORDS) == bags.shape[1]
    np.testing.assert_array_equal(bags, scene_bags(scenes[0])[:, -len(SCENE_WORDS) :])


def test_a_perfect_reader_has_almost_no_loss_and_a_wrong_one_has(scenes) -> None:
    bags = render_images(scenes[:4]).bags
    reader = PatchReader(len(SCENE_WORDS) + 1)
    with torch.no_grad():
        reader.bag.weight.copy_(torch.eye(len(SCENE_WORDS), len(SCENE_WORDS) + 1))
        reader.classes.weight.copy_(100.0 * torch.eye(len(SCENE_WORDS) + 1))
        reader.bag.bias.zero_(), reader.classes.bias.zero_()
        is_object = (bags[..., :NUM_OBJECT_WORDS].sum(dim=-1, keepdim=True) > 0).float()
        features = torch.cat([bags, is_object], dim=-1)
        size = 0.1 * (features.square().mean(dim=-1).sqrt() - 1.0).square().mean()
        assert float(patch_loss(reader, features, bags) - size) < 1e-4
        assert float(patch_loss(reader, features.flip(0), bags)) > 10.0


def test_the_shipped_processor_gives_the_pixels_the_encoder_was_trained_on(scenes) -> None:
    processor = AutoImageProcessor.from_pretrained(ASSETS)
    pixels = processor(images=[render_scene(scene) for scene in scenes[:3]], return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(pixels, render_images(scenes[:3]).pixels, atol=1e-5, rtol=0)


def test_a_linear_map_reads_the_patches_of_held_out_scenes_from_the_shipped_features(scenes) -> None:
    """Ridge regression from features of 48 scenes to their bags, tried on 12 others."""
    encoder_part = CLIPVisionModel.from_pretrained(ASSETS, dtype=torch.float32).eval()
    images = render_images(scenes)
    with torch.no_grad():
        features = patch_features(encoder_part, images.pixels)
    features = torch.cat([features, torch.ones_like(features[..., :1])], dim=-1)
    known, tested = features[:48].flatten(0, 1), features[48:].flatten(0, 1)
    weight = torch.linalg.solve(known.T @ known + 0.1 * torch.eye(129), known.T @ images.bags[:48].flatten(0, 1))
    bags = images.bags[48:].flatten(0, 1)
    is_object = bags[:, :NUM_OBJECT_WORDS].sum(dim=-1) > 0
    for name in ("shape", "colour", "letter"):
        first, number = FIELDS[name]
        predicted, said = (
            (tested @ weight)[is_object].narrow(1, first, number),
            bags[is_object].narrow(1, first, number),
        )
        assert float((predicted.argmax(1) == said.argmax(1)).float().mean()) >= 0.95, name


@pytest.mark.slow
def test_pretraining_leaves_a_checkpoint_and_the_log_of_its_run(tmp_path) -> None:
    results = pretrain_vision(tmp_path, seed=1, steps=4, batch_size=8, examine_every_steps=2)
    rows = [json.loads(line) for line in (tmp_path / "log_vision.jsonl").read_text().splitlines()]
    assert rows[0]["seed"] == 1
    assert [row["step"] for row in rows[1:]] == [2, 4]
    assert results.items() <= rows[-1].items()
    assert CLIPVisionModel.from_pretrained(tmp_path).dtype == torch.float32
