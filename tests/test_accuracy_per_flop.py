"""The comparison of ways to train at equal FLOPs runs, counts what it says, and goes on where it was."""

import json
import sys
from pathlib import Path

import accuracy_per_flop
import pytest
import torch

from mllm.synthetic.images.corpus import write_image_corpus


@pytest.mark.slow
def test_all_ways_spend_the_same_and_nothing_is_run_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    corpus, out = tmp_path / "corpus", tmp_path / "out"
    write_image_corpus(corpus, num_train=30, num_validation=2, num_test=1)
    threads = torch.get_num_threads()
    arguments = ["--corpus", str(corpus), "--seeds", "0", "--tflops", "0.09", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", ["accuracy_per_flop.py", *arguments])
    accuracy_per_flop.main()
    torch.set_num_threads(threads)
    runs = {run.way: run for run in accuracy_per_flop.read_outcomes(out / "runs.jsonl")}
    assert set(runs) == set(accuracy_per_flop.WAYS)
    assert min(runs["random"].steps, runs["few rows"].steps) > 2 * runs["packed"].steps
    assert runs["packed"].steps > runs["separate"].steps >= 1
    assert all(0.4 < run.spent / run.limit <= 1 for run in runs.values())
    assert all(len(run.accuracies) == 8 and 0 <= run.mean <= 1 for run in runs.values())
    before = (out / "runs.jsonl").read_text()
    accuracy_per_flop.main()
    torch.set_num_threads(threads)
    assert (out / "runs.jsonl").read_text() == before
    assert json.loads(before.splitlines()[0])["way"] == "packed"
    assert len((out / "table.md").read_text().splitlines()) == 6
    assert (out / "accuracy_per_flop.png").is_file()


def test_the_learning_rate_rises_and_falls_with_what_is_spent() -> None:
    parts = [accuracy_per_flop.schedule(part / 100) for part in range(101)]
    assert parts[0] == 0
    assert max(parts) == parts[10] == 1
    assert parts[10:] == sorted(parts[10:], reverse=True)
    assert parts[100] == pytest.approx(0)
