"""What reports promise: numbers one can do by hand from the lines, and files that hold all of them."""

import csv
import io
import json
from pathlib import Path

import pytest
from PIL import Image
from rich.console import Console

from mllm.config.evaluation import EvaluationConfig
from mllm.evaluation.answer_store import AnswerStore, key_of
from mllm.evaluation.plot import plot_pareto
from mllm.evaluation.report import CSV, RESULTS, summarise, table


def line(sample: str, budget: str, reference: str, hypothesis: str, *, task: str = "asr", **changes) -> dict:
    """One answer of 10 soft tokens."""
    return {
        "set": "test",
        "id": sample,
        "snr_db": None,
        "budget": budget,
        "task": task,
        "kind": None,
        "references": [reference],
        "hypothesis": hypothesis,
        "is_trained": True,
        "tokens": {"audio": 10},
        "prompt_tokens": 20,
        "new_tokens": 5,
        "seconds": 2.0,
        "cost": {
            "encoder": 10**9,
            "compressor": 0,
            "prefill": 10**9,
            "decode": 0,
            "total": 2 * 10**9,
            "published": 3 * 10**12,
            "attention": 10**11,
            "kv_bytes": 10**6,
        },
        **changes,
    }


SPEECH = [
    line("a", "audio=/8", "place blue now", "place now", tokens={"audio": 5}),
    line("b", "audio=/8", "bin red", "bin red at", tokens={"audio": 7}),
    line("a", "audio=/4", "place blue now", "place blue now"),
    line("b", "audio=/4", "bin red", "bin read", is_trained=False),
]
IMAGES = [
    line("c", "image=4", "red", "Red.", task="vqa", kind="colour", tokens={"image": 4}),
    line("d", "image=4", "two", "three", task="vqa", kind="count", tokens={"image": 4}),
    line("e", "image=4", "two", "two", task="vqa", kind="count", tokens={"image": 4}),
]


def test_rows_are_those_counted_by_hand() -> None:
    rows = summarise([*SPEECH, *IMAGES], seed=0).rows
    fine, coarse = rows[:2]  # the dearer budget first
    assert (fine["budget"], fine["value"], fine["substitutions"], fine["is_trained"]) == ("audio=/4", 1 / 5, 1, False)
    assert (coarse["budget"], coarse["value"]) == ("audio=/8", 2 / 5)
    assert (coarse["deletions"], coarse["insertions"], coarse["soft_tokens"]) == (1, 1, 6.0)
    assert coarse["cer"] == pytest.approx((5 + 3) / (14 + 7))
    assert (coarse["gflops"], coarse["encoder_gflops"], coarse["kv_megabytes"]) == (2.0, 1.0, 1.0)
    assert (coarse["published_tflops"], coarse["attention_tflops"], coarse["tokens_per_second"]) == (3.0, 0.1, 3.0)
    assert coarse["cer_low"] <= coarse["cer"] <= coarse["cer_high"]
    edits = [coarse[f"character_{edit}"] for edit in ("substitutions", "deletions", "insertions")]
    assert (edits, coarse["reference_characters"]) == ([0, 5, 3], 21)
    assert [(row["kind"], row["value"]) for row in rows[2:]] == [(None, 2 / 3), ("colour", 1.0), ("count", 0.5)]
    assert all(row["low"] <= row["value"] <= row["high"] for row in rows)


def test_kinds_of_speech_are_never_put_together() -> None:
    noisy = [{**one, "kind": kind, "id": one["id"] + kind} for one in SPEECH for kind in ("clean", "0dB")]
    assert {row["kind"] for row in summarise(noisy, seed=0).rows} == {"clean", "0dB"}


def test_a_group_in_which_everything_failed_has_no_value() -> None:
    failed = {key: value for key, value in SPEECH[0].items() if key not in ("hypothesis", "tokens", "cost")}
    results = summarise([{**failed, "error": {"kind": "corrupt", "reason": "a.wav: bad"}}], seed=0)
    assert (results.rows[0]["value"], results.rows[0]["num_failed"]) == (None, 1)
    assert results.failures[0]["error"]["reason"] == "a.wav: bad"
    assert "1 failed" in _printed(results)


