"""The rows of the table: each tries one kind of fault many times, and says how often what is promised held."""

import contextlib
import os
import random
import shutil
import signal
import subprocess
import sys
import xml.etree.ElementTree as ET
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from answer_lines import assert_same_answers
from children import KILLED, mutate, run_child
from pickles import hostile_files
from world import STEPS, World, digests_of_run, problems_of_run

from mllm.checkpoints.load import export
from mllm.convert.state_files import read_state
from mllm.media import MediaError, load_audio, load_image, load_video
from mllm.training.feature_cache.check import check_features
from mllm.training.run_folder import list_checkpoints, newest_checkpoint, read_checkpoint
from mllm.utils.sealing import MANIFEST, check_before_load, read_manifest

TESTS = Path(__file__).parent.parent
SAVING = ["checkpoint.written", "checkpoint.sealed", "checkpoint.named", "checkpoint.deleting"]
TRAINING = [*SAVING, "model.written", "model.moving", "step.begin", "step.end", "decode", "collate"]
SIGNALS = [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP]


@dataclass
class Outcome:
    """Counts tries of one row and what held, and keeps the first few that did not."""

    tries: int = 0
    held: int = 0
    failures: list[str] = field(default_factory=list)

    def add(self, problems: list[str], what: str) -> None:
        """Count one try; it held where there are no problems."""
        self.tries += 1
        self.held += not problems
        if problems and len(self.failures) < 5:
            self.failures.append(f"{what}: {'; '.join(problems)}")


@dataclass
class Ground:
    """What rows share: a world, an uninterrupted run in it, and a folder for what they try."""

    folder: Path
    world: World = field(init=False)

    def __post_init__(self) -> None:
        # Before any fork: a child that made it would make it anew, with other times of its media.
        self.world = World.make(self.folder / "world")

    @cached_property
    def seconds(self) -> float:
        """How long the uninterrupted run takes; it lies in `run` afterwards."""
        ended = run_child(lambda: self.world.train(self.folder / "run"), self.log)
        assert ended.code == 0, ended.said
        return ended.seconds

    @cached_property
    def run(self) -> Path:
        assert self.seconds
        return self.folder / "run"

    @cached_property
    def expected(self) -> dict[str, str]:
        return digests_of_run(self.run)

    @property
    def log(self) -> Path:
        return self.folder / "child.log"

    def fresh(self, name: str) -> Path:
        """An empty place for one try."""
        shutil.rmtree(self.folder / name, ignore_errors=True)
        (self.folder / name).mkdir()
        return self.folder / name


def kills_in_training_at_named_places(ground: Ground, tries: int, rng: random.Random) -> Outcome:
    """Kill -9 at a fail point, then go on to the end: bitwise the weights and moments of the uninterrupted run."""
    outcome = Outcome()
    for number in range(tries):
        point, run = TRAINING[number % len(TRAINING)], ground.fresh("try") / "run"
        # The first time there may be nothing to lose yet; every place is passed at least twice in six steps.
        count = 1 if point == "checkpoint.deleting" else 1 + number // len(TRAINING) % 2
        ended = run_child(lambda run=run: ground.world.train(run), ground.log, fail_point=f"{point}:kill@{count}")
        problems = [] if ended.code == KILLED else [f"ended with {ended.code}: {ended.said[-300:]}"]
        outcome.add(problems + _resumed(ground, run), f"{point}@{count}")
    return outcome


def kills_in_training_at_random(ground: Ground, tries: int, rng: random.Random) -> Outcome:
    """The same at any instant of the run, every third time twice; with and without processes that read data."""
    outcome = Outcome()
    for number in range(tries):
        run = ground.fresh("try") / "run"
        for _ in range(1 + (number % 3 == 2)):
            _killed(ground, lambda run=run, n=number: ground.world.train(run, workers=n % 2), rng)
        outcome.add(_resumed(ground, run, workers=number % 2), f"try {number}")
    return outcome


def _killed(ground: Ground, work: Callable[[], object], rng: random.Random) -> None:
    after = ground.seconds * rng.uniform(0.2, 1.0)
    run_child(work, ground.log, signal_after=(after, signal.SIGKILL))


