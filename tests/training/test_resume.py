"""A run that is stopped and resumed is the run that was never stopped, bit for bit; and what is refused."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import tiny
import torch
from harness import log_rows, make_trainer, run_settings
from safetensors.torch import load_file, save_file

from mllm.config.model import LoraConfig
from mllm.config.run import RunConfig, SamplerConfig
from mllm.training.checkpoint import (
    OPTIMIZER,
    TRAINABLES,
    check_continues,
    choose_checkpoint,
    set_aside_refused,
)
from mllm.training.run_folder import list_checkpoints, newest_checkpoint, read_checkpoint
from mllm.training.trainer import ElasticTrainer
from mllm.utils.sealing import MANIFEST


def settings_in(output: Path, **train) -> RunConfig:
    """Random budgets, two micro-batches a step, noise by epoch, dropout in the adapter, over an epoch's end."""
    lora = LoraConfig(rank=4, alpha=8, targets=["q_proj", "v_proj"], dropout=0.2)
    model = dataclasses.replace(tiny.settings(("audio", "video")), adapter=lora)
    sampler = SamplerConfig(mode="random", num_budgets=2)
    values = {"accumulation": 2, "save_every": 3, "keep_checkpoints": 5, "warmup_steps": 2, "log_every": 2, **train}
    return run_settings(output, model, sampler=sampler, max_steps=6, **values)


