"""Every key is read, or refused by its full name: in YAML, on the command line and in Python alike."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from blocks import medium, merged
from transformers import CLIPVisionConfig, WavLMConfig

from mllm.cli import parse
from mllm.commands.help import help_text
from mllm.commands.train import Settings
from mllm.config.medium import FramesConfig, ImageQueryConfig, LipsConfig, MoeConfig, StreamQueryConfig
from mllm.config.model import LoraBankConfig
from mllm.config.reading import keys_of, parse_yaml
from mllm.config.run import RunConfig, config_yaml, read_run_config
from mllm.encoders import encoder_facts

BLOCKS: dict[str, dict[str, Any]] = {
    "image": {"encoder": {"source": "clip"}, "compressor": {"kind": "pool"}, "budgets": [1, 4]},
    "audio": {"encoder": {"source": "whisper"}, "compressor": {"kind": "pool"}, "budgets": ["/4", "/8"]},
    "video": {"encoder": {"source": "lips"}, "compressor": {"kind": "pool"}, "budgets": ["/2", "/5"]},
}
WRONG_KEYS = [
    ("image.compressor.window_frames", 8, "did you mean model.audio.compressor.window_frames"),
    ("image.compressor.num_queries", 8, "goes with kind query, not with pool, which takes order"),
    ("image.encoder.crop_pixels", 44, "did you mean model.video.encoder.crop_pixels"),
    ("image.encoder.size_pixels", 48, "did you mean model.video.encoder.size_pixels"),
    ("image.encoder.normalize", True, "did you mean model.audio.encoder.normalize"),
    ("image.encoder.released_cut", True, "did you mean model.audio.encoder.released_cut"),
    ("audio.encoder.feature_layer", -2, "did you mean model.image.encoder.feature_layer"),
    ("audio.encoder.image_size", [64, 64], "did you mean model.image.encoder.image_size"),
    ("audio.encoder.max_num_patches", 16, "did you mean model.image.encoder.max_num_patches"),
    ("audio.encoder.final_norm", True, "did you mean model.image.encoder.final_norm"),
    ("audio.encoder.crop_pixels", 44, "did you mean model.video.encoder.crop_pixels"),
    ("video.encoder.normalize", True, "did you mean model.audio.encoder.normalize"),
    ("video.encoder.feature_layer", -2, "did you mean model.image.encoder.feature_layer"),
    ("video.encoder.image_size", [64, 64], "did you mean model.image.encoder.image_size"),
]
"""What was accepted and ignored once; the fifteenth, `max_num_patches` of a CLIP, only the encoder can refuse."""


def run_values(**blocks: Any) -> dict[str, Any]:
    model = {"llm": "l", **{name: merged(block) for name, block in BLOCKS.items()}, **blocks}
    return {"model": model, "data": {"train": ["a.jsonl"]}, "train": {"out": "o", "max_steps": 3}}


def put(values: dict[str, Any], path: str, value: Any) -> None:
    *blocks, last = path.split(".")
    for block in blocks:
        values = values.setdefault(block, {})
    values[last] = value


@pytest.mark.parametrize(("path", "value", "message"), WRONG_KEYS, ids=[path for path, _, _ in WRONG_KEYS])
def test_a_key_of_another_medium_or_kind_is_refused_with_the_one_that_is_meant(
    tmp_path: Path, path: str, value: Any, message: str
) -> None:
    values = run_values()
    put(values["model"], path, value)
    with pytest.raises(ValueError, match=rf"model\.{path}\b.*{message}"):
        read_run_config(values)
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(values))
    with pytest.raises(ValueError, match=rf"model\.{path}\b.*{message}"):
        parse(["train", "--config", str(tmp_path / "run.yaml")])
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(run_values()))
    words = ["train", "--config", str(tmp_path / "run.yaml"), f"--model.{path}", str(value)]
    with pytest.raises(ValueError, match=rf"model\.{path}\b.*{message}"):
        parse(words)


def test_a_key_of_another_family_is_refused_once_the_encoder_is_known() -> None:
    patches = medium("image", BLOCKS["image"], encoder={"max_num_patches": 16}).encoder
    with pytest.raises(ValueError, match=r"model\.image\.encoder\.max_num_patches is 16 .* clip_vision_model; it goes"):
        encoder_facts(CLIPVisionConfig(), patches)
    cut = medium("audio", BLOCKS["audio"], encoder={"released_cut": True}).encoder
    with pytest.raises(ValueError, match=r"model\.audio\.encoder\.released_cut is True .* wavlm; it is about Whisper"):
        encoder_facts(WavLMConfig(), cut)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("image.project_first", True, "it is now model.image.projector.before_pooling"),
        ("image.budget_range", [2, 256, 2], r"it is now model.image.budgets \(as {start: ..., stop: ..., step: ...}\)"),
        ("image.projector_size", 0, r"it is now model.image.projector.hidden_size \(and kind linear for what was 0\)"),
        ("image.query_heads", 16, "it is now model.image.compressor.num_heads"),
        ("image.window_frames", 8, "it goes with model.audio.compressor.window_frames or model.video.compressor"),
        ("image.crop_pixels", 44, "it goes with model.video.encoder.crop_pixels"),
        ("image.query_size", 8, "it is gone: queries have the size of the encoder's features"),
        ("audio.normalize_audio", True, "it is now model.audio.encoder.normalize"),
        ("video.frames", 8, r"it is now model.video.encoder.count \(with kind frames\)"),
        ("video.encoder_adapter", {}, "it is now model.video.encoder.adapter"),
        ("names_pictures", True, "it is now model.names_images"),
    ],
)
def test_an_old_key_says_where_it_is_now(path: str, value: Any, message: str) -> None:
    values = run_values()
    put(values["model"], path, value)
    with pytest.raises(ValueError, match=rf"unknown key model\.{path}; {message}"):
        read_run_config(values)


def test_old_values_and_keys_of_other_blocks_too() -> None:
    with pytest.raises(ValueError, match=r"model.video.encoder.source is 'image'; .* write encoder: {kind: frames}"):
        read_run_config(run_values(video={"encoder": "image", "budgets": [4]}))
    for block, key in (("train", "schedule"), ("train", "validation_budgets"), ("sampler", "distill_temperature")):
        values = run_values()
        values.setdefault(block, {})[key] = 1
        with pytest.raises(ValueError, match=rf"unknown key {block}.{key}; it is gone: "):
            read_run_config(values)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"compressor": {"kind": "squeeze"}}, "model.image.compressor.kind is 'squeeze'; allowed: pool, query, stack"),
        ({"compressor": None}, "model.image.compressor: expected kind pool or kind query or .*, got null"),
        ({"projector": {"hidden_size": 1.5}}, "model.image.projector.hidden_size: expected int or auto, got 1.5"),
        ({"projector": {"hidden_size": 0}}, "model.image.projector.hidden_size is 0; one linear layer is kind linear"),
        ({"projector": {"kind": "moe", "top_k": 9}}, r"model.image.projector.top_k is 9, of 4 experts"),
        ({"projector": {"kind": "words"}}, r"model.image.projector.kind is words, .*; an image has no order"),
        ({"budgets": ["/4"]}, r"model.image.budgets are rates \(/4\); images take counts"),
        ({"budgets": {"start": 2}}, r"model.image.budgets is a list, or {start, stop, step} of counts"),
        ({"span": ["<image>"]}, "model.image.span is the token before and the token after"),
        ({"encoder": {}}, "model.image.encoder.source is missing"),
        ({"encoder": {"image_size": [64]}}, r"model.image.encoder.image_size is \[height, width\]"),
    ],
)
def test_values_that_cannot_be_are_refused_by_their_full_key(change: dict[str, Any], message: str) -> None:
    image = {**BLOCKS["image"], **change}
    if change.get("encoder"):
        image["encoder"] = {"source": "clip", **change["encoder"]}
    with pytest.raises(ValueError, match=message):
        read_run_config(run_values(image=image))


def test_words_are_heard_by_pooling_compressors_that_learn_them_from_captions() -> None:
    audio = {"encoder": "w", "projector": "words", "budgets": ["/4"]}
    values = run_values(audio=audio)
    values["data"]["captions"] = ["c.jsonl"]
    assert read_run_config(values).train.word_steps == 1000
    with pytest.raises(
        ValueError, match=r"model.audio.projector is words, .* from data.captions; name manifests there"
    ):
        read_run_config(run_values(audio=audio))
    with pytest.raises(ValueError, match=r"model.audio.projector.kind is words, which goes with compressor pool, not"):
        read_run_config(run_values(audio={**audio, "compressor": "stack"}))


def test_plain_text_is_the_source_of_an_encoder_and_the_kind_of_the_rest() -> None:
    read = read_run_config(
        run_values(
            image={"encoder": "clip", "compressor": "query", "budgets": [4]},
            video={"encoder": {"kind": "frames"}, "budgets": [4]},
            audio={
                "encoder": "w",
                "compressor": {"kind": "query", "window_frames": 8},
                "projector": None,
                "budgets": ["/4"],
            },
        )
    ).model
    assert read.image is not None
    assert read.audio is not None
    assert read.video is not None
    assert read.image.encoder.source == "clip"
    assert read.image.compressor == ImageQueryConfig()
    assert isinstance(read.audio.compressor, StreamQueryConfig)
    assert read.video.encoder == FramesConfig()
    lips = read_run_config(run_values(video={"encoder": "folder", "projector": "moe", "budgets": ["/2"]})).model.video
    assert lips is not None
    assert lips.encoder == LipsConfig(source="folder")
    assert lips.projector == MoeConfig()


def test_the_command_line_changes_one_key_and_leaves_the_others(tmp_path: Path) -> None:
    values = run_values(image={"encoder": {"source": "clip", "feature_layer": -1}, "budgets": [1, 4]})
    values["model"]["adapter"] = {"kind": "lora", "rank": 4}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(values))

    def model(*words: str) -> Any:
        return parse(["train", "--config", str(tmp_path / "run.yaml"), *words])[1].model

    assert (model().image.encoder.source, model().image.encoder.feature_layer) == ("clip", -1)
    moved = model("--model.image.encoder", "siglip").image.encoder
    assert (moved.source, moved.feature_layer) == ("siglip", -1)
    assert model("--model.image.compressor", "query").image.num_queries == 4
    assert model("--model.image.budgets", "9", "--model.image.budgets", "16").image.budgets == [9, 16]
    assert model("--model.image.budgets", "{start: 2, stop: 6, step: 2}").image.values == [6, 4, 2]
    assert model("--model.adapter", "null").adapter is None
    assert model("--model.video", "null").video is None
    bank = model("--model.adapter", "{kind: lora_bank, variant: ms}").adapter
    assert bank == LoraBankConfig(variant="ms")
    with pytest.raises(
        ValueError, match=r"model.adapter.rank goes with kind lora or lora_bank or gated_lora, not with mome"
    ):
        model("--model.adapter.kind", "mome")
    assert parse(["train", "--config", str(tmp_path / "run.yaml"), "--train.learning_rate", "1e-4"])[1].train
    assert model("--model.image.projector.hidden_size", "64").image.projector.hidden_size == 64


def test_a_number_may_be_written_as_everybody_does() -> None:
    values = run_values()
    values["train"] |= yaml.safe_load("{learning_rate: 2.0e-5}")
    assert read_run_config(values).train.learning_rate == 2e-5
    values["train"]["learning_rate"] = "fast"
    with pytest.raises(ValueError, match=r"train.learning_rate: expected float, got fast"):
        read_run_config(values)


def test_a_config_is_written_as_values_and_reads_as_the_same() -> None:
    config = read_run_config(run_values(adapter={"kind": "lora_bank", "variant": "mss"}))
    written = config_yaml(config)
    assert "null" not in written
    assert read_run_config(yaml.safe_load(written)) == config


def test_the_help_of_train_fits_one_screen_and_every_key_is_listed() -> None:
    screen = help_text(Settings, "mllm train")
    assert len(screen.splitlines()) <= 40
    groups = [name for name, key in keys_of(Settings) if key.classes and name.count(".") < 3]
    assert all(f"  {group} " in screen for group in groups)
    every = help_text(Settings, "mllm train", "all")
    for name, key in keys_of(Settings):
        if not key.classes and not name.endswith(".kind"):
            assert f"--{name} " in every
    for name in (name for name, key in keys_of(RunConfig) if key.classes):
        assert help_text(Settings, "mllm train", name).splitlines()[1] == f"{name}:"
    lines = help_text(Settings, "mllm train", "model.audio.compressor")
    assert "with kind: query" in lines
    assert "--model.audio.compressor.window_frames INT  (required)" in lines
    with pytest.raises(ValueError, match=r"--help model.image.compresor is no group of options; did you mean"):
        help_text(Settings, "mllm train", "model.image.compresor")


def test_every_key_has_a_line_of_help() -> None:
    every = help_text(Settings, "mllm train", "all").splitlines()
    keys = [number for number, line in enumerate(every) if line.startswith("  --") and "FILE" not in line]
    assert len(keys) > 100
    assert all(every[number + 1].startswith("      ") for number in keys)


def test_a_key_of_a_reader_is_named_in_full() -> None:
    values = run_values()
    values["data"]["reader"] = {"format": "llava", "tasks": ["asr"]}
    with pytest.raises(ValueError, match=r"data.reader.tasks goes with the formats auto_avsr"):
        read_run_config(values)


@pytest.mark.parametrize("text", ["a: " + "[" * 20_000, "a: " + "{a: " * 5_000])
def test_yaml_that_is_nested_too_deeply_is_refused_in_few_words(text: str) -> None:
    with pytest.raises(ValueError, match=r"^'a: .*\.\.\.' is n(ested too deeply to be read as|ot) YAML") as caught:
        parse_yaml(text)
    assert len(str(caught.value)) < 600
