"""The demo: what it makes of its settings, what it claims from which numbers, and a run of it at small size."""

import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from mllm.checkpoints.load import load
from mllm.cli import main
from mllm.evaluation.run import evaluate
from mllm.synthetic.demo.demo import BUDGETS, DemoConfig, demo, evaluation_settings, run_settings
from mllm.synthetic.demo.report import findings, image_table, speech_table
from mllm.synthetic.images.questions import KINDS

WER = {  # task, budget, dB: error rate
    **{("asr", f"audio=/{rate}", None): value for rate, value in ((4, 0.09), (8, 0.14), (16, 0.27))},
    **{("asr", f"audio=/{rate}", 0.0): value for rate, value in ((4, 0.45), (8, 0.49), (16, 0.56))},
    **{("vsr", f"video=/{rate}", None): value for rate, value in ((2, 0.31), (5, 0.37))},
    ("avsr", "audio=/4,video=/2", None): 0.15,
    ("avsr", "audio=/4,video=/2", 0.0): 0.25,
}
ACCURACY = {1: 0.3, 4: 0.4, 16: 0.6, 64: 0.9}


def rows(**changes: float) -> list[dict[str, Any]]:
    """Rows of an evaluation that shows everything; `changes` are by kind and count or task and budget."""
    made: list[dict[str, Any]] = []
    for (task, budget, ratio), value in WER.items():
        made.append(
            {"task": task, "kind": None, "snr_db": ratio, "budget": budget, "value": value, "soft_tokens": 24.0}
        )
    for kind in (*KINDS, None):
        for count, value in ACCURACY.items():
            result = {"task": "vqa", "kind": kind, "snr_db": None, "budget": f"image={count}", "soft_tokens": count}
            made.append(result | {"value": 1.0 if kind in ("time", "ground") else value})
    for row in made:
        name = f"{row['kind'] or row['task']}:{row['budget']}:{row['snr_db']}"
        row["value"] = changes.get(name, row["value"])
        row["low"], row["high"] = row["value"] - 0.03, row["value"] + 0.03
    return made


def test_everything_is_found_where_it_is_there() -> None:
    assert [finding.holds for finding in findings(rows())] == [True] * 4
    assert findings(rows())[1].numbers == "25.0, 45.0, 31.0"
    assert findings(rows())[2].numbers == "30.0, 40.0, 60.0, 90.0"


@pytest.mark.parametrize(
    ("number", "changes"),
    [
        (0, {"asr:audio=/8:None": 0.30}),
        (1, {"avsr:audio=/4,video=/2:0.0": 0.32}),
        (2, {f"{kind}:image=16:None": 0.35 for kind in ("colour", "letter", "relation")}),
        (3, {"time:image=1:None": 0.8}),
    ],
)
def test_a_claim_that_does_not_hold_is_said_not_to(number: int, changes: dict[str, float]) -> None:
    assert [finding.holds for finding in findings(rows(**changes))] == [i != number for i in range(4)]


def test_a_row_that_is_missing_or_there_twice_is_no_result() -> None:
    with pytest.raises(ValueError, match=r"holds 0 rows of \('asr', None, None, 'audio=/8'\); expected one"):
        findings([row for row in rows() if row["budget"] != "audio=/8"])


def test_tables_show_tasks_by_noise_and_questions_by_tokens() -> None:
    console = Console(width=120, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(speech_table(rows()))
    console.print(image_table(rows()))
    lines = [line.split() for line in console.export_text().splitlines() if "│" in line]
    cells = [[word for word in line if word != "│"] for line in lines]
    assert ["asr", "audio=/4", "24", "9.0", "(6-12)", "45.0", "(42-48)"] in cells
    assert ["colour", "30.0", "(27-33)", "40.0", "(37-43)", "60.0", "(57-63)", "90.0", "(87-93)"] in cells


def test_settings_reach_the_run_and_the_evaluation(tmp_path: Path) -> None:
    settings = DemoConfig(out=str(tmp_path), seed=5, steps=20)
    run = run_settings(settings)
    assert (run.model.seed, run.train.seed, run.train.max_steps, run.train.warmup_steps) == (5, 5, 20, 2)
    assert run.data.train == [str(tmp_path / "corpus" / kind / "train.jsonl") for kind in ("speech", "images")]
    assert run.data.captions == [str(tmp_path / "corpus" / "images" / "captions.jsonl")]
    assert evaluation_settings(settings).budgets == list(BUDGETS)


def test_a_folder_of_other_settings_is_refused(tmp_path: Path) -> None:
    (tmp_path / "demo.json").write_text(json.dumps({"seed": 1, "steps": None}))
    with pytest.raises(ValueError, match=r"holds a demo of other settings \(seed was 1, num_utterances was None"):
        demo(DemoConfig(out=str(tmp_path)))
    with pytest.raises(ValueError, match="num_scenes is 0; it must be at least 1"):
        DemoConfig(num_scenes=0)


@pytest.mark.slow
def test_a_small_demo_leaves_a_plot_and_a_model_and_is_not_made_twice(tmp_path: Path) -> None:
    pytest.importorskip("espeakng_loader")
    sizes = {"num_utterances": 12, "num_scenes": 12, "num_test_utterances": 4, "num_test_scenes": 3}
    settings = DemoConfig(out=str(tmp_path / "demo"), steps=3, **sizes)
    seen: set[str] = set()
    results = demo(settings, progress=lambda what, *_: seen.add(what))
    assert set(results["seconds"]) == {"corpora", "training", "evaluation"}
    assert {"speaking", "drawing", "answering the test questions"} <= seen
    assert {row["budget"] for row in results["rows"] if row["task"] == "avsr"} == set(BUDGETS[:5])
    assert all(row["num_samples"] == 4 for row in results["rows"] if row["task"] != "vqa")
    assert (tmp_path / "demo" / "evaluation" / "demo" / "pareto.png").stat().st_size > 1000
    load(tmp_path / "demo")
    again = demo(settings)
    assert set(again["seconds"]) == {"corpora", "evaluation"}
    assert again["rows"] == results["rows"]
    assert evaluate(evaluation_settings(settings)).rows == results["rows"]  # pyright: ignore[reportOptionalMemberAccess]
    words = [word for key, value in (sizes | {"steps": 3}).items() for word in (f"--{key}", str(value))]
    assert main(["demo", "--out", settings.out, *words]) == 1  # three steps show nothing
    assert main(["demo", "--out", settings.out, *words, "--judge", "false"]) == 0
