"""Names the rows of the table, and how often each tries what it tries in CI and in a full run."""

import os
import random
import subprocess
import sys
import xml.etree.ElementTree as ET
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import damage
import disks
import kills
import pairs
import soak
from ground import Ground, Outcome
from world import STEPS

from mllm.config.model import MomeConfig

TESTS = Path(__file__).parent.parent


def cases_of(*files: str, marks: str = "not slow") -> Callable[[Ground, int, random.Random], Outcome]:
    """Make a row of the test files that try the same: each case of them is a try, or as many as it records."""

    def run(ground: Ground, tries: int, rng: random.Random) -> Outcome:
        report = ground.folder / "report.xml"
        report.unlink(missing_ok=True)  # of the row before
        options = ["-m", marks, f"--junit-xml={report}", "-p", "no:cacheprovider"]
        done = subprocess.run(
            [sys.executable, "-m", "pytest", *options, *files],
            cwd=TESTS.parent,
            env={**os.environ, "ALL_FAULTS": "1"},
            capture_output=True,
            text=True,
            check=False,
        )
        outcome = Outcome()
        if done.returncode not in (
            0,
            1,
        ):  # it has not tried them: no such file, one that cannot be imported, or a death
            outcome.add([f"pytest ended with {done.returncode}: {(done.stdout + done.stderr)[-300:]}"], files[0])
            return outcome
        for case in ET.parse(report).iter("testcase"):
            if case.find("skipped") is None:
                bad = [child.get("message", "") for child in case if child.tag in ("failure", "error")]
                recorded = case.find("properties/property[@name='tries']")
                for _ in range(1 if recorded is None else int(recorded.get("value", ""))):
                    outcome.add(bad, case.get("name", ""))
        return outcome

    return run


@dataclass(frozen=True)
class Row:
    """One row: what is tried, how often in CI and in a full run, and by what."""

    name: str
    fast_tries: int
    full_tries: int
    run: Callable[[Ground, int, random.Random], Outcome]


ROWS = {
    "kills at places": Row(
        "kill -9 in training, at ten named places", 10, 100, kills.kills_in_training_at_named_places
    ),
    "kills at random": Row("kill -9 in training, at random instants", 4, 50, kills.kills_in_training_at_random),
    "kills in evaluation": Row("kill -9 in evaluation", 4, 20, kills.kills_in_evaluation),
    "kills in features": Row("kill -9 while features are built", 4, 20, kills.kills_in_feature_building),
    "kills in import": Row("kill -9 in `mllm data import`", 4, 20, kills.kills_in_import),
    "full disks": Row("no space left while saving", 3, 15, disks.full_disks_in_training),
    "small disks": Row("a run folder that is a disk of its own, and too small", 2, 20, disks.small_disks_in_training),
    "signals": Row("SIGTERM, SIGINT, SIGUSR1, SIGHUP in training", 4, 50, kills.signals_in_training),
    "damaged files": Row("damaged files of checkpoints, runs and exports", 300, 2_000, damage.damaged_files),
    "damaged media": Row("damaged media files", 200, 12_000, damage.damaged_media),
    "hostile checkpoints": Row("hostile or damaged .pt files", 200, 2_000, damage.hostile_checkpoints),
}
"""What runs in CI and, with larger counts, in a full run."""
FULL_ROWS = {
    "kills in the last save": Row("kill -9 in the last save, at each file", 0, 20, kills.kills_in_the_last_save),
    "kills of one of two": Row(
        "kill -9 of one of two processes: DDP, ZeRO-2, ZeRO-3", 0, 18, pairs.kills_of_one_of_two
    ),
    "changes of stage": Row("a run that another stage of ZeRO goes on with", 0, 10, pairs.changes_of_stage),
    "skews": Row(
        "two processes with different media: DDP, ZeRO-2, ZeRO-3",
        0,
        192,
        pairs.skewed_media(pairs.DDP, pairs.ZERO2, pairs.ZERO3),
    ),
    "skews of experts": Row(
        "the same of an adapter of experts (MoME): DDP, ZeRO-3",
        0,
        128,
        pairs.skewed_media(pairs.DDP, pairs.ZERO3, adapter=MomeConfig(num_experts=5, top_k=2, bottleneck=4)),
    ),
    "two processes": Row(
        "a signal to one of two processes, gradients that are no numbers, one that is stuck; DDP, ZeRO-2, ZeRO-3",
        0,
        0,
        cases_of("tests/faults/test_two_processes.py", marks="slow"),
    ),
    "soak": Row("steps of a run with 1 % of bad files, whose memory must not grow", 0, 20_000, soak.long_runs),
    "environments": Row(
        "locales, homes, paths and packages that others do not have",
        0,
        0,
        cases_of("tests/faults/test_environments.py", "tests/utils/test_broken_packages.py", marks=""),
    ),
    "server": Row("mistakes inside a server", 0, 0, cases_of("tests/faults/test_server_mistakes.py", marks="slow")),
    "paths": Row("paths that lead outside of a root", 0, 0, cases_of("tests/media/test_media_paths.py")),
    "urls": Row("addresses and answers of hosts", 0, 0, cases_of("tests/serving/test_fetching.py")),
    "foreign code": Row(
        "code in checkpoints, also where the question for it is answered with yes",
        0,
        0,
        cases_of("tests/checkpoints/test_foreign_code.py"),
    ),
}
"""Rows of full runs alone; those of test files have as many tries as cases."""
LIPS_ROWS = {"kills in preparing": Row("kill -9 in `mllm prepare lips`", 0, 10, kills.kills_in_preparing)}
"""Rows that need MediaPipe, which is in an environment of its own."""


def seeded(rows: dict[str, Row], seed: int) -> Iterator[tuple[str, Row, random.Random]]:
    """Give every row a generator of its own, so that one row can be run again alone."""
    for name, row in rows.items():
        yield name, row, random.Random(f"{seed} {name}")


assert STEPS % 2 == 0
