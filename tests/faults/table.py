"""Tries every row and writes one table: python tests/faults/table.py [--tier fast] [--rows NAME ...] [--out FILE]."""

import argparse
import json
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

TESTS = Path(__file__).parent.parent
sys.path[:0] = [str(path) for path in (TESTS.parent, TESTS, TESTS / "training", TESTS / "media", TESTS / "faults")]

from rows import FULL_ROWS, ROWS, Ground, seeded  # noqa: E402


def main() -> int:
    """Return 1 where something did not hold."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--tier", choices=("fast", "full"), default="full")
    parser.add_argument("--rows", nargs="*", default=[])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    rows = ROWS if options.tier == "fast" else {**ROWS, **FULL_ROWS}
    rows = {name: row for name, row in rows.items() if not options.rows or name in options.rows}
    outcomes = {}
    with tempfile.TemporaryDirectory() as folder:
        ground = Ground(Path(folder))
        for name, row, rng in seeded(rows, options.seed):
            started = time.process_time()
            tries = row.fast_tries if options.tier == "fast" else row.full_tries
            outcome = row.run(ground, tries, rng)
            outcomes[name] = asdict(outcome)
            line = f"| {row.name} | {outcome.tries:,} | {outcome.held:,} |"
            sys.stdout.write(f"{line}\n" if len(outcomes) > 1 else f"| row | tries | held |\n|---|---|---|\n{line}\n")
            sys.stdout.flush()
            sys.stderr.write(f"{name}: {time.process_time() - started:.0f} s of this process\n")
            sys.stderr.writelines(f"  {failure}\n" for failure in outcome.failures)
    if options.out is not None:
        options.out.write_text(json.dumps(outcomes, indent=1))
    return int(any(outcome["held"] < outcome["tries"] for outcome in outcomes.values()))


if __name__ == "__main__":
    sys.exit(main())
