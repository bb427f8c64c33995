"""Rows broken in every way: no reader raises, every fault is one finding, and what is left is good."""

from pathlib import Path
from typing import get_args

import numpy as np
import pytest
from mutations import WRITERS

from mllm.config.data import Format, ReaderConfig
from mllm.data.findings import MAX_SHOWN_CHARACTERS
from mllm.data.manifest import read_manifest, write_manifest
from mllm.data.readers import read_listing
from mllm.media import path_problem

ROWS_PER_FILE = 25


def test_every_format_is_fuzzed() -> None:
    assert set(WRITERS) == set(get_args(Format))


def fuzz(form: Format, folder: Path, num_rows: int, seed: int) -> tuple[int, int]:
    """Read broken rows of a format; returns how many samples and how many findings came of them."""
    samples = findings = 0
    split = {"split": "test"} if form in ("parquet", "datasets", "mmmu", "docvqa") else {}
    for number in range(max(num_rows // ROWS_PER_FILE, len(WRITERS[form]))):
        rng = np.random.default_rng([seed, number])
        root = folder / str(number)
        root.mkdir()
        source = WRITERS[form][number % len(WRITERS[form])](root, ROWS_PER_FILE, rng)
        listing = read_listing(source, root, ReaderConfig(format=form, **split))
        for finding in listing.problems:
            assert len(str(finding).splitlines()) == 1, repr(str(finding))
            assert len(finding.message) <= MAX_SHOWN_CHARACTERS + 3
        assert not [part for sample in listing.samples for part in sample.media if path_problem(part.path)]
        write_manifest(folder / "out.jsonl", listing.samples)
        if listing.samples:
            again = read_manifest(folder / "out.jsonl", root)
            assert [one.messages for one in again] == [one.messages for one in listing.samples]
        samples, findings = samples + len(listing.samples), findings + len(listing.problems)
    return samples, findings


@pytest.mark.parametrize("form", list(WRITERS))
def test_broken_rows_become_findings(form: Format, tmp_path: Path) -> None:
    _, findings = fuzz(form, tmp_path, 3 * ROWS_PER_FILE, seed=0)
    assert findings > 0


@pytest.mark.slow
@pytest.mark.parametrize("form", list(WRITERS))
def test_two_thousand_broken_rows_become_findings(form: Format, tmp_path: Path) -> None:
    samples, findings = fuzz(form, tmp_path, 2_000, seed=1)
    assert findings > 100
    assert samples > 0
