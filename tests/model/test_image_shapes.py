"""Images in their own shape or of any size, from files to answers: settings, budgets, training, saving."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from blocks import medium, merged
from PIL import Image
from safetensors.torch import load_file
from torch.utils.data import DataLoader
from transformers import (
    BitImageProcessor,
    Dinov2Config,
    Dinov2Model,
    DINOv3ViTConfig,
    DINOv3ViTModel,
    Siglip2ImageProcessor,
    Siglip2VisionConfig,
    Siglip2VisionModel,
    SiglipImageProcessor,
    SiglipVisionConfig,
    SiglipVisionModel,
)
from transformers.utils import is_torchvision_available

from mllm.budget import Budget
from mllm.checkpoints.build import build
from mllm.checkpoints.load import TRAINABLES, load, save_run
from mllm.config.model import LoraConfig, ModelConfig
from mllm.config.run import DataConfig, FeatureConfig, RunConfig, SamplerConfig, TrainConfig
from mllm.data.manifest import Media, Message, Sample, Text, write_manifest
from mllm.inference.answerer import Answerer, Decoding
from mllm.model.trainables import set_trainables
from mllm.training.feature_cache.building import make_features
from mllm.training.initialization.projector_fit import fit_projectors
from mllm.training.run import train
from mllm.transforms.encoder_inputs import ImageTransform

TRUNK: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
SHAPES = {"wide": (20, 90), "tall": (70, 40), "square": (48, 48)}
"""Height and width in pixels of the images."""
needs_torchvision = pytest.mark.skipif(
    not is_torchvision_available(), reason="needs the extra torchvision; run by make test-newest"
)
COMPRESSORS: dict[str, dict[str, Any]] = {
    "pool": {"compressor": "pool"},
    "query": {"compressor": {"kind": "query", "num_queries": 9, "keys": "content", "num_heads": 2}},
}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Parts of a tiny model, images of several shapes, and a manifest of them."""
    folder = tmp_path_factory.mktemp("shapes")
    tiny.write_parts(folder)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        Siglip2VisionModel(Siglip2VisionConfig(**TRUNK, patch_size=8, num_patches=16)).save_pretrained(
            folder / "naflex"
        )
        dinov2 = Dinov2Config(**{key: TRUNK[key] for key in TRUNK if key != "intermediate_size"}, patch_size=8)
        Dinov2Model(dinov2).save_pretrained(folder / "dinov2")
        SiglipVisionModel(SiglipVisionConfig(**TRUNK, image_size=64, patch_size=8)).save_pretrained(folder / "siglip")
        dino = DINOv3ViTConfig(**TRUNK, image_size=64, patch_size=8, num_register_tokens=2)
        DINOv3ViTModel(dino).save_pretrained(folder / "dinov3")
    Siglip2ImageProcessor(patch_size=8, max_num_patches=16).save_pretrained(folder / "naflex")
    BitImageProcessor().save_pretrained(folder / "dinov2")
    SiglipImageProcessor(size={"height": 64, "width": 64}).save_pretrained(folder / "siglip")
    # As DINOv3's checkpoints have it; transformers writes it on torchvision alone, which is not everywhere.
    values = {"image_processor_type": "DINOv3ViTImageProcessor", "size": {"height": 64, "width": 64}, "resample": 2}
    (folder / "dinov3" / "preprocessor_config.json").write_text(json.dumps(values))
    rng = np.random.default_rng(0)
    for name, shape in SHAPES.items():
        Image.fromarray(rng.integers(0, 256, (*shape, 3), dtype=np.uint8)).save(folder / f"{name}.png")
    write_manifest(folder / "train.jsonl", [sample(name) for name in SHAPES])
    return folder


def sample(name: str, root: Path = Path()) -> Sample:
    messages = (
        Message("user", (Media("image", f"{name}.png"), Text("what is it?"))),
        Message("assistant", (Text(f"the {name} one"),)),
    )
    return Sample(name, messages, task="see", root=root)


