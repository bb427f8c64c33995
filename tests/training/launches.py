"""Starts the toy runs of `worker.py` on two processes, and compares two runs."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from harness import log_rows
from safetensors.torch import load_file

from mllm.training.checkpoint import OPTIMIZER, TRAINABLES

TESTS = Path(__file__).parent
ROOT = TESTS.parent.parent
CONFIGS = ROOT / "configs"
BIN = Path(sys.executable).parent


def launch(*arguments: str | Path, timeout: int = 300) -> None:
    """Run the worker on two processes."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    run_launcher(*command, TESTS / "worker.py", *arguments, timeout=timeout)


def run_launcher(*command: str | Path, timeout: int = 300) -> None:
    """Run a launcher's command line to its end, which must be a good one."""
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(map(str, (ROOT, TESTS.parent, TESTS))),
        "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
    }
    done = subprocess.run(
        [*map(str, command)], env=environment, cwd=ROOT, capture_output=True, text=True, timeout=timeout
    )
    assert done.returncode == 0, done.stderr[-4000:]


def assert_same_run(one: Path, two: Path, *, tolerance: float = 1e-4, weights_atol: float = 1e-5) -> None:
    """Weights, moments and logged losses of two runs agree."""
    for name in ("checkpoint-00000002", "checkpoint-00000004"):
        for file in (TRAINABLES, OPTIMIZER):
            expected, result = load_file(one / name / file), load_file(two / name / file)
            assert expected.keys() == result.keys()
            atol = weights_atol if file == TRAINABLES else 1e-5
            for key, value in expected.items():
                torch.testing.assert_close(
                    result[key], value, rtol=tolerance, atol=atol, msg=lambda m, k=key: f"{k}: {m}"
                )
    rows = [[row for row in log_rows(run) if "loss" in row] for run in (one, two)]
    assert len(rows[0]) == 4
    for expected_row, row in zip(*rows, strict=True):
        assert expected_row.keys() == row.keys()
        assert row == pytest.approx(expected_row, rel=1e-4)
