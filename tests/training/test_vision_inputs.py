"""Tiled images and videos of images from files to a run folder, an export and the command line."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
import yaml
from blocks import merged
from PIL import Image
from safetensors.torch import load_file

from mllm.budget import Budget, Extent, count_tokens
from mllm.checkpoints.build import build
from mllm.checkpoints.export import export
from mllm.checkpoints.load import TRAINABLES, load
from mllm.cli import main
from mllm.config.run import RunConfig, read_run_config
from mllm.data.manifest import Media, Message, Sample, Text, write_manifest
from mllm.media import write_video
from mllm.training.run import train

NEWLINE = "model.newline.vector"
QUERY = {"compressor": "query", "budgets": [2, 4, 16]}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Parts of a tiny model, images of several sizes, a clip, two files nobody can read, and manifests."""
    folder = tmp_path_factory.mktemp("world")
    tiny.write_parts(folder / "parts")
    rng = np.random.default_rng(0)
    samples = []
    for number, (height, width) in enumerate(((90, 130), (60, 200), (150, 140), (40, 40))):
        pixels = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
        samples.append(said(f"image{number}", f"answer {number}", f"{number}.png"))
    samples.append(said("two", "both", "0.png", "3.png"))
    write_manifest(folder / "images.jsonl", samples)
    write_video(folder / "clip.mp4", rng.integers(0, 256, (12, 48, 48, 3), dtype=np.uint8))
    write_video(folder / "short.mp4", rng.integers(0, 256, (2, 48, 48, 3), dtype=np.uint8))
    clips = [said(f"clip{number}", f"answer {number}", "clip.mp4") for number in range(3)]
    write_manifest(folder / "clips.jsonl", [*clips, samples[0]])
    (folder / "cut.png").write_bytes((folder / "0.png").read_bytes()[:900])
    page = Image.new("RGB", (80, 80))
    page.save(folder / "pages.tif", save_all=True, append_images=[page])
    Image.new("1", (30_000, 30_000)).save(folder / "bomb.png")
    bad = [
        said(name, "none", file) for name, file in (("cut", "cut.png"), ("bomb", "bomb.png"), ("pages", "pages.tif"))
    ]
    write_manifest(folder / "bad.jsonl", [*samples, *bad])
    return folder


def said(name: str, answer: str, *files: str) -> Sample:
    media = [Media("video" if file.endswith("mp4") else "image", file) for file in files]
    return Sample(name, (Message("user", (*media, Text("what?"))), Message("assistant", (Text(answer),))), task="t")


def run_settings(world: Path, output: Path, manifest: str, model: dict[str, Any], **changes: Any) -> RunConfig:
    parts = world / "parts"
    image = merged(
        {"encoder": {"source": str(parts / "image"), "feature_layer": -1}, "budgets": [1, 4, 16]},
        model.pop("image", {}),
    )
    plain = {
        "model": {"llm": str(parts / "llm"), "chat_format": "plain", "image": image, "adapter": {"rank": 4}, **model},
        "data": {"train": [str(world / manifest)], "tokens_per_batch": 1500, "num_workers": 0, "max_bad_fraction": 0.5},
        "sampler": {"mode": "random", "num_budgets": 2, **changes.pop("sampler", {})},
        "train": {
            "out": str(output),
            "max_steps": 3,
            "learning_rate": 0.01,
            "progress": False,
            "use_cpu": True,
            **changes,
        },
    }
    (output.parent / f"{output.name}.yaml").write_text(yaml.safe_dump(plain))
    return read_run_config(plain)


def logits(model: Any, processor: Any, sample: Sample, budget: str) -> torch.Tensor:
    with torch.no_grad():
        return model(**processor(sample, budget)).logits


@pytest.mark.parametrize(
    ("image", "budgets"),
    [
        ({"tiling": {}}, ["image=16", "image=4,tiles<=0", "total<=70"]),
        ({"tiling": {"kind": "free", "max_tiles": 3, "merge": "flat"}, **QUERY}, ["image=16", "image=3,tiles<=2"]),
    ],
    ids=["spatial", "flat"],
)
def test_a_run_on_tiles_is_what_is_loaded_and_exported(
    world: Path, tmp_path: Path, image: dict[str, Any], budgets: list[str]
) -> None:
    settings = run_settings(world, tmp_path / "run", "images.jsonl", {"image": image}, learning_rate=0.01)
    run = train(settings)
    model, processor = load(run)
    saved = load_file(run / TRAINABLES)
    assert saved[NEWLINE].equal(model.model.newline.vector)
    start = build(settings.model)[0].model.newline
    assert start is not None
    assert (saved[NEWLINE] - start.vector).abs().max() > 1e-3  # it learned
    export(run, tmp_path / "alone")
    alone = load(tmp_path / "alone")
    question = Sample("q", said("q", "a", "0.png", "1.png").messages, task="t", root=world)
    for budget in budgets:
        expected = logits(model, processor, question, budget)
        torch.testing.assert_close(logits(*alone, question, budget), expected, rtol=1e-4, atol=1e-4)


