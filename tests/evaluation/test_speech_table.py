"""What the speech table promises: the papers' layout and averages, marks for what differs, one line a model."""

import io
import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from rich.console import Console

from mllm.cli import main
from mllm.evaluation.answer_store import FINGERPRINT
from mllm.evaluation.comparison import DATA, MARKDOWN, PLOT, compare, comparison_of, short_name
from mllm.evaluation.report import RESULTS
from mllm.evaluation.speech_table import blocks_of, cells_of, notes_of, tables, to_markdown

BUDGETS = {
    "ASR (4)": ("asr", "audio=/4"),
    "ASR (16)": ("asr", "audio=/16"),
    "VSR (2)": ("vsr", "video=/2"),
    "VSR (5)": ("vsr", "video=/5"),
    "AVSR (4,2)": ("avsr", "audio=/4,video=/2"),
    "AVSR (4,5)": ("avsr", "audio=/4,video=/5"),
    "AVSR (16,2)": ("avsr", "audio=/16,video=/2"),
    "AVSR (16,5)": ("avsr", "audio=/16,video=/5"),
}
# Table I of Omni-AVSR (arXiv 2511.07253): word error rates on LRS2, and the average it prints.
PUBLISHED = {
    "Llama-AVSR": ([3.3, 4.3, 26.9, 30.0, 2.5, 2.6, 3.9, 4.6], "9.8"),
    "Llama-MTSK": ([2.5, 3.9, 26.7, 28.5, 2.5, 2.5, 3.7, 4.0], "9.3"),
    "Omni-ST": ([2.7, 4.8, 27.8, 29.5, 2.5, 2.7, 3.9, 4.2], "9.8"),
}


def row(task: str, budget: str, percent: float | None, **changes: Any) -> dict[str, Any]:
    """One row of results; its values are percent."""
    value = None if percent is None else percent / 100
    return {
        "set": "lrs2", "task": task, "kind": None, "snr_db": None, "budget": budget, "metric": "wer", "value": value,
        "low": value, "high": value, "cer": None if value is None else value / 2, "is_trained": True, "num_failed": 0,
        "soft_tokens": 40.0, "tokens_per_second": 25.0, "published_tflops": 3.87, "attention_tflops": 0.02, **changes,
    }  # fmt: skip


def rows_of(values: list[float], **changes: Any) -> list[dict[str, Any]]:
    """The eight rows of a model, the last column first: the table has an order of its own."""
    made = [row(*names, value, **changes) for names, value in zip(BUDGETS.values(), values, strict=True)]
    return made[::-1]


def write(folder: Path, rows: list[dict[str, Any]], *, manifest: str = "one", **facts: Any) -> str:
    folder.mkdir(parents=True)
    facts = {"num_beams": 15, "limit": None, **facts}
    (folder / RESULTS).write_text(json.dumps({"facts": facts, "rows": rows, "failures": []}))
    (folder / FINGERPRINT).write_text(json.dumps({"manifests": {"lrs2": manifest}}))
    return str(folder)


def printed(shown: list) -> str:
    out = io.StringIO()
    for one in shown:
        Console(width=200, file=out).print(one)
    return out.getvalue()


def test_the_published_table_is_laid_out_and_averaged_as_published() -> None:
    blocks = blocks_of({model: rows_of(values) for model, (values, _) in PUBLISHED.items()})
    assert [block.title for block in blocks] == ["lrs2, clean"]
    assert [column.title for column in blocks[0].columns] == list(BUDGETS)
    for model, (values, average) in PUBLISHED.items():
        assert cells_of(blocks[0], model, "value") == [*(f"{value:.1f}" for value in values), average]
    text = to_markdown(blocks)
    assert f"| WER % | {' | '.join(BUDGETS)} | avg |" in text
    assert "| Llama-AVSR | 3.3 | 4.3 | 26.9 | 30.0 | **2.5** | 2.6 | 3.9 | 4.6 | 9.8 |" in text
    assert (
        "| Llama-MTSK | **2.5** | **3.9** | **26.7** | **28.5** | **2.5** | **2.5** | **3.7** | **4.0** | **9.3** |"
        in text
    )
    assert "| CER % |" in text
    shown = printed(tables(blocks))
    for word in ("AVSR (16,5)", "avg", "Omni-ST: soft tokens per second", "25.0", "3.87", "0.02"):
        assert word in shown


def test_every_noise_is_a_block_and_lips_do_not_hear_it() -> None:
    values = PUBLISHED["Omni-ST"][0]
    noisy = [row(task, budget, 9.0, snr_db=0.0) for task, budget in BUDGETS.values() if task != "vsr"]
    louder = [row(task, budget, 20.0, snr_db=-5.0) for task, budget in BUDGETS.values() if task != "vsr"]
    blocks = blocks_of({"m": [*louder, *noisy, *rows_of(values)]})
    assert [block.title for block in blocks] == ["lrs2, clean", "lrs2, SNR 0 dB", "lrs2, SNR -5 dB"]
    assert cells_of(blocks[1], "m", "value") == ["9.0", "9.0", "27.8", "29.5", *["9.0"] * 4, "13.9"]
    video_rows = [one for one in rows_of(values) if one["task"] == "vsr"]
    assert [block.title for block in blocks_of({"m": [*noisy, *video_rows]})] == ["lrs2, SNR 0 dB"]


