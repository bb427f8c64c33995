"""Two CPU processes are one training: they end where one process ends that saw the same batches.

Each test starts a launcher once and compares files: weights, moments and the log. One of the runs continues what one
process has begun: checkpoints know neither the number of processes nor the ZeRO stage.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch
import worker
from launches import CONFIGS, assert_same_run, launch
from safetensors.torch import load_file

from mllm.training.checkpoint import TRAINABLES
from mllm.training.run_folder import read_checkpoint


@pytest.fixture(scope="module")
def one_process(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same runs on one process, with as many micro-batches per step."""
    folder = tmp_path_factory.mktemp("one")
    for name in ("even", "skewed"):
        worker.run_scenario(name, worker.scenario_settings(name, folder, 1))
    return folder


def launch_all(tmp_path: Path, one_process: Path, *options: str | Path) -> None:
    """Run every scenario on two processes, one of them from the middle of the run of one process, and compare."""
    shutil.copytree(one_process / "even", tmp_path / "resumed")
    shutil.rmtree(tmp_path / "resumed" / "checkpoint-00000004")
    launch(tmp_path, *worker.SCENARIOS, *options, timeout=900)
    for name in worker.SCENARIOS:
        assert_same_run(one_process / ("even" if name == "resumed" else name), tmp_path / name)
        assert read_checkpoint(tmp_path / name / "checkpoint-00000004").facts["processes"] == 2


@pytest.mark.slow
def test_ddp_equals_one_process_also_where_a_process_lacks_a_medium(tmp_path: Path, one_process: Path) -> None:
    launch_all(tmp_path, one_process)
    sampled = [(tmp_path / f"skewed-draws-{rank}.txt").read_text() for rank in range(2)]
    assert sampled[0] == sampled[1]
    assert len(set(sampled[0].splitlines())) > 2


@pytest.mark.slow
def test_one_budget_at_a_time_is_the_same_run_also_where_processes_run_different_numbers(
    tmp_path: Path, one_process: Path
) -> None:
    launch(tmp_path, *worker.LOW_SCENARIOS, *worker.TAUGHT_SCENARIOS)
    assert_same_run(one_process / "skewed", tmp_path / "low")
    # With a frozen teacher too, of which every process has a copy: one launch for both spares half a minute.
    worker.run_scenario("taught", worker.scenario_settings("taught", tmp_path / "one", 1))
    assert_same_run(tmp_path / "one" / "taught", tmp_path / "taught")


@pytest.mark.slow
@pytest.mark.parametrize("start", ["captions", "words"])
def test_projectors_start_alike_on_two_processes_also_where_one_lacks_a_medium(tmp_path: Path, start: str) -> None:
    worker.STARTS[start](tmp_path, 0, 1)
    launch(tmp_path, start)
    expected = load_file(tmp_path / f"{start}-0-of-1.safetensors")
    for rank in range(2):
        saved = load_file(tmp_path / f"{start}-{rank}-of-2.safetensors")
        assert saved.keys() == expected.keys()
        for key, value in expected.items():
            torch.testing.assert_close(saved[key], value, rtol=1e-4, atol=1e-5, msg=lambda m, k=key: f"{k}: {m}")


@pytest.mark.slow
@pytest.mark.parametrize("stage", [2, 3])
def test_zero_equals_one_process_also_where_a_process_lacks_a_medium(
    tmp_path: Path, one_process: Path, stage: int
) -> None:
    launch_all(tmp_path, one_process, "--deepspeed", CONFIGS / f"zero{stage}.json")


@pytest.mark.slow
def test_fsdp2_equals_one_process_with_half_of_the_frozen_llm_on_each(tmp_path: Path, one_process: Path) -> None:
    worker.run_scenario("mome", worker.scenario_settings("mome", tmp_path / "one", 1))
    shutil.copytree(one_process / "even", tmp_path / "resumed")
    shutil.rmtree(tmp_path / "resumed" / "checkpoint-00000004")
    launch(tmp_path, "skewed", "resumed", "mome", "--fsdp2")
    assert_same_run(one_process / "skewed", tmp_path / "skewed")
    assert_same_run(one_process / "even", tmp_path / "resumed")
    # Experts report their balance from every layer, and FSDP2 copies some of what it hands to a layer.
    assert_same_run(tmp_path / "one" / "mome", tmp_path / "mome", weights_atol=1e-4)
    for name in ("skewed", "resumed", "mome"):
        counts = [json.loads((tmp_path / f"{name}-frozen-{rank}.json").read_text()) for rank in range(2)]
        assert len(counts[0]) == 18  # nine matrices and norms in each of two layers
        for parameter, (here, everything) in counts[0].items():
            assert [here, everything] == counts[1][parameter] == [everything // 2, everything]


@pytest.mark.slow
@pytest.mark.parametrize("stage", [None, 2])
def test_tables_of_words_are_held_and_kept_also_by_zero(tmp_path: Path, stage: int | None) -> None:
    worker.run_scenario("hearing", worker.scenario_settings("hearing", tmp_path / "one", 1))
    whole = tmp_path / "one" / "hearing"
    shutil.copytree(whole, tmp_path / "hearing")
    shutil.rmtree(tmp_path / "hearing" / "checkpoint-00000004")
    options = [] if stage is None else ["--deepspeed", CONFIGS / f"zero{stage}.json"]
    launch(tmp_path, "hearing", *options)
    assert_same_run(whole, tmp_path / "hearing")
    first, last = (load_file(tmp_path / "hearing" / f"checkpoint-0000000{n}" / TRAINABLES) for n in (2, 4))
    held = {name for name in first if ".word_table." in name}
    assert len(held) == 3
    assert {name for name, value in first.items() if value.equal(last[name])} >= held
    assert not first[name := "model.compressors.audio.projectors.0.linear.weight"].equal(last[name])


@pytest.mark.slow
@pytest.mark.parametrize("stage", [None, 2, 3])
def test_an_llm_that_trains_whole_is_saved_whole_from_two_processes(tmp_path: Path, stage: int | None) -> None:
    worker.run_scenario("whole", worker.scenario_settings("whole", tmp_path / "one", 1))
    options = [] if stage is None else ["--deepspeed", CONFIGS / f"zero{stage}.json"]
    launch(tmp_path, "whole", *options, timeout=900)
    assert_same_run(tmp_path / "one" / "whole", tmp_path / "whole", weights_atol=5e-5)
    names = load_file(tmp_path / "whole" / "checkpoint-00000004" / TRAINABLES).keys()
    assert any(".mlp.down_proj." in name for name in names)
    assert any(name.startswith("model.compressors.image.") for name in names)
    assert not any("vision_tower" in name for name in names)
