"""A run is usable wherever it lies: its checkpoints before it ends, and its frozen parts after a move."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import load_file

import mllm
from mllm.checkpoints.export import export
from mllm.checkpoints.load import TRAINABLES
from mllm.cli import main
from mllm.config.run import DataConfig, RunConfig, SamplerConfig, TrainConfig
from mllm.data.manifest import Media, Message, Sample, Text, write_manifest
from mllm.training.run import train

PARTS = ("llm", "audio")


def settings_of(project: Path, run: str, **train) -> RunConfig:
    """A run that names its parts as a user in the project's folder does."""
    steps = {"max_steps": 4, "save_every": 2, "progress": False, "use_cpu": True, "tensorboard": False, **train}
    return RunConfig(
        model=tiny.settings_on({name: f"parts/{name}" for name in PARTS}, ("audio",)),
        data=DataConfig(
            train=[str(project / "train.jsonl")],
            validation=[str(project / "train.jsonl")],
            tokens_per_batch=512,
            num_workers=0,
        ),
        sampler=SamplerConfig(mode="random", num_budgets=1),
        train=TrainConfig(**{"out": run, **steps}),
    )


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project with parts, a finished run, and one that was interrupted after its first checkpoint."""
    project = tmp_path_factory.mktemp("moved") / "project"
    tiny.write_parts(project / "parts")
    samples = []
    for seed in range(3):
        files = tiny.write_media(project / "media", seed=seed, seconds=0.4)
        content = (Media("audio", f"media/{files['audio']}"), Text("what is it?"))
        messages = (Message("user", content), Message("assistant", (Text(f"answer {seed}"),)))
        samples.append(Sample(f"sample{seed}", messages, task="asr"))
    write_manifest(project / "train.jsonl", samples)

    def interrupt(*_: object) -> dict[str, float]:
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(project)
        train(settings_of(project, "runs/whole"))
        with pytest.raises(KeyboardInterrupt):
            train(settings_of(project, "runs/cut", validate_every=3), metric=interrupt)
    return project


@pytest.fixture
def project(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The project, where it was trained; whatever a test moves is put back. The test runs in another folder."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(trained, tmp_path / "kept")
    yield trained
    shutil.rmtree(trained, ignore_errors=True)
    shutil.copytree(tmp_path / "kept", trained)


def holds(model, file: Path) -> bool:
    """Whether a model's trained values are those of a file."""
    parameters, saved = dict(model.named_parameters()), load_file(file)
    return bool(saved) and all(torch.equal(value, parameters[name]) for name, value in saved.items())