def test_what_is_not_comparable_is_marked_and_has_no_average() -> None:
    rows = rows_of(PUBLISHED["Omni-ST"][0])
    rows[0] |= {"is_trained": False}
    rows[1] |= {"num_failed": 2}
    whole = blocks_of({"m": rows})
    assert cells_of(whole[0], "m", "value")[-3:] == ["3.9†", "4.2*", "9.8"]
    assert [note[0] for note in notes_of(whole)] == ["*", "†"]
    partial = blocks_of({"m": rows, "other": [*rows[2:-1], row("asr", "audio=/4", None)]})
    assert cells_of(partial[0], "other", "value") == ["-", "4.8", "27.8", "29.5", "2.5", "2.7", "-", "-", "-"]
    assert "**4.2*" not in to_markdown(partial)  # alone in its column, it is not the best of several
    assert "- " not in to_markdown(whole).replace("---", "")


def test_rates_are_in_order_and_other_amounts_behind_them() -> None:
    budgets = ("audio=/16", "audio=/4", "audio=12.5/s", "", "audio=64")
    blocks = blocks_of({"m": [row("asr", budget, 1.0) for budget in budgets]})
    titles = [column.title for column in blocks[0].columns]
    assert titles == ["ASR (4)", "ASR (16)", "ASR (max)", "ASR (12.5/s)", "ASR (64)"]
    assert comparison_of([row("vqa", "image=4", 1.0), row("asr", "audio=max,total<=90", 1.0)], "m") is None
    # Two open budgets are not one pair of rates twice, and lips that are left out are an amount of their own.
    assert comparison_of([row("avsr", "auto", 1.0), row("avsr", "auto,mean_tokens<=9", 1.0)], "m") is None
    left_out = comparison_of([row("avsr", "audio=/4,video=none", 1.0), row("avsr", "audio=/4,video=/2", 1.0)], "m")
    assert left_out is not None
    assert [column.title for column in left_out.blocks[0].columns] == ["AVSR (4,2)", "AVSR (4,none)"]


def test_answers_that_had_not_ended_are_told_below_the_table(tmp_path: Path) -> None:
    made = comparison_of([row("asr", "audio=/4", 9.0, num_cut=2), row("asr", "audio=/16", 9.0)], "m", max_new_tokens=64)
    assert made is not None
    made.write(tmp_path, with_plot=False)
    note = "2 answers to lrs2 (asr) were cut at max_new_tokens 64: 2 at audio=/4"
    assert (tmp_path / MARKDOWN).read_text().endswith(f"\n{note}\n")


def test_models_of_several_runs_make_one_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    elastic = write(tmp_path / "omni" / "evaluation", rows_of(PUBLISHED["Omni-ST"][0]))
    separate = [
        f"Llama-AVSR={write(tmp_path / f'separate{number}', [row(*names, value)], num_beams=1)}"
        for number, (names, value) in enumerate(zip(BUDGETS.values(), PUBLISHED["Llama-AVSR"][0], strict=True))
    ]
    assert main(["compare", elastic, *separate, "--out", str(tmp_path / "out")]) == 0
    shown = capsys.readouterr().out
    assert "num_beams is 15 for omni; 1 for Llama-AVSR" in shown
    text = (tmp_path / "out" / MARKDOWN).read_text()
    assert "| omni | **2.7** | 4.8 | 27.8 | **29.5** | **2.5** | 2.7 | **3.9** | **4.2** | **9.8** |" in text
    assert "| Llama-AVSR | 3.3 | **4.3** | **26.9** |" in text
    assert "num_beams is 15" in text
    block = json.loads((tmp_path / "out" / DATA).read_text())["blocks"][0]
    assert block["columns"] == list(BUDGETS)
    assert block["models"]["omni"]["cells"]["VSR (5)"]["low"] == 0.295
    assert block["models"]["Llama-AVSR"]["averages"]["CER %"] == pytest.approx(0.0976 / 2, abs=1e-4)
    with Image.open(tmp_path / "out" / PLOT) as plot:
        assert plot.width > 800  # two plots side by side
    assert short_name("runs/omni/evaluation") == short_name("runs/omni/") == "omni"
    assert compare([str(tmp_path / "omni")]).rows.keys() == {"omni"}


def test_what_cannot_be_compared_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = rows_of(PUBLISHED["Omni-ST"][0])
    one = write(tmp_path / "one", rows)
    same, other = write(tmp_path / "same", rows), write(tmp_path / "other", rows, manifest="two")
    few, captions = write(tmp_path / "few", rows, limit=3), write(tmp_path / "c", [row("asr", "total<=90", 1.0)])
    cases = [
        ([f"m={one}", f"m={same}"], r"m has two results for AVSR \(16,5\) of lrs2, clean"),
        ([one, other], "different manifests behind the set 'lrs2'"),
        ([one, few], "different limits behind the set 'lrs2'"),
        ([captions], "the results hold nothing to compare: no asr, vsr or avsr at a rate, and none of vqav2, .*, vqa"),
        ([], "folders is empty"),
    ]
    for folders, message in cases:
        with pytest.raises(ValueError, match=message):
            compare(folders)
    with pytest.raises(FileNotFoundError, match=r"nowhere holds no results.json; evaluate the model first"):
        compare([str(tmp_path / "nowhere")])
    assert main(["compare"]) == 2
    assert "folders" in capsys.readouterr().err