def _resumed(ground: Ground, run: Path, *, workers: int = 0) -> list[str]:
    ended = run_child(lambda: ground.world.train(run, workers=workers), ground.log)
    if ended.code:
        return [f"did not go on: {ended.said[-300:]}"]
    return problems_of_run(run, ground.expected)


def full_disks_in_training(ground: Ground, tries: int, rng: random.Random) -> Outcome:
    """A write fails for want of space at a place of a save: a message with path and bytes, older checkpoints whole."""
    outcome = Outcome()
    for number in range(tries):
        run = ground.fresh("try") / "run"
        point = [*SAVING[:2], "model.written"][number % 3]
        count = 2  # the first checkpoint is there, or the processor, which a run writes before it begins
        ended = run_child(lambda run=run: ground.world.train(run), ground.log, fail_point=f"{point}:full@{count}")
        problems = [] if "WriteError" in ended.said and "are free" in ended.said else [ended.said[-300:]]
        problems += [f"left: {path.name}" for path in run.iterdir() if path.name.startswith(".")]
        problems += [] if newest_checkpoint(run) is not None else ["no checkpoint is whole"]
        outcome.add(problems + _resumed(ground, run), point)
    return outcome


def signals_in_training(ground: Ground, tries: int, rng: random.Random) -> Outcome:
    """A signal at any instant behind the first step: that step or the next is saved, and the run goes on bitwise."""
    outcome = Outcome()
    for number in range(tries):
        run, sent = ground.fresh("try") / "run", SIGNALS[number % len(SIGNALS)]

        def work(run: Path = run) -> int:
            from mllm.training.interruption import RunInterrupted

            try:
                ground.world.train(run, workers=2, save_every=None)
            except RunInterrupted as interrupted:
                return interrupted.exit_status
            return 0

        after = ground.seconds * rng.uniform(0.3, 1.1)
        ended = run_child(work, ground.log, signal_after=(after, sent))
        problems = []
        if ended.code == 128 + sent:
            steps = _logged_steps(run)
            newest = newest_checkpoint(run)
            if steps and (newest is None or newest.step < steps):
                problems.append(f"step {steps} is in the log, saved is {newest and newest.step}")
        elif ended.code:  # 0: it came when all was done
            problems.append(f"{sent.name} ended it with {ended.code}: {ended.said[-300:]}")
        more = run_child(lambda run=run: ground.world.train(run, save_every=None), ground.log)
        if more.code or digests_of_run(run) != ground.expected:
            problems.append(f"did not go on: {more.code} {more.said[-300:]}")
        outcome.add(problems, f"{sent.name} after {after:.1f} s")
    return outcome


def _logged_steps(run: Path) -> int:
    log = run / "log.jsonl"
    return sum('"loss"' in line for line in log.read_text().splitlines()) if log.exists() else 0