def test_a_run_on_frames_is_what_is_loaded(world: Path, tmp_path: Path) -> None:
    video = {"encoder": {"kind": "frames", "count": 4, "trained_counts": [4, 2, 1]}, "budgets": [1, 4]}
    run = train(run_settings(world, tmp_path / "run", "clips.jsonl", {"video": video}))
    model, processor = load(run)
    question = Sample("q", said("q", "a", "clip.mp4").messages, task="t", root=world)
    export(run, tmp_path / "alone")
    alone = load(tmp_path / "alone")
    for budget in ("video=4,frames=2", "video=1", "total<=5"):
        torch.testing.assert_close(
            logits(*alone, question, budget), logits(model, processor, question, budget), rtol=1e-4, atol=1e-4
        )
    rows = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    drawn = {key for row in rows for key in row if "frames=" in key}
    assert drawn


def test_points_may_name_tiles(world: Path, tmp_path: Path) -> None:
    points = {"mode": "points", "num_budgets": None, "points": ["image=16,tiles<=2", "image=4", "image=4,tiles<=0"]}
    settings = run_settings(world, tmp_path / "run", "images.jsonl", {"image": {"tiling": {}}}, sampler=points)
    assert (train(settings) / TRAINABLES).exists()


def test_files_nobody_can_read_are_listed_and_the_run_goes_on(world: Path, tmp_path: Path) -> None:
    run = train(run_settings(world, tmp_path / "run", "bad.jsonl", {"image": {"tiling": {}}}, max_steps=6))
    listed = {row["id"]: row["kind"] for row in map(json.loads, (run / "skipped-0.jsonl").read_text().splitlines())}
    assert listed == {"cut": "corrupt", "bomb": "limit", "pages": "unsupported"}


def test_the_command_line_trains_and_answers_at_budgets(world: Path, tmp_path: Path, capsys) -> None:
    video = {"encoder": {"kind": "frames", "count": 4}, "budgets": [1, 4]}
    run_settings(world, tmp_path / "run", "images.jsonl", {"image": {"tiling": {}}, "video": video})
    assert main(["train", "--config", str(tmp_path / "run.yaml"), "--data.tokens_per_batch", "1500"]) == 0
    capsys.readouterr()
    ask = ["generate", "--model", str(tmp_path / "run"), "--text", "what?", "--use_cpu", "--max_new_tokens", "3"]
    for words, soft in (
        (["--image", "0.png", "--budget", "image=16,tiles<=4"], "image 16 + 8 * 6"),
        (["--image", "0.png", "--budget", "image=4,tiles<=0"], "image 5"),
        (["--video", "clip.mp4", "--budget", "video=4,frames=2"], "video 8"),
    ):
        files = [str(world / word) if (world / word).is_file() else word for word in words]
        assert main([*ask, *files]) == 0
        errors = capsys.readouterr().err
        expected = soft if "+" not in soft else f"image {count_of(tmp_path / 'run')}"
        assert f"soft tokens: {expected}" in " ".join(errors.split())


def count_of(run: Path) -> int:
    """An image of 90 x 130 in 2 x 2 tiles of 16 tokens: the thumbnail, and rows of 8 tokens with a newline each."""
    space = load(run)[1].space
    extent = Extent("image", grid=(8, 8), image_pixels=(90, 130), tile_pixels=(64, 64))
    (cost,) = count_tokens([extent], Budget.parse("image=16"), space)
    assert cost.tokens == 16 + 6 * 9
    return cost.tokens


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--image", "0.png", "--budget", "image=7"], r"image=7 cannot be met: 7 tokens of .* features form no map"),
        (["--image", "0.png", "--budget", "image=65"], r"image=65 cannot be met: allowed are counts 1..64"),
        (["--image", "0.png", "--budget", "tiles=4"], r"budget item 'tiles=4' must be written once, as tiles<=N"),
        (["--image", "0.png", "--budget", "image=4,frames=2"], r"names video, but the request holds none"),
        (["--image", "bomb.png"], r"bomb.png: the image has more than 40000000 pixels \(limits.image_pixels\)"),
        (["--image", "cut.png"], r"cut.png: .*\(corrupt\)"),
        (
            ["--image", "pages.tif"],
            r"pages.tif: the file has 2 pages, and only single images are read \(unsupported\)",
        ),
        (["--video", "clip.mp4", "--budget", "frames=3"], r"frames=3 cannot be met: 4 frames .* allowed are 1, 2, 4"),
        (["--video", "short.mp4"], r"short.mp4: the video has 2 frames, and 4 are to be taken from it"),
    ],
)
def test_the_command_line_refuses_in_one_line(
    answering: Path, world: Path, words: list[str], message: str, capsys
) -> None:
    files = [str(world / word) if (world / word).is_file() else word for word in words]
    assert main(["generate", "--model", str(answering), "--text", "what?", "--use_cpu", *files]) == 2
    errors = " ".join(capsys.readouterr().err.split())
    assert re.search(message.replace(" ", r"\s?"), errors), errors


@pytest.fixture(scope="module")
def answering(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("answering")
    video = {"encoder": {"kind": "frames", "count": 4}, "budgets": [1, 4]}
    model = {"image": {"tiling": {}}, "video": video}
    return train(run_settings(world, folder / "run", "images.jsonl", model, max_steps=1))
