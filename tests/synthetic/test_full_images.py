"""The long demo of images: which models it makes, what it concludes from which answers, and its smallest run."""

import json
from pathlib import Path

import pytest

from mllm.cli import main
from mllm.commands.demo import Settings
from mllm.synthetic.demo.cells import Cell
from mllm.synthetic.demo.full_images import (
    COUNTS,
    STYLES,
    FullImagesConfig,
    ImageJob,
    evaluation_settings,
    image_jobs,
    run_settings,
)
from mllm.synthetic.demo.full_images_report import ALL, Key, findings, markdown, read_cells
from mllm.synthetic.images.questions import COARSE_KINDS, KINDS

SETTINGS = FullImagesConfig(num_seeds=2, steps=30)
NUM_SCENES = 100


def cells(changes: dict[Key, int] | None = None) -> dict[Key, Cell]:
    """Cells that show everything: errors of 100 scenes, fewer with more tokens; `changes` replace some."""
    made = {}
    for style in STYLES:
        for elastic in (True, False):
            for kind in (*KINDS, ALL):
                for rank, count in enumerate(COUNTS):
                    errors = 1 if kind in COARSE_KINDS else 10 * (rank + 1)
                    errors = (changes or {}).get((style, elastic, kind, count), errors)
                    wrong = tuple(int(index < errors) for index in range(NUM_SCENES))
                    made[style, elastic, kind, count] = Cell(wrong, (1,) * NUM_SCENES, (errors / 100,) * 2)
    return made


def test_every_style_and_count_has_a_separate_model_and_every_seed_has_all() -> None:
    jobs = image_jobs(SETTINGS)
    assert len({job.name for job in jobs}) == len(jobs) == 2 * len(STYLES) * (1 + len(COUNTS))
    assert [job.seed for job in jobs] == sorted(job.seed for job in jobs)


@pytest.mark.parametrize("style", list(STYLES))
def test_elastic_and_separate_models_differ_in_their_counts_and_steps_only(style: str) -> None:
    elastic, separate = (run_settings(ImageJob(style, 1, count), SETTINGS) for count in (None, 16))
    assert (elastic.model.image.budgets, separate.model.image.budgets) == (list(COUNTS), [16])
    assert (elastic.train.max_steps, separate.train.max_steps) == (120, 30)
    assert elastic.data == separate.data
    assert elastic.model.adapter == separate.model.adapter
    assert elastic.train.part_learning_rates == separate.train.part_learning_rates
    assert (elastic.model.audio, elastic.model.video, elastic.data.noise) == (None, None, None)
    assert evaluation_settings(ImageJob(style, 1, 16), SETTINGS).budgets == ["image=16"]
    assert len(evaluation_settings(ImageJob(style, 1), SETTINGS).budgets) == len(COUNTS)


def test_findings_hold_where_they_are_there() -> None:
    said = findings(cells())
    assert len(said) == 3 * len(STYLES)
    assert all(finding.holds for finding in said)


@pytest.mark.parametrize(
    ("changes", "claim"),
    [
        ({("haar", True, ALL, 16): 22}, "Haar (pooled, nested): elastic within one point"),
        ({("m3", True, "letter", 1): 10, ("m3", True, "colour", 1): 10}, "M3 (pooled), elastic: questions of detail"),
        ({("mqt", True, "time", 1): 12}, "MQT (queries), elastic: questions about the whole"),
    ],
)
def test_what_does_not_hold_is_said_not_to(changes: dict[Key, int], claim: str) -> None:
    wrong = [finding.claim for finding in findings(cells(changes)) if not finding.holds]
    assert len(wrong) == 1
    assert wrong[0].startswith(claim)


def test_an_elastic_model_that_is_better_is_no_failure() -> None:
    assert all(finding.holds for finding in findings(cells({("m3", False, ALL, 64): 40})))


def test_the_table_has_elastic_beside_separate_and_their_difference() -> None:
    lines = markdown(cells({("m3", True, ALL, 64): 5})).splitlines()
    assert "| all | 95.0 / 90.0 | 80.0 / 80.0 | 70.0 / 70.0 | 60.0 / 60.0 |" in lines
    (gaps,) = [line for line in lines if line.startswith("| elastic - separate | +5.0 (")]
    assert gaps.count("+0.0 (+0.0 to +0.0)") == 3


def test_the_command_chooses_the_demo_of_images() -> None:
    assert Settings(full=True, about="images", num_scenes=9).chosen() == FullImagesConfig(num_scenes=9)
    with pytest.raises(ValueError, match=r"num_utterances does not go with full=true about images; allowed: out"):
        Settings(full=True, about="images", num_utterances=5).chosen()
    with pytest.raises(ValueError, match=r"about=images goes with full=true only"):
        Settings(about="images").chosen()
    with pytest.raises(ValueError, match=r"steps is 0; it must be at least 1"):
        Settings(full=True, about="images", steps=0).chosen()


@pytest.mark.slow
def test_the_long_demo_of_images_at_its_smallest(tmp_path: Path) -> None:
    out = tmp_path / "full"
    sizes = ["--steps", "2", "--num_scenes", "30", "--num_test_scenes", "3", "--num_seeds", "1"]
    status = main(["demo", "--full", "--about", "images", "--out", str(out), *sizes])
    settings = FullImagesConfig(out=str(out), steps=2, num_scenes=30, num_test_scenes=3, num_seeds=1)
    read = read_cells(settings)
    assert len(read) == len(STYLES) * 2 * (len(KINDS) + 1) * len(COUNTS)
    assert all(len(cell.errors) == 3 for cell in read.values())
    assert {cell.units for key, cell in read.items() if key[2] == ALL} == {(len(KINDS),) * 3}
    assert status == int(not all(finding.holds for finding in findings(read)))
    rows = json.loads((out / "comparison.json").read_text())["rows"]
    assert {row["style"] for row in rows} == set(STYLES)
    assert (out / "comparison.png").stat().st_size > 10_000
