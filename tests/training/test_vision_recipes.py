"""Every vision recipe trains for real: its own file, on a tiny LLM and encoder and LLaVA's JSON over real images."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import yaml
from blocks import merged
from harness import log_rows
from safetensors.torch import load_file

from mllm.checkpoints.build import build
from mllm.checkpoints.load import TRAINABLES, load, save_run
from mllm.config.run import RunConfig, read_run_config
from mllm.model.trainables import set_trainables
from mllm.training.run import train

CONFIGS = Path(__file__).parent.parent.parent / "configs"
RECIPES = ("mqt_stage1", "mqt_stage2", "m3", "m3_next_anyres", "m3_lora", "frozen_llm_lora", "frozen_llm_mome")
SPACES: dict[str, dict[str, Any]] = {
    "mqt_stage1": {"compressor": {"num_heads": 2}, "budgets": [16]},
    "mqt_stage2": {"compressor": {"num_heads": 2}, "budgets": {"start": 2, "stop": 16, "step": 2}},
}
POOLED = {"budgets": [1, 4, 16, 64]}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tiny parts, images, LLaVA's two files, and a run that stands for a converted LLaVA-1.5."""
    folder = tmp_path_factory.mktemp("world")
    tiny.write_parts(folder / "parts")
    names = [tiny.write_media(folder / "coco", seed=seed, seconds=0.04)["image"] for seed in range(4)]
    pairs, mixture = [], []
    for number in range(12):
        name = f"coco/{names[number % 4]}"
        question = {"from": "human", "value": "Describe the picture.\n<image>"}
        pairs.append(
            {
                "id": str(number),
                "image": name,
                "conversations": [question, {"from": "gpt", "value": f"a circle {number}"}],
            }
        )
        turns = [
            {"from": "human", "value": "what is it?\n<image>" if number % 3 else "two and two?"},
            {"from": "gpt", "value": "a red circle " * (120 if number == 11 else 1)},
        ]
        mixture.append({"id": f"m{number}"} | ({"image": name} if number % 3 else {}) | {"conversations": turns})
    for name, entries in (("pairs.json", pairs), ("mixture.json", mixture)):
        (folder / name).write_text(json.dumps(entries))
    converted = recipe(world=folder, name="m3", output=folder, start_from=None)
    model, processor = build(converted.model)
    set_trainables(model, ("compressors",))
    save_run(model, processor, folder / "converted")
    return folder


def recipe(world: Path, name: str, output: Path, **train: Any) -> RunConfig:
    """The file of a recipe with tiny parts, few samples and single precision; all else is its own."""
    values = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())
    model, data = values["model"], values["data"]
    model |= {"llm": str(world / "parts" / "llm"), "dtype": "float32"}
    image = {"encoder": str(world / "parts" / "image")}
    model["image"] = merged(model["image"], image, SPACES.get(name, POOLED))
    file = world / ("pairs.json" if name == "mqt_stage1" else "mixture.json")
    data |= {"train": [str(file)], "root": str(world), "max_rows": 2, "num_workers": 0}
    data |= {"max_sample_tokens": 400, "tokens_per_batch": 800}
    short = {"epochs": None, "max_steps": 2, "save_every": 1, "precision": "float32", "use_cpu": True, "log_every": 1}
    short |= {"accumulation": 1}
    changes = {"out": str(output), "tensorboard": False, "progress": False, **short, **train}
    if "start_from" in values["train"] and "start_from" not in train:
        changes["start_from"] = str(world / "converted")
    values["train"] |= changes
    return read_run_config(values)


def moved(run: Path) -> set[str]:
    """Names whose values the second step changed."""
    first, second = (load_file(run / f"checkpoint-0000000{step}" / TRAINABLES) for step in (1, 2))
    return {name for name, value in second.items() if not value.equal(first[name])}


@pytest.mark.parametrize("name", [name for name in RECIPES if not name.startswith("mqt")])
def test_a_recipe_trains_saves_what_trains_and_loads(world: Path, tmp_path: Path, name: str) -> None:
    settings = recipe(world, name, tmp_path)
    train(settings)
    saved = load_file(tmp_path / TRAINABLES)
    model, _ = load(tmp_path)
    parameters = dict(model.named_parameters())
    assert set(saved) == set(set_trainables(model, settings.parts))
    assert all(torch.equal(value, parameters[key]) for key, value in saved.items())
    assert len(moved(tmp_path)) > 0.5 * len(saved)
    rows = [row for row in log_rows(tmp_path) if "loss" in row]
    assert [row["step"] for row in rows] == [1, 2]
    assert any(key.startswith("loss/image=") for row in rows for key in row)
    held_llm = any(
        key.startswith("model.language_model.") and ".lora_" not in key and ".mome." not in key for key in saved
    )
    assert held_llm == (name in ("m3", "m3_next_anyres"))
    assert any(key.startswith("model.newline.") for key in saved) == (name == "m3_next_anyres")