def test_the_files_hold_the_table(tmp_path: Path) -> None:
    results = summarise([*SPEECH, *IMAGES], seed=0, facts={"model": "runs/demo"})
    results.write(tmp_path)
    read = json.loads((tmp_path / RESULTS).read_text())
    assert read["rows"] == results.rows
    assert read["facts"] == {"model": "runs/demo"}
    with (tmp_path / CSV).open() as file:
        rows = list(csv.DictReader(file))
    assert [row["budget"] for row in rows] == [row["budget"] for row in results.rows]
    assert [float(row["value"]) for row in rows] == [row["value"] for row in results.rows]
    shown = _printed(results)
    for word in ("runs/demo", "asr", "audio=/8", "40.0", "0/1/1", "audio=/4 (not trained)", "66.7", "colour"):
        assert word in shown


def test_the_plot_shows_each_metric_against_tokens_and_flops(tmp_path: Path) -> None:
    rows = summarise([*SPEECH, *IMAGES], seed=0).rows
    assert plot_pareto(rows, tmp_path / "both.png")
    assert plot_pareto(rows[:2], tmp_path / "one.png")
    assert not plot_pareto([], tmp_path / "none.png")
    with Image.open(tmp_path / "both.png") as both, Image.open(tmp_path / "one.png") as one:
        assert both.height > 1.5 * one.height
        assert one.convert("L").getextrema()[0] < 60


def test_an_answer_beats_a_failure_wherever_it_stands(tmp_path: Path) -> None:
    failed = {**SPEECH[0], "error": {"kind": "corrupt", "reason": "x"}}
    for number, lines in enumerate(([failed, SPEECH[0]], [SPEECH[0], failed])):
        store = AnswerStore(tmp_path / str(number))
        store.claim({})
        store.append(lines)
        assert store.read() == {key_of(SPEECH[0]): SPEECH[0]}


def test_a_broken_line_in_the_middle_is_refused(tmp_path: Path) -> None:
    store = AnswerStore(tmp_path)
    store.claim({})
    store.append(SPEECH[:1])
    with store.path.open("a") as file:
        file.write('{"set": \n')
    store.append(SPEECH[1:2])
    with pytest.raises(ValueError, match=r"0\.jsonl:2: not JSON"):
        store.read()


def test_settings_read_budgets_and_name_sets() -> None:
    config = EvaluationConfig(
        model="runs/x", manifest=["a/test.jsonl", "b/val.jsonl"], budgets="audio=/4; image=4;audio=/4"
    )
    assert [str(budget) for budget in config.parsed_budgets] == ["audio=/4", "image=4"]
    assert config.set_names == ["test", "val"]
    assert config.output_folder == Path("runs/x/evaluation")
    same = EvaluationConfig(model="m", manifest=["a/test.jsonl", "b/test.jsonl"], budgets=[""])
    assert same.set_names == ["a/test.jsonl", "b/test.jsonl"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"manifest": []}, "manifest is empty"),
        ({"manifest": ["a.jsonl", "a.jsonl"]}, "names one file twice"),
        ({"budgets": []}, "budgets is empty"),
        ({"budgets": "audio=four"}, "is not a count"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"snr_db": [0.0]}, "noise and snr_db go together"),
        ({"noise": "n.wav"}, "noise and snr_db go together"),
        ({"snr_db": []}, "snr_db is empty"),
        ({"length_penalty": 0.5}, "it compares beams"),
    ],
)
def test_settings_refuse_what_makes_no_sense(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EvaluationConfig(**{"model": "m", "manifest": ["a.jsonl"], "budgets": "image=1", **changes})


def _printed(results) -> str:
    out = io.StringIO()
    Console(width=200, file=out).print(table(results))
    return out.getvalue()
