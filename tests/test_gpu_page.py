"""The script for a GPU runs every way once in small on a CPU, finds them equal, and writes its page."""

import gpu
import pytest
import torch
from rich.console import Console

SMALL = gpu.Bench(torch.device("cpu"), torch.bfloat16, gpu.SMALL)


def test_every_part_runs_and_the_page_says_what_was_left_out() -> None:
    page = gpu.measure(SMALL, list(gpu.PARTS), minutes=5, console=Console(quiet=True))
    rows = [line for line in page.splitlines() if line.startswith("| ") and "x |" in line]
    assert [row.split(" | ")[0].removeprefix("| ") for row in rows][:2] == [
        "step at 4 nested budgets, packed, one attention per segment",
        "mixture of experts, forward and backward, 32 tokens",
    ]
    assert sum("questions about an image" in row for row in rows) == 2
    assert "Sizes are toys" in page
    assert "flex attention was run forward alone" in page
    assert "Left out: Liger" in page or any("by Liger" in row for row in rows)


def test_no_part_begins_late_and_results_that_differ_stop_it() -> None:
    page = gpu.measure(SMALL, ["decoding", "questions"], minutes=-1, console=Console(quiet=True))
    assert "Left out: questions: -1 minutes were over." in page
    assert gpu.check("two numbers", 0.01, 0.02) == 0.01
    for difference in (0.03, float("nan")):
        with pytest.raises(SystemExit, match="FAILED: two numbers differ by"):
            gpu.check("two numbers", difference, 0.02)


def test_the_page_of_the_docs_is_of_a_gpu(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["--device", "cpu"], *([] if torch.cuda.is_available() else [[]])):
        monkeypatch.setattr("sys.argv", ["gpu.py", *arguments])
        with pytest.raises(SystemExit):
            gpu.read_arguments()
    assert "figures of a CPU do not go into docs/performance_gpu.md" in capsys.readouterr().err