def settings(world: Path, encoder: str = "naflex", /, **image: Any) -> ModelConfig:
    block = merged({"encoder": {"source": str(world / encoder), "feature_layer": -1}, "budgets": [9, 4, 1]}, image)
    lora = LoraConfig(rank=4, alpha=8, targets=["q_proj", "v_proj"])
    return ModelConfig(llm=str(world / "llm"), chat_format="plain", adapter=lora, image=medium("image", block))


def lively(model: Any) -> Any:
    """Weights that make answers differ."""
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
    return model


def test_every_image_has_a_grid_of_its_own_shape_and_the_budget_counts_by_it(world: Path) -> None:
    _, processor = build(settings(world, encoder={"max_num_patches": 20}))
    samples = [sample(name, world) for name in SHAPES]
    media = [processor.load_media(one) for one in samples]
    batch = processor.batch(samples, media, for_training=False)
    grids = {row.sample_id: row.spans[0].extent.grid for row in batch.rows}
    assert grids == {"wide": (2, 9), "tall": (6, 3), "square": (4, 4)}  # as many patches as fit in 20, in the own shape
    assert batch.values["image_grids"].tolist() == [list(grid) for grid in grids.values()]
    assert batch.values["pixel_values"].shape == (3, 18, 192)
    expanded = processor.expand(batch, [[Budget.parse("image=16")] * 3], left_padding=True)
    assert expanded.inputs["num_image_tokens"].tolist() == [16, 16, 16]
    with pytest.raises(ValueError, match=r"sample 'square': image=17 cannot be met: allowed are counts 1\.\.16"):
        processor.expand(batch, [[Budget.parse("image=17")] * 3], left_padding=True)


@pytest.mark.parametrize("name", COMPRESSORS)
def test_answers_in_a_batch_of_shapes_and_budgets_are_those_alone_and_survive_saving(
    world: Path, tmp_path: Path, name: str
) -> None:
    model, processor = build(settings(world, **COMPRESSORS[name]))
    answerer = Answerer(lively(model), processor, Decoding(max_new_tokens=8))
    samples = [sample(one, world) for one in SHAPES]
    budgets = ["image=9", "image=5", "image=1"]
    together = [answer.text for answer in answerer.answer_samples(samples, budgets)]
    alone = [
        answerer("what is it?", image=str(world / f"{one}.png"), budget=budget).text
        for one, budget in zip(SHAPES, budgets, strict=True)
    ]
    assert together == alone
    assert len(set(together)) == len(together)
    batch = processor.batch(samples, [processor.load_media(one) for one in samples], for_training=False)
    answers = answerer.answer_batch(batch, [[Budget.parse(budget)] * 3 for budget in budgets])
    assert [answers[row][row].text for row in range(3)] == together  # encoded once, each at every budget
    values = [batch.values[key] for key in ("pixel_values", "image_grids")]
    soft = model.model.get_image_features(values[0], torch.tensor([9, 5, 1]), image_grids=values[1]).pooler_output
    assert [len(tokens) for tokens in soft] == [9, 5, 1]
    set_trainables(model)
    save_run(model, processor, tmp_path / "run")
    loaded, again = load(tmp_path / "run")
    inputs = processor.expand(batch, [[Budget.parse("image=9")] * 3], left_padding=False).inputs
    trained = {key: value for key, value in model.state_dict().items() if "compressors" in key}
    assert all(torch.equal(loaded.state_dict()[key], value) for key, value in trained.items())
    assert again.expand(batch, [[Budget.parse("image=9")] * 3], left_padding=False).inputs.keys() == inputs.keys()