def test_an_interrupted_run_answers_from_its_checkpoints(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = project / "runs" / "cut"
    file = run / "checkpoint-00000002" / TRAINABLES
    assert not (run / TRAINABLES).exists()
    with pytest.raises(FileNotFoundError, match=r"holds no model: .* it holds checkpoint-00000002: give one as checkp"):
        mllm.load(run)
    for model, _ in (
        mllm.load(run / "checkpoint-00000002"),
        mllm.load(run, checkpoint=2),
        mllm.load(run, checkpoint="checkpoint-00000002"),
        mllm.load(run, checkpoint="auto"),
    ):
        assert holds(model, file)
    with pytest.raises(FileNotFoundError, match=r"checkpoint 3 is not in .*; it holds checkpoint-00000002"):
        mllm.load(run, checkpoint=3)
    audio = str(project / "media" / "0.wav")
    for words in (["--model", str(run / "checkpoint-00000002")], ["--model", str(run), "--checkpoint", "auto"]):
        assert main(["generate", *words, "--audio", audio, "--max_new_tokens", "2", "--use_cpu"]) == 0
    assert main(["generate", "--model", str(run), "--audio", audio]) == 2
    assert "give one as checkpoint" in capsys.readouterr().err


def test_a_checkpoint_is_evaluated_and_exported(project: Path, tmp_path: Path) -> None:
    run = project / "runs" / "whole"
    words = ["--model", str(run), "--checkpoint", "2", "--manifest", str(project / "train.jsonl")]
    assert main(["evaluate", *words, "--budgets", "audio=/4", "--max_new_tokens", "2", "--use_cpu"]) == 0
    assert (run / "evaluation-checkpoint-00000002" / "results.json").is_file()
    export(run, tmp_path / "two", checkpoint=2)
    export(run, tmp_path / "end")
    two, end = (load_file(tmp_path / name / "model.safetensors") for name in ("two", "end"))
    key = "model.compressors.audio.projectors.0.0.weight"
    assert torch.equal(two[key], load_file(run / "checkpoint-00000002" / TRAINABLES)[key])
    assert torch.equal(end[key], load_file(run / TRAINABLES)[key])
    assert not torch.equal(two[key], end[key])


def test_relative_paths_are_found_from_any_folder_and_after_a_move(project: Path, tmp_path: Path) -> None:
    file = tmp_path / "kept" / "runs" / "whole" / TRAINABLES
    assert holds(mllm.load(project / "runs" / "whole")[0], file)
    shutil.move(project / "runs" / "whole", tmp_path / "alone")  # the run; its parts stay where they were
    assert holds(mllm.load(tmp_path / "alone")[0], file)
    shutil.move(tmp_path / "alone", project / "runs" / "whole")
    shutil.move(project, tmp_path / "elsewhere")  # everything together
    model, _ = mllm.load(tmp_path / "elsewhere" / "runs" / "whole")
    assert holds(model, file)
    assert model.config.sources["llm"]["reference"] == str(tmp_path / "elsewhere" / "parts" / "llm")


def test_a_run_of_before_places_were_noted_is_found_beside_its_parents(project: Path, tmp_path: Path) -> None:
    config = project / "runs" / "whole" / "config.json"
    values = json.loads(config.read_text())
    values["sources"] = {
        part: {key: source[key] for key in ("reference", "sha256")} for part, source in values["sources"].items()
    }
    assert {source["reference"] for source in values["sources"].values()} == {"parts/llm", "parts/audio"}
    config.write_text(json.dumps(values))
    config.with_name("manifest.json").unlink()  # such runs had none
    assert holds(mllm.load(project / "runs" / "whole")[0], tmp_path / "kept" / "runs" / "whole" / TRAINABLES)


def test_parts_that_are_gone_are_named_with_the_option_that_works(
    project: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.move(project / "parts" / "llm", tmp_path / "llm")
    run, audio = project / "runs" / "whole", str(project / "media" / "0.wav")
    message = rf"the folder {project}/parts/llm is not there, .*; pass --sources\.llm"
    with pytest.raises(FileNotFoundError, match=message):
        mllm.load(run)
    assert holds(mllm.load(run, sources={"llm": str(tmp_path / "llm")})[0], run / TRAINABLES)
    with pytest.raises(ValueError, match="sources names 'lm'; the frozen parts of this model are audio, llm"):
        mllm.load(run, sources={"lm": str(tmp_path / "llm")})
    with pytest.raises(FileNotFoundError, match=r"the folder nowhere is not there"):
        mllm.load(run, sources={"llm": "nowhere"})
    with pytest.raises(
        FileNotFoundError, match=r"org/llm is not there, which --sources\.llm .*no name on a hub"
    ) as refusal:
        mllm.load(run, sources={"llm": "org/llm"})
    assert "SHA-256" in str(refusal.value)
    assert "pass --sources" not in str(refusal.value)
    words = ["--model", str(run), "--sources.llm", str(tmp_path / "llm")]
    assert main(["generate", *words, "--audio", audio, "--max_new_tokens", "2", "--use_cpu"]) == 0
    assert main(["export", *words, "--out", str(tmp_path / "out")]) == 0
    manifest = ["--manifest", str(project / "train.jsonl"), "--budgets", "audio=/8", "--max_new_tokens", "2"]
    assert main(["evaluate", *words, *manifest, "--use_cpu"]) == 0
    assert main(["generate", *words[:2], "--audio", audio]) == 2
    assert "pass --sources.llm" in capsys.readouterr().err
    with pytest.raises(ValueError, match=r"sources is given, but .*out is no run"):
        mllm.load(tmp_path / "out", sources={"llm": str(tmp_path / "llm")})


def test_other_weights_are_refused_as_a_source(project: Path, tmp_path: Path) -> None:
    tiny.write_parts(tmp_path / "others", hidden_size=64)
    with pytest.raises(ValueError, match=r"the weights of llm in .* are not those this model was trained on"):
        mllm.load(project / "runs" / "whole", sources={"llm": str(tmp_path / "others" / "llm")})


def test_a_run_goes_on_with_parts_that_were_moved(project: Path, tmp_path: Path) -> None:
    shutil.move(project / "parts" / "llm", tmp_path / "llm")
    run = project / "runs" / "cut"
    settings = settings_of(project, str(run), validate_every=3)
    with pytest.raises(FileNotFoundError, match=r"parts/llm is not there, .*; pass --sources\.llm"):
        train(settings, resume="auto")
    with pytest.raises(ValueError, match="sources goes with resume"):
        train(settings_of(project, str(tmp_path / "new")), sources={"llm": str(tmp_path / "llm")})
    train(settings, resume="auto", sources={"llm": str(tmp_path / "llm")})
    whole = load_file(project / "runs" / "whole" / TRAINABLES)
    assert all(torch.equal(value, whole[name]) for name, value in load_file(run / TRAINABLES).items())
    assert holds(mllm.load(run)[0], run / TRAINABLES)  # the new place was noted


def test_a_run_goes_on_from_another_folder(project: Path) -> None:
    """The parts are found although `parts/llm` is nothing here."""
    run = project / "runs" / "cut"
    train(settings_of(project, str(run), validate_every=3), resume="auto")
    assert holds(mllm.load(run)[0], run / TRAINABLES)
