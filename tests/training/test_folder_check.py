"""Runs and exports are sealed: what has changed is named before it is loaded, and `mllm check` lists all of it."""

import random
import shutil
from pathlib import Path

import pytest
import tiny
import torch

from mllm.checkpoints.build import build
from mllm.checkpoints.export import export
from mllm.checkpoints.load import TRAINABLES, load, save_processor, save_run
from mllm.cli import main
from mllm.model.trainables import set_trainables
from mllm.training.folder_check import check_folder
from mllm.training.run_folder import write_checkpoint
from mllm.utils.run_paths import BEST
from mllm.utils.sealing import MANIFEST, read_manifest, unchecked


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder on parts of its own, with a checkpoint, and an export of it."""
    folder = tmp_path_factory.mktemp("sealed")
    settings = tiny.settings_on(tiny.write_parts(folder / "parts"), ["audio"])
    model, processor = build(settings)
    set_trainables(model, ("compressors", "adapter"))
    save_run(model, processor, folder / "run")

    def copy(aside: Path) -> None:
        for name in ("config.json", TRAINABLES):
            shutil.copy(folder / "run" / name, aside / name)

    write_checkpoint(folder / "run", 7, copy, {})
    export(folder / "run", folder / "export")
    return folder


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(made, tmp_path / "copy"))


def damage(file: Path, rng: random.Random) -> None:
    content = bytearray(file.read_bytes())
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    file.write_bytes(content)


@pytest.mark.parametrize("kind", ["run", "export"])
def test_one_flipped_bit_in_any_file_is_found_before_anything_is_loaded(folder: Path, kind: str) -> None:
    """Half of such weights load without an error, with other values."""
    home, rng = folder / kind, random.Random(0)
    names = read_manifest(home)["files"]
    assert {"config.json", "processor_config.json", "tokenizer.json"} < set(names)
    for name in names:
        whole = (home / name).read_bytes()
        damage(home / name, rng)
        with pytest.raises(ValueError, match=rf"{home} is damaged: {name} has"):
            load(home)
        (home / name).write_bytes(whole)
    load(home)


def test_weights_of_huge_models_are_loaded_without_digests_where_that_is_asked_for(folder: Path) -> None:
    home = folder / "run"
    content = bytearray((home / TRAINABLES).read_bytes())
    content[-1] ^= 1
    (home / TRAINABLES).write_bytes(content)
    with unchecked():
        model, _ = load(home, sources={"llm": str(folder / "parts" / "llm")})
    assert torch.isfinite(torch.cat([p.flatten() for p in model.parameters()])).any()


def test_the_command_lists_everything_that_is_wrong(
    made: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = folder / "run"
    shutil.rmtree(folder / "parts")  # it would be found beside the run, and is whole
    part = made / "parts" / "llm" / "model.safetensors"
    assert main(["check", str(run)]) == 0
    said = capsys.readouterr().out
    assert f"{run / 'checkpoint-00000007'} is whole: step 7, 2 files" in said
    assert "llm in " in said
    (run / "config.json").unlink()
    (run / "tokenizer.json").write_text("{}")
    (run / "checkpoint-00000007" / TRAINABLES).write_bytes(b"cut")
    whole = part.read_bytes()
    damage(part, random.Random(1))
    assert main(["check", str(run)]) == 1
    part.write_bytes(whole)
    said = capsys.readouterr().out
    for problem in (
        f"{run} is incomplete: config.json is missing",
        f"{run} is damaged: tokenizer.json has 2 bytes",
        f"{run / 'checkpoint-00000007'} is damaged: {TRAINABLES} has 3 bytes",
        f"llm in {made / 'parts' / 'llm'} is not what the model was trained on",
        "4 problems",
    ):
        assert problem in said


def test_a_run_that_goes_on_renews_the_digests_of_its_processor(folder: Path) -> None:
    _, processor = load(folder / "run")
    (folder / "run" / "processor_config.json").write_text("{}")
    save_processor(processor, folder / "run")
    assert check_folder(folder / "run").problems == []


def test_a_processor_with_a_folder_of_its_own_is_written_again(made: Path, tmp_path: Path) -> None:
    """A tokenizer with several chat templates keeps them in a folder; a run writes it at its start and its end."""
    model, processor = load(made / "run")
    set_trainables(model, ("compressors", "adapter"))
    processor.tokenizer.chat_template = {"default": "{{ messages }}", "tool_use": "before"}
    save_processor(processor, tmp_path)
    processor.tokenizer.chat_template["tool_use"] = "{{ tools }}"
    save_run(model, processor, tmp_path)
    save_processor(processor, tmp_path)
    template = "additional_chat_templates/tool_use.jinja"
    assert (tmp_path / template).read_text() == "{{ tools }}"
    assert template in read_manifest(tmp_path)["files"]
    assert check_folder(tmp_path).problems == []


def test_the_best_model_of_a_run_is_checked_with_it(folder: Path) -> None:
    run = folder / "run"
    model, processor = load(run)
    set_trainables(model, ("compressors", "adapter"))
    save_run(model, processor, run / BEST)
    assert f"{run / BEST} is whole" in " ".join(check_folder(run).facts)
    damage(run / BEST / TRAINABLES, random.Random(0))
    (problem,) = check_folder(run).problems
    assert problem.startswith(f"{run / BEST} is damaged: {TRAINABLES} has")


def test_a_model_without_digests_loads_and_the_check_says_that_it_has_none(folder: Path) -> None:
    (folder / "run" / MANIFEST).unlink()
    load(folder / "run")
    (problem,) = check_folder(folder / "run").problems
    assert "has no manifest.json" in problem
    with pytest.raises(ValueError, match="holds no model and no checkpoint"):
        check_folder(folder / "parts")
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        check_folder(folder / "none")


def test_nothing_is_written_beside_a_run_folder(made: Path, tmp_path: Path) -> None:
    """A run folder may be a disk of its own, on which a file from another disk cannot take its name in one step."""
    model, processor = load(made / "run")
    set_trainables(model, ("compressors", "adapter"))
    (tmp_path / ".run.writing").write_text("in the way of whatever is written beside the folder")
    save_run(model, processor, tmp_path / "run")
    assert sorted(path.name for path in tmp_path.iterdir()) == [".run.writing", "run"]
    assert check_folder(tmp_path / "run").problems == []
