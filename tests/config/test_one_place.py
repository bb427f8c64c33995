"""What a run keeps stands in one place on disk; files that disagree are refused, and its settings start it again."""

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import yaml
from transformers import AutoProcessor

from mllm.checkpoints.build import resolved
from mllm.checkpoints.load import TRAINABLES, load
from mllm.cli import main
from mllm.config.medium import QueryConfig
from mllm.config.run import read_run_config
from mllm.data.manifest import Media, Message, Sample, Text, write_manifest
from mllm.model.configuration import ElasticConfig

MEDIA = {
    "image": {"compressor": {"kind": "query", "num_heads": 2}, "span": ["<i>", "</i>"]},
    "audio": {"projector": {"kind": "mlp"}},
}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tiny parts, a manifest, and a run of one step on them."""
    folder = tmp_path_factory.mktemp("world")
    parts = tiny.write_parts(folder / "parts")
    names = tiny.write_media(folder, seed=1)
    rows = [("image", "what is it?", "red"), ("audio", "transcribe.", "two")] * 2
    samples = []
    for number, (kind, question, answer) in enumerate(rows):
        content = (Media(kind, names[kind]), Text(question))  # type: ignore[arg-type]
        samples.append(Sample(f"s{number}", (Message("user", content), Message("assistant", (Text(answer),))), "vqa"))
    write_manifest(folder / "train.jsonl", samples)
    blocks = {
        medium: {"encoder": parts[medium], "budgets": tiny.MEDIA[medium]["budgets"], **MEDIA[medium]}
        for medium in MEDIA
    }
    values = {
        "model": {
            "llm": parts["llm"],
            "chat_format": "plain",
            "adapter": {"kind": "lora_bank", "variant": "st", "tasks": ["vqa"]},
            **blocks,
        },
        "data": {"train": [str(folder / "train.jsonl")], "num_workers": 0},
        "sampler": {"mode": "sandwich"},
        "train": {"out": str(folder / "run"), "max_steps": 1, "use_cpu": True, "tensorboard": False, "progress": False},
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(values))
    assert main(["train", "--config", str(folder / "run.yaml")]) == 0
    return folder


def test_the_settings_of_a_run_hold_values_and_start_it_again(world: Path, tmp_path: Path) -> None:
    written = (world / "run" / "settings.yaml").read_text()
    assert "null" not in written
    assert "auto" not in written
    values = yaml.safe_load(written)
    image, audio = values["model"]["image"], values["model"]["audio"]
    assert image["compressor"] == {
        "kind": "query",
        "num_queries": 64,
        "keys": "position",
        "num_heads": 2,
        "start": "released",
    }
    assert audio["projector"]["hidden_size"] == 32
    assert values["model"]["adapter"]["tasks"] == ["vqa"]
    sampler = {"mode": "sandwich", "num_budgets": 3, "points": [], "max_image_tokens": [], "distill_weight": 0.5}
    assert values["sampler"] == sampler
    assert values["train"]["parts"] == ["compressors", "adapter"]
    config = read_run_config(values)
    assert resolved(config.model) == config.model
    words = ["train", "--config", str(world / "run" / "settings.yaml"), "--train.out", str(tmp_path / "again")]
    assert main(words) == 0
    assert (tmp_path / "again" / TRAINABLES).read_bytes() == (world / "run" / TRAINABLES).read_bytes()
    again = yaml.safe_load((tmp_path / "again" / "settings.yaml").read_text())
    assert again.pop("train") | {"out": ""} == values.pop("train") | {"out": ""}
    assert again == values


def test_the_trained_space_stands_in_the_config_of_the_model_alone(world: Path) -> None:
    kept = json.loads((world / "run" / "processor_config.json").read_text())["elastic"]
    assert set(kept) == {"chat_format", "preprocessors", "prompts", "shares_lengths", "names_images"}
    media = json.loads((world / "run" / "config.json").read_text())["media"]
    assert media["image"]["budgets"] == [1, 4, 16, 64]
    assert "source" not in media["image"]["encoder"]
    model, processor = load(world / "run")
    assert processor.space == model.config.space
    loaded = AutoProcessor.from_pretrained(world / "run")
    assert loaded.space == processor.space


def put(values: dict[str, Any], path: str, value: Any) -> None:
    *blocks, last = path.split(".")
    for block in blocks:
        values = values[block]
    values[last] = value


@pytest.mark.parametrize(
    ("file", "path", "value", "message"),
    [
        (
            "config.json",
            "placeholder_ids.image",
            7,
            r"config.json says placeholder_ids.image is 7, but in tokenizer.json",
        ),
        ("config.json", "new_tokens.<i>", 7, r"config.json says new_tokens.<i> is 7, but in tokenizer.json"),
        ("config.json", "media.image.budgets", [1, 100], r"config.json: media.image.budgets: 100 tokens cannot be met"),
        (
            "config.json",
            "media.audio.compressor.order",
            "haar",
            r"config.json: unknown key media.audio.compressor.order",
        ),
        (
            "config.json",
            "media.image.compressor.num_queries",
            16,
            r"config.json: media.image.budgets: 64 tokens cannot",
        ),
        ("config.json", "adapter.rank", 3, r"trainables.safetensors does not fit the model: .*lora_A has shape"),
        ("config.json", "adapter.bottleneck", 3, r"config.json: unknown key adapter.bottleneck; did you mean|keys of"),
        (
            "config.json",
            "audio_config.num_mel_bins",
            40,
            r"elastic.preprocessors.audio.feature_size is 80, but audio_config",
        ),
        ("config.json", "trained_part", ["adapter"], r"config.json: unknown key trained_part; did you mean trained_p"),
        ("config.json", "lora", {"rank": 4}, r"config.json: unknown key lora; allowed: adapter, "),
        ("config.json", "to_dict", 1, r"config.json: unknown key to_dict; "),
        ("config.json", "max_length", 20, r"config.json: unknown key max_length; "),
        ("processor_config.json", "elastics", {}, r"processor_config.json: unknown key elastics; did you mean elastic"),
        ("processor_config.json", "image_mean", [0, 0, 0], r"processor_config.json: unknown key image_mean; allowed: "),
        ("processor_config.json", "elastic.space", {}, r"processor_config.json: unknown key elastic.space"),
        (
            "processor_config.json",
            "elastic.chat_format",
            3,
            r"processor_config.json: elastic.chat_format: expected str",
        ),
        (
            "processor_config.json",
            "elastic.preprocessors",
            {"image": {}},
            r"config.json has audio, but processor_config.json has not",
        ),
        (
            "processor_config.json",
            "elastic.preprocessors.audio.sampling_rate",
            8000,
            r"processor_config.json: elastic.preprocessors.audio.sampling_rate is 8000",
        ),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_file_of_a_checkpoint_that_disagrees_is_refused_by_name(
    world: Path, tmp_path: Path, file: str, path: str, value: Any, message: str
) -> None:
    shutil.copytree(world / "run", tmp_path / "run")
    values = json.loads((tmp_path / "run" / file).read_text())
    put(values, path, value)
    (tmp_path / "run" / file).write_text(json.dumps(values))
    (tmp_path / "run" / "manifest.json").unlink()  # or the change would be found by its digest
    with pytest.raises((ValueError, OSError), match=message):
        load(tmp_path / "run")


def test_a_tokenizer_of_another_model_is_refused(world: Path, tmp_path: Path) -> None:
    shutil.copytree(world / "run", tmp_path / "run")
    tokenizer = json.loads((tmp_path / "run" / "tokenizer.json").read_text())
    for token in tokenizer["added_tokens"]:
        if token["content"] == "<|image_token|>":
            token["content"] = "<|other_token|>"
    rename: Callable[[dict[str, int]], dict[str, int]] = lambda known: {  # noqa: E731
        {"<|image_token|>": "<|other_token|>"}.get(name, name): number for name, number in known.items()
    }
    tokenizer["model"]["vocab"] = rename(tokenizer["model"]["vocab"])
    (tmp_path / "run" / "tokenizer.json").write_text(json.dumps(tokenizer))
    (tmp_path / "run" / "manifest.json").unlink()
    with pytest.raises(ValueError, match=r"config.json says placeholder_ids.image is"):
        load(tmp_path / "run")


def test_a_config_is_the_same_written_and_read() -> None:
    settings = tiny.settings(image={"compressor": {"kind": "query", "keys": "content"}})
    config = tiny.config(dataclasses.replace(settings, names_images=True))
    again = ElasticConfig.from_dict(json.loads(config.to_json_string(use_diff=False)))
    assert (again.media, again.adapter, again.space) == (config.media, config.adapter, config.space)
    assert isinstance(again.media["image"].compressor, QueryConfig)


def test_keys_that_transformers_writes_are_read(world: Path, tmp_path: Path) -> None:
    config = ElasticConfig.from_pretrained(world / "run", attn_implementation="eager", output_attentions=True)
    assert (config._attn_implementation, config.output_attentions) == ("eager", True)
    config.quantization_config = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    config.architectures, config.dtype = ["ElasticForConditionalGeneration"], "bfloat16"
    config.save_pretrained(tmp_path)
    again = ElasticConfig.from_pretrained(tmp_path)
    assert again.to_diff_dict() == config.to_diff_dict()
    assert ElasticConfig(**config.to_dict()).to_diff_dict() == config.to_diff_dict()