def trained(settings: RunConfig, *, resume: Path | None = None, workers: int = 0) -> ElasticTrainer:
    trainer = make_trainer(settings, rows=10, rows_per_batch=3, workers=workers)
    trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
    return trainer


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of six steps, with checkpoints at 3 and 6."""
    output = tmp_path_factory.mktemp("whole")
    trained(settings_in(output))
    return output


@pytest.mark.parametrize("workers", [0, 2])
def test_a_resumed_run_equals_the_uninterrupted_one_bit_for_bit(tmp_path: Path, whole_run: Path, workers: int) -> None:
    shutil.copytree(whole_run, tmp_path, dirs_exist_ok=True)
    shutil.rmtree(tmp_path / "checkpoint-00000006")
    torch.manual_seed(999)  # what the process did before must not matter
    trained(settings_in(tmp_path), resume=tmp_path / "checkpoint-00000003", workers=workers)
    for name in (TRAINABLES, OPTIMIZER):
        before = load_file(whole_run / "checkpoint-00000006" / name)
        after = load_file(tmp_path / "checkpoint-00000006" / name)
        assert before.keys() == after.keys()
        assert all(torch.equal(value, after[key]) for key, value in before.items())
    rows = [[row for row in log_rows(run) if "loss" in row] for run in (whole_run, tmp_path)]
    assert rows[0] == rows[1]
    assert [row["step"] for row in rows[0]] == [2, 3, 4, 6]


def test_a_checkpoint_holds_what_trains_its_moments_and_no_pickle(whole_run: Path) -> None:
    folder = whole_run / "checkpoint-00000006"
    checkpoint = read_checkpoint(folder)
    assert checkpoint.facts["processes"] == 1
    assert checkpoint.facts["settings"]["train"]["accumulation"] == 2
    trainables = load_file(folder / TRAINABLES)
    assert len(trainables) == 8 + 4 + 8
    assert all(".lora_" in name or name.startswith("model.compressors.") for name in trainables)
    moments = load_file(folder / OPTIMIZER)
    assert {key.partition("|")[2] for key in moments} == set(trainables)
    assert {key.partition("|")[0] for key in moments} == {"step", "exp_avg", "exp_avg_sq"}
    assert {path.name for path in folder.iterdir()} == {
        *(TRAINABLES, OPTIMIZER, MANIFEST, "training.json", "trainer_state.json", "config.json")
    }
    assert not [path for path in whole_run.rglob("*") if path.suffix in (".pt", ".pth", ".bin", ".pkl")]


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        (TRAINABLES, "missing", "does not fit the model: missing model.compressors.audio"),
        (TRAINABLES, "unexpected", "unexpected model.extra"),
        (TRAINABLES, "shape", r"model.compressors.audio.projectors.0.0.bias has shape \(3,\)"),
        (OPTIMIZER, "missing", "does not fit what trains: missing model.compressors.audio"),
        (OPTIMIZER, "unexpected", "unexpected model.extra"),
        (OPTIMIZER, "shape", r"exp_avg of model.compressors.audio.projectors.0.0.bias has shape \(3,\)"),
    ],
)
def test_tensors_that_do_not_fit_are_refused_by_name(
    tmp_path: Path, whole_run: Path, file: str, change: str, message: str
) -> None:
    folder = tmp_path / "checkpoint-00000003"
    shutil.copytree(whole_run / folder.name, folder)
    tensors = load_file(folder / file)
    name = "model.compressors.audio.projectors.0.0.bias"
    keys = [key for key in tensors if key.endswith(name) and not key.startswith(("step", "exp_avg_sq"))]
    if change == "missing":
        tensors = {key: value for key, value in tensors.items() if not key.endswith(name)}
    for key in keys:
        if change == "unexpected":
            tensors[key.replace(name, "model.extra")] = torch.ones(2)
        if change == "shape":
            tensors[key] = torch.ones(3)
    save_file(tensors, folder / file)
    trainer = make_trainer(settings_in(tmp_path))
    with pytest.raises(ValueError, match=message):
        trainer.train(resume_from_checkpoint=str(folder))


def test_which_checkpoint_is_taken(tmp_path: Path, whole_run: Path) -> None:
    run = tmp_path / "run"
    assert choose_checkpoint(run, None) is None
    assert choose_checkpoint(run, "auto") is None
    shutil.copytree(whole_run, run)
    with pytest.raises(ValueError, match="already holds checkpoint-00000006; go on from it with --resume auto"):
        choose_checkpoint(run, None)
    newest = choose_checkpoint(run, "auto")
    assert newest is not None
    assert newest.step == 6
    with pytest.raises(ValueError, match="checkpoint-00000006 is newer than"):
        choose_checkpoint(run, str(run / "checkpoint-00000003"))
    with pytest.raises(ValueError, match="which is not in train"):
        choose_checkpoint(run, str(whole_run / "checkpoint-00000006"))
    (run / "checkpoint-00000006" / OPTIMIZER).write_bytes(b"cut short")
    older = choose_checkpoint(run, "auto")
    assert older is not None
    assert older.step == 3
    set_aside_refused(run, older)
    assert [path.name for path in list_checkpoints(run)] == ["checkpoint-00000003"]
    assert (run / "checkpoint-00000006.refused").is_dir()
    (run / "checkpoint-00000003" / MANIFEST).unlink()
    with pytest.raises(ValueError, match="none of the 1 checkpoints in"):
        choose_checkpoint(run, "auto")


def test_a_run_is_continued_only_as_itself(tmp_path: Path) -> None:
    def facts(settings: RunConfig, processes: int = 1, sources: dict | None = None) -> dict:
        plain = json.loads(json.dumps(dataclasses.asdict(settings)))
        return {"settings": plain, "processes": processes, "sources": sources or {"llm": {"sha256": "a"}}}

    before = facts(settings_in(tmp_path))
    check_continues(before, facts(settings_in(tmp_path, save_every=1, validate_every=None)))
    check_continues(before, facts(settings_in(tmp_path, accumulation=1), processes=2))
    moved = facts(settings_in(tmp_path), sources={"llm": {"sha256": "a", "reference": "elsewhere"}})
    moved["settings"]["model"]["llm"] = "elsewhere"
    check_continues(before, moved)
    with pytest.raises(ValueError, match=r"train.learning_rate was 0.01 and is 0.5; train.seed was 0 and is 1"):
        check_continues(before, facts(settings_in(tmp_path, learning_rate=0.5, seed=1)))
    with pytest.raises(ValueError, match=r"processes x train.accumulation was 2 and is 4 micro-batches per step"):
        check_continues(before, facts(settings_in(tmp_path), processes=2))
    with pytest.raises(ValueError, match=r"frozen part llm.sha256 was 'a' and is 'b'"):
        check_continues(before, facts(settings_in(tmp_path), sources={"llm": {"sha256": "b"}}))


def test_a_kill_while_saving_costs_one_interval(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second checkpoint dies half written; the first is taken, and the resumed run ends as the whole one does."""
    from mllm.training import checkpoint

    real = checkpoint.write_tensors

    def die(tensors, path, *args) -> None:
        if "00000006" in str(path):
            raise KeyboardInterrupt
        real(tensors, path, *args)

    monkeypatch.setattr(checkpoint, "write_tensors", die)
    with pytest.raises(KeyboardInterrupt):
        trained(settings_in(tmp_path))
    monkeypatch.undo()
    newest = newest_checkpoint(tmp_path)
    assert newest is not None
    assert newest.step == 3
    trained(settings_in(tmp_path), resume=newest.folder)
    assert read_checkpoint(tmp_path / "checkpoint-00000006").step == 6