def test_the_second_stage_starts_with_the_queries_of_the_first(world: Path, tmp_path: Path) -> None:
    train(recipe(world, "mqt_stage1", tmp_path / "first"))
    first = load_file(tmp_path / "first" / TRAINABLES)
    assert all(name.startswith("model.compressors.image.") for name in first)
    assert moved(tmp_path / "first") > {"model.compressors.image.query", "model.compressors.image.proj"}
    train(recipe(world, "mqt_stage2", tmp_path / "second", start_from=str(tmp_path / "first")))
    second = load_file(tmp_path / "second" / "checkpoint-00000001" / TRAINABLES)  # the learning rate is 0 in step 1
    assert all(second[name].equal(value) for name, value in first.items())
    llm = load_file(world / "parts" / "llm" / "model.safetensors")
    assert len(second) == len(first) + len(llm)
    assert any("language_model.layers.1.mlp" in name for name in moved(tmp_path / "second"))


def test_a_run_that_trains_the_llm_goes_on_as_if_never_stopped(world: Path, tmp_path: Path) -> None:
    train(recipe(world, "m3", tmp_path, save_every=1))
    whole = load_file(tmp_path / TRAINABLES)
    for name in (TRAINABLES, "checkpoint-00000002/manifest.json"):
        (tmp_path / name).unlink()
    train(recipe(world, "m3", tmp_path, save_every=1), resume="auto")
    assert all(value.equal(whole[name]) for name, value in load_file(tmp_path / TRAINABLES).items())


def test_m3_with_its_encoder_trained_as_the_paper_says(world: Path, tmp_path: Path) -> None:
    parts = ["compressors", "llm", "image"]
    train(recipe(world, "m3", tmp_path, parts=parts, part_learning_rates={"image": 2e-5}))
    changed = moved(tmp_path)
    assert any("vision_tower" in name and ".layers.0." in name for name in changed)
    assert not any("vision_tower" in name and ".layers.1." in name for name in changed)  # behind feature_layer -2
    load(tmp_path)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("m3", {"parts": ["llm"]}, "would not train and so be lost; put compressors into train.parts"),
        ("m3", {"start_from": "nowhere"}, "train.start_from nowhere is no run: there is no trainables.safetensors"),
        ("mqt_stage2", {}, "was trained otherwise: .*model.image.compressor.kind was 'pool' and is 'query'"),
    ],
)
def test_what_a_run_cannot_start_from(
    world: Path, tmp_path: Path, name: str, change: dict[str, Any], message: str
) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        train(recipe(world, name, tmp_path, **change))


def test_values_without_a_place_or_of_another_shape_are_named(world: Path, tmp_path: Path) -> None:
    from mllm.training.initialization.start_from import start_from

    model, processor = build(recipe(world, "m3_lora", tmp_path).model)
    set_trainables(model)
    save_run(model, processor, tmp_path / "lora")
    plain, _ = build(recipe(world, "m3", tmp_path).model)
    set_trainables(plain, ("compressors", "llm"))
    with pytest.raises(ValueError, match=r"lora_A.default.weight is not in this model; .* and \d+ more"):
        start_from(plain, tmp_path / "lora")
    wide = recipe(world, "m3", tmp_path).model
    wide = type(wide)(
        **{
            **vars(wide),
            "image": dataclasses.replace(
                wide.image, projector=dataclasses.replace(wide.image.projector, hidden_size=8)
            ),
        }
    )
    other, _ = build(wide)
    set_trainables(other, ("compressors", "llm"))
    with pytest.raises(ValueError, match=r"projectors.0.0.bias has shape \(32,\), here \(8,\)"):
        start_from(other, world / "converted")


def test_a_resumed_run_does_not_start_from_the_other_run_again(world: Path, tmp_path: Path) -> None:
    settings = recipe(world, "m3_lora", tmp_path, max_steps=1)
    train(settings)
    before = load_file(tmp_path / TRAINABLES)
    train(settings, resume="auto")
    assert all(value.equal(before[name]) for name, value in load_file(tmp_path / TRAINABLES).items())


def test_data_check_tells_what_a_recipe_would_learn(world: Path, tmp_path: Path, capsys: Any) -> None:
    from mllm.cli import main
    from mllm.config.run import config_yaml

    recipe_file = tmp_path / "m3.yaml"
    recipe_file.write_text(config_yaml(recipe(world, "m3", tmp_path)))
    words = ["data", "check", str(world / "mixture.json"), "--recipe", str(recipe_file)]
    assert main(words) == 0
    shown = capsys.readouterr().out
    assert "12 rows, 12 good samples" in shown
    assert "12 samples; target tokens per sample: least 5, median 5, mean " in shown
    assert shown.rstrip().endswith("0 without")
    (world / "mute.json").write_text((world / "mixture.json").read_text().replace("a red circle", " "))
    assert main([*words[:2], str(world / "mute.json"), *words[3:]]) == 1
    assert "0 good samples" in capsys.readouterr().out
    absent = (world / "mixture.json").read_text().replace("coco/0.png", "coco/absent.png")
    (world / "absent.json").write_text(absent)
    assert main([*words[:2], str(world / "absent.json"), *words[3:]]) == 1
    assert "sample 'm4': image coco/absent.png" in capsys.readouterr().out
