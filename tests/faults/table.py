"""Tries every row and writes one table.

python tests/faults/table.py [--tier fast] [--rows NAME ...] [--tries N] [--out FILE]
"""

import argparse
import json
import os
import resource
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

TESTS = Path(__file__).parent.parent
FOLDERS = ("training", "media", "data", "lip_crops", "faults")
sys.path[:0] = [str(path) for path in (TESTS.parent, TESTS, *(TESTS / name for name in FOLDERS))]

os.environ.setdefault("DS_ACCELERATOR", "cpu")  # or DeepSpeed says on standard output that it has found no other

from rows import FULL_ROWS, LIPS_ROWS, ROWS, Ground, seeded  # noqa: E402

TIERS = {"fast": ROWS, "full": {**ROWS, **FULL_ROWS}, "lips": LIPS_ROWS}


def main() -> int:
    """Return 1 where something did not hold."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--tier", choices=TIERS, default="full")
    parser.add_argument("--rows", nargs="*", default=[])
    parser.add_argument("--tries", type=int, help="of each row, in place of its count")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    rows = {name: row for name, row in TIERS[options.tier].items() if not options.rows or name in options.rows}
    outcomes = {}
    with tempfile.TemporaryDirectory() as folder:
        ground = Ground(Path(folder))
        for name, row, rng in seeded(rows, options.seed):
            started, used = time.monotonic(), _cpu_seconds()
            tries = row.fast_tries if options.tier == "fast" else row.full_tries
            outcome = row.run(ground, tries if options.tries is None else options.tries, rng)
            outcomes[name] = asdict(outcome)
            note = f"; {outcome.note}" if outcome.note else ""
            line = f"| {row.name}{note} | {outcome.tries:,} | {outcome.skipped or format(outcome.held, ',')} |"
            has_title = len(outcomes) == 1 and options.tier != "lips"  # which goes on with the table of a full run
            sys.stdout.write(f"| row | tries | held |\n|---|---|---|\n{line}\n" if has_title else f"{line}\n")
            sys.stdout.flush()
            took = f"{time.monotonic() - started:.0f} s, {_cpu_seconds() - used:.0f} s of a core"
            sys.stderr.write(f"{name}: {took}\n")
            sys.stderr.writelines(f"  {failure}\n" for failure in outcome.failures)
    if options.out is not None:
        options.out.write_text(json.dumps(outcomes, indent=1))
    return int(not all(map(_has_held, outcomes.values())))


def _has_held(outcome: dict[str, Any]) -> bool:
    """Tell whether all tries of a row held; a row that tried none without a reason has not."""
    return bool(outcome["skipped"] or 0 < outcome["tries"] == outcome["held"])


def _cpu_seconds() -> float:
    """Seconds of a core that this process has used, and its children that have ended."""
    uses = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(use.ru_utime + use.ru_stime for use in uses)


if __name__ == "__main__":
    sys.exit(main())
