"""The long demo: which models it makes, what it concludes from which errors, and a run of it at the smallest size."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from mllm.cli import main
from mllm.commands.demo import Settings
from mllm.synthetic.demo.cells import Cell
from mllm.synthetic.demo.demo import DemoConfig
from mllm.synthetic.demo.full_speech import (
    ELASTIC,
    SEPARATE,
    FullDemoConfig,
    Job,
    evaluation_settings,
    jobs_of,
    run_settings,
    steps_of,
)
from mllm.synthetic.demo.full_speech_report import Column, columns, comparison_rows, findings, markdown, read_cells

SETTINGS = FullDemoConfig(num_seeds=2, steps=20)
NUM_UTTERANCES, NUM_WORDS = 100, 10


def cells(**changes: int) -> dict[tuple[str, Column], Cell]:
    """Cells that show everything; `changes` are errors of 1000 words by model, task, budget and noise."""
    base = {"asr": 100, "vsr": 300, "avsr": 80}
    made = {}
    for model in (SEPARATE, *ELASTIC):
        for column in columns():
            noisy = 0 if column.snr_db is None else 200
            errors = changes.get(f"{model}:{column.task}:{column.budget}:{column.snr_db}", base[column.task] + noisy)
            spread = tuple(errors // NUM_UTTERANCES + (index < errors % NUM_UTTERANCES) for index in range(100))
            made[model, column] = Cell(spread, (NUM_WORDS,) * NUM_UTTERANCES, (errors / 1000,) * 2)
    return made


def test_every_task_and_rate_has_a_separate_model_and_every_seed_has_all() -> None:
    jobs = jobs_of(SETTINGS)
    assert len({job.name for job in jobs}) == len(jobs) == 2 * (8 + len(ELASTIC))
    budgets = [(job.task, *job.budgets) for job in jobs if job.model == SEPARATE and job.seed == 1]
    assert sorted(budgets) == sorted((column.task, column.budget) for column in columns() if column.snr_db is None)
    assert {steps_of(job, SETTINGS) for job in jobs if job.model in ELASTIC} == {60}


def test_a_separate_model_is_trained_and_tested_on_nothing_else() -> None:
    job = Job(SEPARATE, 1, "vsr", video_rate=5)
    run = run_settings(job, SETTINGS)
    assert (run.model.audio, run.model.image, run.model.video.budgets) == (None, None, ["/5"])
    assert [Path(path).name for path in run.data.train] == ["train-vsr.jsonl"]
    assert (run.data.noise, run.train.max_steps, run.train.seed) == (None, 20, 1)
    evaluation = evaluation_settings(job, SETTINGS)
    assert (evaluation.budgets, evaluation.snr_db, evaluation.noise) == (["video=/5"], [None], None)


@pytest.mark.parametrize("model", list(ELASTIC))
def test_an_elastic_model_learns_all_tasks_and_rates(model: str) -> None:
    run = run_settings(Job(model, 0), SETTINGS)
    assert (run.model.audio.budgets, run.model.video.budgets) == (["/4", "/16"], ["/2", "/5"])
    assert [Path(path).name for path in run.data.train] == [f"train-{task}.jsonl" for task in ("asr", "vsr", "avsr")]
    assert run.model.adapter.kind == ELASTIC[model]["kind"]
    assert len(evaluation_settings(Job(model, 0), SETTINGS).budgets) == 4


def test_findings_hold_where_they_are_there() -> None:
    assert all(finding.holds for finding in findings(cells()))
    assert len(findings(cells())) == 2 + 3 * 2


@pytest.mark.parametrize(
    ("changes", "claim"),
    [
        ({"omni_st:vsr:video=/5:None": 311}, "Omni ST is within one point"),
        ({"mome:avsr:audio=/16,video=/2:None": 91}, "MoME is within one point"),
        ({"omni_st:avsr:audio=/4,video=/5:0.0": 301}, "Omni ST: with lips fewer errors than without at 0 dB"),
        ({"mome:asr:audio=/16:-5.0": 279}, "MoME: with lips fewer errors than without at -5 dB"),
    ],
)
def test_what_does_not_hold_is_said_not_to(changes: dict[str, int], claim: str) -> None:
    wrong = [finding.claim for finding in findings(cells(**changes)) if not finding.holds]
    assert len(wrong) == 1
    assert wrong[0].startswith(claim)


def test_a_difference_is_of_the_same_utterances() -> None:
    """Errors that differ from utterance to utterance make wide intervals, and none where both models share them."""
    uneven = Cell(tuple(10 * (index % 2) for index in range(100)), (10,) * 100, (0.5,))
    shifted = replace(uneven, errors=tuple(count + 1 for count in uneven.errors))
    low, high = uneven.interval
    assert high - low > 0.15
    gap, low, high = shifted.minus(uneven)
    assert (gap, low, high) == pytest.approx((0.1, 0.1, 0.1))


def test_the_table_has_the_columns_of_the_papers_and_the_file_every_number() -> None:
    made = cells(**{"omni_st:asr:audio=/4:None": 105})
    lines = markdown(made).splitlines()
    assert (
        "| WER % | ASR (4) | ASR (16) | VSR (2) | VSR (5) | AVSR (4,2) | AVSR (4,5) | AVSR (16,2) | AVSR (16,5) |"
        in lines
    )
    assert any(line.startswith("| Omni ST | 10.5 (") for line in lines)
    assert any(line.startswith("| Omni ST - separate | +0.5 (") for line in lines)
    rows = comparison_rows(made)
    assert len(rows) == 3 * len(columns())
    (one,) = [row for row in rows if (row["model"], row["budget"], row["snr_db"]) == ("omni_st", "audio=/4", None)]
    assert one["tokens_per_second"] == 12.5
    assert one["minus_separate"][0] == pytest.approx(0.005)


def test_the_command_chooses_the_demo_and_refuses_keys_of_the_other() -> None:
    assert Settings(full=True, num_seeds=2).chosen() == FullDemoConfig(num_seeds=2)
    assert Settings(num_scenes=5).chosen() == DemoConfig(num_scenes=5)
    with pytest.raises(ValueError, match=r"num_scenes does not go with full=true about speech; allowed: out, seed"):
        Settings(full=True, num_scenes=5).chosen()
    with pytest.raises(ValueError, match=r"num_seeds does not go with full=false"):
        Settings(num_seeds=5).chosen()
    with pytest.raises(ValueError, match=r"steps is 0; it must be at least 1"):
        Settings(full=True, steps=0).chosen()


@pytest.mark.slow
def test_the_long_demo_at_its_smallest_makes_every_model_and_the_comparison(tmp_path: Path) -> None:
    out = tmp_path / "full"
    sizes = ["--steps", "2", "--num_utterances", "12", "--num_test_utterances", "3", "--num_seeds", "1"]
    status = main(["demo", "--full", "--out", str(out), *sizes])
    settings = FullDemoConfig(out=str(out), steps=2, num_utterances=12, num_test_utterances=3, num_seeds=1)
    read = read_cells(settings)
    assert set(read) == {(model, column) for model in (SEPARATE, *ELASTIC) for column in columns()}
    assert all(len(cell.errors) == 3 for cell in read.values())
    assert status == int(not all(finding.holds for finding in findings(read)))
    rows = json.loads((out / "comparison.json").read_text())["rows"]
    assert {row["model"] for row in rows} == {SEPARATE, *ELASTIC}
    assert (out / "comparison.png").stat().st_size > 10_000
    assert (out / "mome" / "0" / "experts.png").exists()
