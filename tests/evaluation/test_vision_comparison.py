"""`mllm compare` lays vision results of several models side by side: budgets, benchmarks and one's own questions."""

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from mllm.cli import main
from mllm.evaluation.answer_store import FINGERPRINT
from mllm.evaluation.comparison import VISION_DATA, VISION_MARKDOWN, VISION_PLOT, compare
from mllm.evaluation.report import RESULTS
from mllm.evaluation.vision_comparison import vision_comparison


def row(task: str, tokens: int, percent: float | None, **changes: Any) -> dict[str, Any]:
    """One row of results as `summarise` writes them; its value is percent."""
    value = None if percent is None else percent / 100
    return {
        "set": task, "task": task, "kind": None, "snr_db": None, "budget": f"image={tokens}", "metric": "accuracy",
        "value": value, "low": value, "high": value, "is_trained": True, "num_samples": 10, "num_failed": 0,
        "soft_tokens": float(tokens), "gflops": 2.0 * tokens, **changes,
    }  # fmt: skip


def write(folder: Path, rows: list[dict[str, Any]], **facts: Any) -> str:
    folder.mkdir(parents=True)
    content = {"facts": {"limit": None, "max_new_tokens": 16, **facts}, "rows": rows, "failures": []}
    (folder / RESULTS).write_text(json.dumps(content))
    (folder / FINGERPRINT).write_text(json.dumps({"manifests": {one["set"]: "digest" for one in rows}}))
    return str(folder)


ELASTIC = [row("gqa", 64, 60.0), row("gqa", 16, 55.0), row("vqa", 64, 80.0), row("vqa", 16, 70.0, is_trained=False)]
FIXED = [row("gqa", 16, 57.5, num_cut=3), row("gqa", 16, 50.0, kind="open"), row("vqa", 16, 71.0, num_failed=1)]


def test_models_stand_below_each_other_with_their_budgets(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, two = write(tmp_path / "elastic" / "evaluation", ELASTIC), write(tmp_path / "b", FIXED, num_beams=3)
    assert main(["compare", str(tmp_path / "elastic"), f"fixed={two}", "--out", str(tmp_path / "out")]) == 0
    shown = capsys.readouterr().out
    assert "elastic" in shown
    text = (tmp_path / "out" / VISION_MARKDOWN).read_text()
    assert text.splitlines()[0] == "| model | budget | soft tokens | GQA | VQA | avg |"
    assert text.splitlines()[2:5] == [
        "| elastic | image=64 | 64 | 60.0 | 80.0 | 70.0 |",
        "| elastic | image=16* | 16 | 55.0 | 70.0 | 62.5 |",
        "| fixed | image=16 | 16 | 57.5 | 71.0† | 64.2 |",
    ]
    for text_shown in (text, shown):
        assert "3 answers of fixed to gqa (gqa) were cut at max_new_tokens 16: 3 at image=16" in text_shown
        assert "*: a budget that was not trained" in text_shown
    data = json.loads((tmp_path / "out" / VISION_DATA).read_text())
    assert data["models"]["fixed"][0]["cells"]["GQA"]["value"] == pytest.approx(57.5)
    with Image.open(tmp_path / "out" / VISION_PLOT) as plot:
        assert plot.width > 800
    assert not (tmp_path / "out" / "speech.md").exists()
    assert compare([one]).vision is not None


def test_speech_and_images_of_one_model_have_a_table_each(tmp_path: Path) -> None:
    heard = row("asr", 4, 5.0, set="clips", budget="audio=/4", cer=0.01, tokens_per_second=12.5)
    made = compare([write(tmp_path / "demo", [heard, *ELASTIC])])
    made.write(tmp_path / "out", with_plot=False)
    assert "| WER % | ASR (4) | avg |" in (tmp_path / "out" / "speech.md").read_text()
    assert "| demo | image=64 | 64 | 60.0 | 80.0 | 70.0 |" in (tmp_path / "out" / VISION_MARKDOWN).read_text()


def test_what_a_model_lacks_has_no_average_and_noise_is_a_set_of_its_own() -> None:
    made = vision_comparison({"a": ELASTIC, "b": ELASTIC[:2], "deaf": []})
    assert made is not None
    assert made.cells[2] == ["b", "image=64", "64", "60.0", "-", "-"]
    noisy = [row("vqa", 16, 50.0), row("vqa", 16, 40.0, snr_db=0.0)]
    made = vision_comparison({"a": noisy})
    assert made is not None
    assert (made.titles[3:5], made.cells[0][3:5]) == (["VQA (vqa)", "VQA (vqa, 0 dB)"], ["50.0", "40.0"])
    assert vision_comparison({"a": [row("asr", 4, 5.0)]}) is None


def test_results_that_cannot_be_compared_are_refused(tmp_path: Path) -> None:
    one, two = write(tmp_path / "one", ELASTIC), write(tmp_path / "two", ELASTIC)
    with pytest.raises(ValueError, match="m has two results for gqa of gqa at image=64; name the models apart"):
        compare([f"m={one}", f"m={two}"])
    with pytest.raises(ValueError, match="different limits behind the set 'gqa'"):
        compare([one, write(tmp_path / "few", ELASTIC, limit=3)])


def test_evaluations_with_names_are_found_and_told_apart(tmp_path: Path) -> None:
    run = tmp_path / "run"
    first = write(run / "evaluation" / "greedy", ELASTIC)
    (run / "config.json").write_text("{}")
    assert compare([str(run)]).rows.keys() == {"run"}
    second = write(run / "evaluation" / "beams", ELASTIC)
    with pytest.raises(ValueError, match=r"holds several evaluations; name one of .*beams, .*greedy"):
        compare([str(run)])
    assert compare([first, second]).rows.keys() == {"run/greedy", "run/beams"}


def test_checkpoints_of_a_run_are_told_apart(tmp_path: Path) -> None:
    run = tmp_path / "run"
    checkpoints = [run / f"checkpoint-{step:08d}" for step in (2, 4)]
    for checkpoint in checkpoints:
        checkpoint.mkdir(parents=True)
    (run / "processor_config.json").write_text("{}")  # all that an interrupted run has of a model
    first = write(run / "evaluation-checkpoint-00000002", ELASTIC)
    write(run / "evaluation-checkpoint-00000004", FIXED)
    named = write(run / "evaluation-checkpoint-00000004" / "beams", ELASTIC)
    assert compare([*map(str, checkpoints), named]).rows.keys() == {
        *("run/checkpoint-00000002", "run/checkpoint-00000004", "run/checkpoint-00000004/beams")
    }
    assert compare([first]).rows.keys() == {"run/checkpoint-00000002"}
