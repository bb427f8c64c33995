"""What a file may be is a setting wherever files are read, and a refusal names the file and the setting."""

import re
from pathlib import Path

import pytest
import tiny

from mllm.checkpoints.build import build, build_processor
from mllm.checkpoints.load import load, save_run
from mllm.cli import main, parse
from mllm.config.run import DataConfig
from mllm.data.manifest import Media, Message, Sample, Text, write_manifest
from mllm.inference.answerer import Answerer, Decoding
from mllm.media import MediaError, MediaLimits
from mllm.model.trainables import set_trainables
from mllm.training.pipeline.loaders import build_augmentation, loading
from mllm.training.pipeline.token_scan import extents_of


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of a tiny model, and an image, an audio and a video of 0.8 seconds with a manifest."""
    made = tmp_path_factory.mktemp("limits")
    model, processor = build(tiny.settings_on(tiny.write_parts(made / "parts")))
    set_trainables(model, ("compressors", "adapter"))
    save_run(model, processor, made / "run")
    names = tiny.write_media(made)
    messages = (Message("user", (Media("audio", names["audio"]),)), Message("assistant", (Text("place blue"),)))
    write_manifest(made / "speech.jsonl", [Sample("a", messages, "asr")])
    return made


FILES = {"image": "0.png", "audio": "0.wav", "video": "0.mp4"}


def command(folder: Path, medium: str) -> list[str]:
    """A command that reads the file of a medium."""
    file = str(folder / FILES[medium])
    return ["generate", "--model", str(folder / "run"), f"--{medium}", file, "--max_new_tokens", "2", "--use_cpu"]


@pytest.mark.parametrize("medium", FILES)
def test_the_files_are_within_the_limits_that_nobody_changed(folder: Path, medium: str) -> None:
    assert main(command(folder, medium)) == 0


@pytest.mark.parametrize(
    ("medium", "limits"),
    [
        ("image", {"image_pixels": 40 * 60 - 1}),
        ("image", {"image_bytes": 100}),
        ("audio", {"audio_seconds": 0.7}),
        ("audio", {"audio_samples": 100}),
        ("audio", {"audio_bytes": 100}),
        ("video", {"video_seconds": 0.7}),
        ("video", {"video_frames": 19}),
        ("video", {"video_pixels": 48 * 48 - 1}),
        ("video", {"video_decoded_bytes": 100}),
        ("video", {"video_bytes": 100}),
    ],
)
def test_a_limit_is_kept_by_load_and_by_the_command_line_and_named(
    folder: Path, capsys, medium: str, limits: dict[str, float]
) -> None:
    file = folder / FILES[medium]
    ((key, value),) = limits.items()
    model, processor = load(folder / "run", limits=limits)
    with pytest.raises(MediaError, match=rf"^{re.escape(str(file))}: .*\(limits\.{key}\) \(limit\)$"):
        Answerer(model, processor).answer("what?", **{medium: file})
    assert main([*command(folder, medium), f"--limits.{key}", str(value)]) == 2
    assert re.search(rf"{re.escape(str(file))}: .*\(limits\.{key}\)", capsys.readouterr().err)


def test_load_names_a_limit_that_is_none(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"limits\.seconds is no limit; allowed: image_bytes, .*deadline_seconds"):
        load(folder / "run", limits={"seconds": 5})
    with pytest.raises(ValueError, match=r"limits\.video_seconds must be above 0, got 0"):
        load(folder / "run", limits={"video_seconds": 0})
    assert load(folder / "run", limits=MediaLimits(video_seconds=5))[1].limits == MediaLimits(video_seconds=5)


def test_evaluate_and_data_check_keep_limits(folder: Path, tmp_path: Path, capsys) -> None:
    manifest, limit = str(folder / "speech.jsonl"), ["--limits.audio_seconds", "0.7"]
    words = ["evaluate", "--model", str(folder / "run"), "--manifest", manifest, "--budgets", "audio=/4"]
    assert main([*words, "--out", str(tmp_path), "--max_new_tokens", "2", "--use_cpu", *limit]) == 1
    assert "longer than 0.7 seconds (limits.audio_seconds)" in " ".join(capsys.readouterr().err.split())
    assert main(["data", "check", manifest, "--open", *limit]) == 1
    assert "longer than 0.7 seconds (limits.audio_seconds)" in capsys.readouterr().out
    assert main(["data", "check", manifest, "--open"]) == 0


def test_training_keeps_the_limits_of_its_data_block(folder: Path) -> None:
    data = DataConfig(train=["x"], limits=MediaLimits(audio_seconds=0.7))
    processor = load(folder / "run")[1]
    sample = Sample("a", (Message("user", (Media("audio", "0.wav"),)),), "asr", root=folder)
    with pytest.raises(MediaError, match=r"limits\.audio_seconds"):
        loading(data, processor, augmented=True)(sample, generator=None)
    noisy = DataConfig(train=["x"], noise=str(folder / "0.wav"), snr_db=[0.0], limits=data.limits)
    with pytest.raises(MediaError, match=r"limits\.audio_seconds"):
        build_augmentation(noisy)


def test_what_is_built_has_the_limits_it_is_told(tmp_path: Path) -> None:
    settings, limits = tiny.settings_on(tiny.write_parts(tmp_path)), MediaLimits(audio_seconds=0.7)
    assert build_processor(settings).limits == MediaLimits()
    assert build_processor(settings, limits=limits).limits == limits
    assert build(settings, limits=limits)[1].limits == limits


def test_a_file_beyond_the_usual_limits_is_counted_where_they_are_raised(folder: Path) -> None:
    processor = load(folder / "run", limits={"audio_bytes": 10_000})[1]
    sample = Sample("a", (Message("user", (Media("audio", "0.wav"),)),), "asr", root=folder)
    assert extents_of(sample, processor)[0].num_frames == 0  # as one that cannot be read
    processor.limits = MediaLimits()
    assert extents_of(sample, processor)[0].num_frames == 40


def test_a_face_where_lips_are_read_is_refused_with_the_line_to_type(tmp_path: Path, folder: Path, capsys) -> None:
    import av
    import numpy as np

    phone = tmp_path / "my phone.mp4"
    with av.open(str(phone), "w") as container:
        stream = container.add_stream("libx264", rate=25)
        stream.width, stream.height, stream.pix_fmt = 320, 180, "yuv420p"  # type: ignore[union-attr]
        for _ in range(20):
            frame = av.VideoFrame.from_ndarray(np.zeros((180, 320, 3), np.uint8), format="rgb24")
            container.mux(stream.encode(frame))  # type: ignore[union-attr]
        container.mux(stream.encode())  # type: ignore[union-attr]
    words = ["generate", "--model", str(folder / "run"), "--video", str(phone), "--budget", "video=/2", "--use_cpu"]
    assert main(words) == 2
    said = capsys.readouterr().err
    assert "320 x 180 pixels, and lips are read from the middle 32 x 32 (crop_pixels)" in said
    line = re.search(r"first: mllm (prepare lips '[^']+' --out crops)", said)
    assert line is not None
    assert parse(["prepare", "lips", str(phone), "--out", "crops"])[1].source == str(phone)
    assert line[1] == f"prepare lips '{phone}' --out crops"
    with pytest.raises(MediaError, match="crops around the mouth"):
        Answerer(*load(folder / "run"), Decoding(max_new_tokens=2)).answer(video=phone)