@pytest.mark.parametrize("name", COMPRESSORS)
def test_it_trains_on_mixed_shapes_and_on_kept_features_alike(world: Path, tmp_path: Path, name: str) -> None:
    def run(output: str, features: FeatureConfig | None) -> RunConfig:
        data = DataConfig(
            train=[str(world / "train.jsonl")], tokens_per_batch=512, max_rows=4, num_workers=0, features=features
        )
        training = TrainConfig(out=str(tmp_path / output), epochs=2, learning_rate=1e-2, progress=False, use_cpu=True)
        return RunConfig(
            model=settings(world, **COMPRESSORS[name]), data=data, sampler=SamplerConfig(mode="all"), train=training
        )

    kept = FeatureConfig(folder=str(tmp_path / "kept"), versions=1)
    train(run("files", None))
    make_features(run("features", kept))
    train(run("features", kept))
    from_files, from_features = (load_file(tmp_path / folder / TRAINABLES) for folder in ("files", "features"))
    assert from_files.keys() == from_features.keys()
    for key, value in from_files.items():
        torch.testing.assert_close(value, from_features[key], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", COMPRESSORS)
def test_captions_give_one_start_however_the_shapes_are_batched(world: Path, name: str) -> None:
    captions = []
    for one, words in zip(
        [*SHAPES, *SHAPES], ["wide", "tall thing", "square", "red", "two of it", "left"], strict=True
    ):
        messages = (Message("user", (Media("image", f"{one}.png"),)), Message("assistant", (Text(words),)))
        captions.append(Sample(words, messages, task="caption", root=world))
    starts = []
    for size in (1, 3):
        model, processor = build(settings(world, **COMPRESSORS[name]))
        media = [processor.load_media(one) for one in captions]
        batches = [
            {"batch": processor.batch(captions[at : at + size], media[at : at + size], for_training=True)}
            for at in range(0, len(captions), size)
        ]
        loader: Any = DataLoader(batches, batch_size=None)  # pyright: ignore[reportArgumentType]
        fit_projectors(model, processor, loader, num_counted=len(batches))
        starts.append({key: value for key, value in model.state_dict().items() if "compressors" in key})
    untouched = build(settings(world, **COMPRESSORS[name]))[0].state_dict()
    assert any(not torch.equal(value, untouched[key]) for key, value in starts[0].items())
    for key, value in starts[0].items():
        torch.testing.assert_close(value, starts[1][key], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("encoder", ["image", "siglip", "dinov2", pytest.param("dinov3", marks=needs_torchvision)])
@pytest.mark.parametrize("size", [(48, 96), (32, 32)])
def test_an_encoder_of_fixed_size_reads_images_of_any_other(world: Path, encoder: str, size: tuple[int, int]) -> None:
    model, processor = build(settings(world, encoder, encoder={"image_size": list(size)}))
    grid = (size[0] // 8, size[1] // 8)
    assert processor.facts["image"].grid == model.model.encoder("image").grid == grid
    assert isinstance(processor.transforms["image"], ImageTransform)
    for name in SHAPES:
        (loaded,) = processor.load_media(sample(name, world))
        assert loaded.values.shape == (3, *size)
        assert loaded.grid is None
    answerer = Answerer(lively(model), processor, Decoding(max_new_tokens=4))
    answer = answerer("what is it?", image=str(world / "wide.png"), budget=f"image={grid[0] * grid[1]}")
    assert answer.tokens == {"image": grid[0] * grid[1]}


@pytest.mark.parametrize(
    ("encoder", "image", "words"),
    [
        ("naflex", {"compressor": "stack"}, "model.image.compressor.kind stack needs one grid"),
        (
            "naflex",
            {"encoder": {"image_size": [32, 64]}},
            "siglip2_vision_model; it does not go with images that keep their shape",
        ),
        ("naflex", {"encoder": {"max_num_patches": 4}}, "9 tokens cannot be met"),
        (
            "dinov2",
            {"encoder": {"max_num_patches": 64}},
            "model.image.encoder.max_num_patches is 64 and the encoder a dinov2; it goes with siglip2_vision_model",
        ),
        ("image", {"encoder": {"image_size": [4, 64]}}, "smaller than one patch"),
        ("image", {"encoder": {"image_size": [64]}}, r"image_size is \[height, width\]"),
    ],
)
def test_settings_that_contradict_the_encoder_are_refused_when_it_is_built(
    world: Path, encoder: str, image: dict[str, Any], words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        build(settings(world, encoder, **image))