def kills_in_evaluation(ground: Ground, tries: int, rng: random.Random) -> Outcome:
    """Kill -9 at a place or at any instant, then go on: the same answers, each once, in the same order."""
    whole = ground.fresh("evaluated") / "out"
    model, outcome = ground.run, Outcome()
    reference = run_child(lambda: ground.world.evaluate(model, whole), ground.log)
    assert reference.code == 0, reference.said
    for number in range(tries):
        out = ground.fresh("try") / "out"
        work = lambda out=out: ground.world.evaluate(model, out)  # noqa: E731
        problems = []
        if number % 2:
            point = ["evaluate.answered", "evaluate.kept"][number // 2 % 2]
            ended = run_child(work, ground.log, fail_point=f"{point}:kill@{1 + number // 4 % 4}")
            problems += [] if ended.code == KILLED else [f"ended with {ended.code}: {ended.said[-300:]}"]
        else:
            after = reference.seconds * rng.uniform(0.2, 1.0)
            run_child(work, ground.log, signal_after=(after, signal.SIGKILL))
        ended = run_child(work, ground.log)
        problems += [ended.said[-300:]] if ended.code else _other_answers(whole, out)
        outcome.add(problems, f"try {number}")
    return outcome


def _other_answers(whole: Path, out: Path) -> list[str]:
    try:
        assert_same_answers(whole / "hypotheses.jsonl", out / "hypotheses.jsonl")
    except AssertionError as error:
        return [f"other answers: {error}"]
    return []


def kills_in_feature_building(ground: Ground, tries: int, rng: random.Random) -> Outcome:
    """Kill -9 at a place or at any instant, then go on: every feature is there, every byte is what was written."""
    whole = ground.fresh("features")
    reference = run_child(lambda: ground.world.make_features(whole), ground.log)
    assert reference.code == 0, reference.said
    outcome = Outcome()
    for number in range(tries):
        folder = ground.fresh("try")
        work = lambda folder=folder: ground.world.make_features(folder)  # noqa: E731
        if number % 2:
            run_child(work, ground.log, fail_point=f"{['features.shard', 'features.index'][number // 2 % 2]}:kill")
        else:
            after = reference.seconds * rng.uniform(0.2, 1.0)
            run_child(work, ground.log, signal_after=(after, signal.SIGKILL))
        ended = run_child(work, ground.log)
        problems = [ended.said[-300:]] if ended.code else []
        config = ground.world.config(folder / "run", features=folder / "features")
        problems = problems or check_features(folder / "features", config).problems
        outcome.add(problems, f"try {number}")
    return outcome


def damaged_files(ground: Ground, tries: int, rng: random.Random) -> Outcome:
    """One damaged file of a checkpoint, a run or an export: refused by its name before anything of it is used."""
    exported = ground.fresh("exports") / "export"
    export(ground.run, exported)
    checkpoint = list_checkpoints(ground.run)[-1]
    homes = [(checkpoint, read_checkpoint), (ground.run, check_before_load), (exported, check_before_load)]
    outcome = Outcome()
    for number in range(tries):
        home, check = homes[number % 3]
        manifest = read_manifest(home)
        names = [*manifest["files"], MANIFEST]
        path = home / names[rng.randrange(len(names))]
        whole = path.read_bytes()
        path.write_bytes(damaged := mutate(whole, rng))
        try:
            check(home)
            # Blanks of JSON, or a piece that was put in place of an equal one: the same content.
            is_same = damaged == whole or (path.name == MANIFEST and read_manifest(home) == manifest)
            problems = [] if is_same else ["accepted"]
        except ValueError as error:
            problems = [] if path.name in str(error) else [str(error)]
        finally:
            path.write_bytes(whole)
        outcome.add(problems, f"{path.name} of {home.name}")
    return outcome


def damaged_media(ground: Ground, tries: int, rng: random.Random) -> Outcome:
    """Media of ten kinds that are cut, overwritten, zeroed or repeated: a result or one MediaError, never a death."""
    import numpy as np
    from test_media_damage import damaged, whole_file

    folder, outcome, per_child = ground.fresh("media"), Outcome(), 100
    suffixes = ("jpg", "png", "webp", "bmp", "wav", "flac", "mp3", "ogg", "mp4")
    whole = {}
    for suffix in suffixes:
        write = lambda name, count, codec: _write_video(folder / name)  # noqa: E731
        whole[suffix] = whole_file(f"a.{suffix}", folder, write).read_bytes()

    def work(seed: int, count: int) -> None:
        generator = np.random.default_rng(seed)
        for index in range(count):
            suffix = suffixes[(seed + index) % len(suffixes)]
            load = load_video if suffix == "mp4" else load_audio if suffix in suffixes[4:8] else load_image
            path = folder / f"try.{suffix}"
            path.write_bytes(damaged(whole[suffix], generator))
            with contextlib.suppress(MediaError):
                load(path)
            os.write(1, b".")

    for start in range(0, tries, per_child):
        count = min(per_child, tries - start)
        seed = rng.randrange(10**6)
        ended = run_child(lambda s=seed, c=count: work(s, c), ground.log, timeout=300)
        held = count if ended.code == 0 else ended.said.count(".")
        outcome.tries, outcome.held = outcome.tries + count, outcome.held + min(held, count)
        if ended.code:
            outcome.failures.append(f"seed {seed}: {ended.code} {ended.said[-300:]}")
    return outcome


def _write_video(path: Path) -> Path:
    import tiny

    name = tiny.write_media(path.parent / "made", seconds=0.4)["video"]
    shutil.copy(path.parent / "made" / name, path)
    return path


def hostile_checkpoints(ground: Ground, tries: int, rng: random.Random) -> Outcome:
    """Files of torch.save that run code, ask for gigabytes or are damaged: nothing runs, nothing but ValueError."""
    folder, outcome = ground.fresh("pickles"), Outcome()
    canary = folder / "canary"
    for name, content in hostile_files(tries, canary, folder, rng):
        path = folder / f"x{Path(name).suffix}"
        path.write_bytes(content)
        problems = []
        try:
            read_state(path)
        except ValueError:
            pass
        except BaseException as error:
            problems.append(f"{type(error).__name__}: {error}")
        outcome.add(problems + (["code ran"] if canary.exists() else []), name)
    return outcome


def cases_of(*files: str, marks: str = "not slow") -> Callable[[Ground, int, random.Random], Outcome]:
    """Make a row of the test files that try the same: each case of them is a try, or as many as it records."""

    def run(ground: Ground, tries: int, rng: random.Random) -> Outcome:
        report = ground.folder / "report.xml"
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-m",
            marks,
            *files,
            f"--junit-xml={report}",
            "-p",
            "no:cacheprovider",
        ]
        subprocess.run(
            command, cwd=TESTS.parent, env={**os.environ, "ALL_FAULTS": "1"}, capture_output=True, check=False
        )
        outcome = Outcome()
        for case in ET.parse(report).iter("testcase"):
            if case.find("skipped") is None:
                bad = [child.get("message", "") for child in case if child.tag in ("failure", "error")]
                tries = case.find("properties/property[@name='tries']")
                for _ in range(1 if tries is None else int(tries.get("value", ""))):
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
    "kills at places": Row("kill -9 in training, at ten named places", 10, 100, kills_in_training_at_named_places),
    "kills at random": Row("kill -9 in training, at random instants", 4, 50, kills_in_training_at_random),
    "kills in evaluation": Row("kill -9 in evaluation", 4, 20, kills_in_evaluation),
    "kills in features": Row("kill -9 while features are built", 4, 20, kills_in_feature_building),
    "full disks": Row("no space left while saving", 3, 15, full_disks_in_training),
    "signals": Row("SIGTERM, SIGINT, SIGUSR1, SIGHUP in training", 4, 50, signals_in_training),
    "damaged files": Row("damaged files of checkpoints, runs and exports", 300, 2_000, damaged_files),
    "damaged media": Row("damaged media files", 200, 12_000, damaged_media),
    "hostile checkpoints": Row("hostile or damaged .pt files", 200, 2_000, hostile_checkpoints),
}
"""What runs in CI and, with larger counts, in a full run."""
FULL_ROWS = {
    "paths": Row("paths that lead outside of a root", 0, 0, cases_of("tests/media/test_media_paths.py")),
    "urls": Row("addresses and answers of hosts", 0, 0, cases_of("tests/serving/test_fetching.py")),
    "two processes": Row(
        "a signal to one of two processes, gradients that are no numbers, one that is stuck; DDP, ZeRO-2, ZeRO-3",
        0,
        0,
        cases_of("tests/faults/test_two_processes.py", marks="slow"),
    ),
    "foreign code": Row("code in checkpoints", 0, 0, cases_of("tests/checkpoints/test_foreign_code.py")),
}
"""Rows of tests that CI runs by themselves; they have as many tries as cases."""


def seeded(rows: dict[str, Row], seed: int) -> Iterator[tuple[str, Row, random.Random]]:
    """Give every row a generator of its own, so that one row can be run again alone."""
    for name, row in rows.items():
        yield name, row, random.Random(f"{seed} {name}")


assert STEPS % 2 == 0
