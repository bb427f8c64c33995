"""Runs every benchmark, one after the other, and writes one table of what they measured beside their goals.

    python benchmarks/all_goals.py [--repeats 5] [--only pooled_step rank_balance] [--out runs/bench]

Each is a process of its own, so that none finds another's memory or threads. The folder of `--out` gets `goals.md` and
`goals.jsonl`, and what each printed. The exit status is 1 when a benchmark failed, as one does whose ways do not give
the same; a goal that is missed is no failure.
"""

import argparse
import subprocess
import sys
import time
from pathlib import Path

from outcomes import markdown_of, read, table_of
from rich.console import Console

FOLDER = Path(__file__).parent
ALONE = {"accuracy_per_flop", "gpu", "released_code"}
"""What is run by itself: it measures no two ways to one result, or not here, or needs a checkout."""


def benchmarks() -> list[str]:
    """List the names of all files here that can be run, but this one and those that are run by themselves."""
    runnable = (path for path in sorted(FOLDER.glob("*.py")) if '__name__ == "__main__"' in path.read_text("utf-8"))
    return [path.stem for path in runnable if path != Path(__file__) and path.stem not in ALONE]


def command_of(name: str, results: Path, repeats: int | None) -> list[str]:
    """Build the command that runs a benchmark."""
    command = [sys.executable, str(FOLDER / f"{name}.py"), "--results", str(results)]
    return command if repeats is None else [*command, "--repeats", str(repeats)]


def run_all(names: list[str], out: Path, repeats: int | None, console: Console) -> list[str]:
    """Run benchmarks; return the names of those that failed."""
    failed = []
    for number, name in enumerate(names, 1):
        console.print(f"{number} of {len(names)}  {name} ...", end=" ")
        started = time.perf_counter()
        log = out / f"{name}.txt"
        with log.open("w", encoding="utf-8") as file:
            command = command_of(name, out / "goals.jsonl", repeats)
            code = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, check=False).returncode
        console.print(f"{time.perf_counter() - started:.0f} s" + ("" if code == 0 else f", FAILED, see {log}"))
        failed += [name] if code else []
    return failed


def main() -> int:
    """Run, then show all outcomes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, help="times that count; each benchmark's own number when left out")
    parser.add_argument("--only", nargs="+", choices=benchmarks(), metavar="NAME", help="run these")
    parser.add_argument("--out", type=Path, default=Path("runs/bench"))
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    results = arguments.out / "goals.jsonl"
    results.unlink(missing_ok=True)
    console = Console(width=200)
    failed = run_all(arguments.only or benchmarks(), arguments.out, arguments.repeats, console)
    outcomes = read(results)
    (arguments.out / "goals.md").write_text(markdown_of(outcomes), encoding="utf-8")
    console.print(table_of(outcomes))
    console.print(f"written to {arguments.out / 'goals.md'}")
    if failed:
        console.print(f"FAILED: {', '.join(failed)}")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
