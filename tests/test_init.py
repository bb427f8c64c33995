"""`mllm init` writes a config that training reads, and leaves alone what is there."""

from pathlib import Path

import pytest
import yaml
from published_parts import build_on_meta

from mllm.budget import Budget
from mllm.cli import main
from mllm.config.run import RunConfig, read_run_config
from mllm.model.trainables import set_trainables


def written(tmp_path: Path, *words: str) -> RunConfig:
    path = tmp_path / "own.yaml"
    assert main(["init", str(path), *words]) == 0
    text = path.read_text()
    assert text.count("#") > 10
    return read_run_config(yaml.safe_load(text))


MEDIA = ["image", "audio", "video"]


@pytest.mark.parametrize("built_in", [False, True])
@pytest.mark.parametrize("media", [["image"], ["audio"], ["video"], ["image", "video"], ["audio", "video"], MEDIA])
def test_the_file_is_a_config_whose_model_builds_and_serves_its_budgets(
    tmp_path: Path, media: list[str], built_in: bool
) -> None:
    words = [word for medium in media for word in ("--media", medium)]
    if media[-1] == "video" and "image" not in media and not built_in:
        words += ["--video_encoder", "checkpoints/av-hubert-large"]
    path = written(tmp_path, *words, *(["--built_in"] if built_in else []))
    assert list(path.model.media) == [medium for medium in MEDIA if medium in media]
    if built_in:
        assert path.model.llm == "synthetic:llm"
        assert all(source.startswith("synthetic:") for source in path.model.sources.values())
    assert path.train.out == "runs/own"
    model = build_on_meta(path.model)
    names = set_trainables(model, path.parts)
    assert any(".lora_" in name for name in names)
    assert model.config.space.is_trained(Budget.parse(",".join(f"{medium}=max" for medium in path.model.encoded_media)))


def test_what_is_named_stands_in_the_file(tmp_path: Path) -> None:
    words = ["--media", "image", "--media", "audio", "--media", "video", "--llm", "my: model", "--root", "a folder"]
    words += ["--image_encoder", "google/siglip2-base-patch16-256", "--audio_encoder", "microsoft/wavlm-large"]
    words += ["--video_encoder", "lips", "--manifest", "data/my train.jsonl", "--run_folder", "o: x"]
    config = written(tmp_path, *words)
    assert (config.model.llm, config.data.root, config.train.out) == ("my: model", "a folder", "o: x")
    assert config.data.train == ["data/my train.jsonl"]
    encoders = [one.encoder.source for one in config.model.media.values()]
    assert encoders == ["google/siglip2-base-patch16-256", "microsoft/wavlm-large", "lips"]


def test_nothing_is_overwritten_and_what_cannot_be_is_refused(tmp_path: Path, capsys) -> None:
    path = tmp_path / "own.yaml"
    path.write_text("mine")
    assert main(["init", str(path)]) == 2
    assert f"{path} is there already and is left as it is; give another name" in capsys.readouterr().err
    assert path.read_text() == "mine"
    assert main(["init", str(tmp_path / "b.yaml"), "--media", "video"]) == 2
    assert "add --media image for videos of anything" in capsys.readouterr().err
    assert main(["init", str(tmp_path / "b.yaml"), "--audio_encoder", "x"]) == 2
    assert "audio_encoder is set, but media leaves audio out; add --media audio" in capsys.readouterr().err
    assert not (tmp_path / "b.yaml").exists()


def test_what_to_type_next_is_told(tmp_path: Path, capsys) -> None:
    written(tmp_path, "--built_in")
    shown = capsys.readouterr().out.splitlines()
    assert shown[1:] == ["  mllm data check train.jsonl", f"  mllm train --config {tmp_path / 'own.yaml'}"]
