"""Compares the answers of two evaluations: equal in everything but the last digits of probabilities."""

import json
from pathlib import Path

import pytest

PROBABILITIES = ("min_probability", "mean_log_probability")


def assert_same_answers(one: Path, other: Path) -> None:
    """Compare two files of answers; who is in a batch with whom shows in how probabilities are rounded alone."""
    ours, theirs = ([json.loads(line) for line in path.read_text().splitlines()] for path in (one, other))
    for key in PROBABILITIES:  # samples that failed have none
        mine, yours = ([line.pop(key, 0.0) for line in lines] for lines in (ours, theirs))
        assert mine == pytest.approx(yours, rel=1e-4, abs=1e-5)
    assert ours == theirs
